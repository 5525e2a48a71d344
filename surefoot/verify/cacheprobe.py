"""What a target's mixer really read from its cache: keys and values, convolution inputs, recurrent states.

Surefoot's own engine only. The path is run once more, and the ops of one module that read a cache are watched for the
rows of our request. With what was read in hand, a wrong answer splits in two: if the right arithmetic on what was read
gives the target's output, the cache is wrong and says itself how; if not, the arithmetic is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surefoot.backends.native import NativeBackend
from surefoot.core.request import Request
from surefoot.ops.attention import gather_pages
from surefoot.ops.spec import REGISTRY, Implementation, OpSpec, dispatch
from surefoot.verify.pathcapture import PathCapture, captures, module_at


@dataclass
class StateCall:
    """One call of a stateful op for our request: tokens [start, end), its state before and after, fp32.

    shared: another row of the same batch had the same slot.
    """

    start: int
    end: int
    before: torch.Tensor
    after: torch.Tensor
    shared: bool = False


@dataclass
class KeyRead:
    """One call of attention for our request: queries [start, end) and the keys and values [end, Hk, D] they read."""

    start: int
    end: int
    keys: torch.Tensor
    values: torch.Tensor


@dataclass
class CacheRead:
    """All reads of one run, in the order of computation; states: conv [C, K - 1], recurrent [Hv, Dk, Dv]; all fp32.

    on: what the same run gave, because stale memory may differ from run to run.
    """

    on: PathCapture | None = None
    keys: list[KeyRead] = field(default_factory=list)
    conv: list[StateCall] = field(default_factory=list)
    recurrent: list[StateCall] = field(default_factory=list)


def read(target: NativeBackend, module: str, on_path: str, token_ids: Sequence[int]) -> CacheRead:
    """Run the path again and watch the caches that `module` reads."""
    found = CacheRead()
    inside = [False]
    part = module_at(target.engine.model, module)
    assert part is not None
    handles = [
        part.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True)),
        part.register_forward_hook(lambda *_: inside.__setitem__(0, False), always_call=True),
    ]
    try:
        with contextlib.ExitStack() as stack:
            for name in WATCHED:
                stack.enter_context(_watch(REGISTRY[name], _Watcher(target, found, inside, sorted(token_ids))))
            for on in captures(target, token_ids, [on_path]):
                found.on = on
    finally:
        for handle in handles:
            handle.remove()
    return found


WATCHED = ("paged_attention", "causal_conv", "causal_conv_step", "gated_delta_chunk", "gated_delta_step")


@dataclass
class _Watcher:
    target: NativeBackend
    found: CacheRead
    inside: list[bool]
    tokens: list[int]  # ours, sorted: a path may turn them round

    def request(self) -> Request | None:
        live = (item.request for item in self.target.engine._live.values())
        ours = [r for r in live if sorted(r.prompt_token_ids) == self.tokens]
        return ours[-1] if ours else None

    def before(self, op: str, args: Sequence[Any]) -> Any:
        request = self.request() if self.inside[0] else None
        if request is None:
            return None
        if op == "paged_attention":
            _keys(self.found, request, args, len(self.tokens))
            return None
        state, slots = (args[3], args[4]) if op.startswith("causal") else (args[5], args[6])
        rows = [i for i, slot in enumerate(slots.tolist()) if slot == request.state_slot]
        if not rows:
            return None
        lens = [1] * len(slots) if op.endswith("step") else args[-1]
        start = request.num_computed_tokens
        before = state[request.state_slot].float().clone()
        kept = StateCall(start, start + lens[rows[-1]], before, torch.empty(0), len(rows) > 1)
        (self.found.conv if op.startswith("causal") else self.found.recurrent).append(kept)
        return kept, state, request.state_slot

    def after(self, token: Any) -> None:
        if token is not None:
            kept, state, slot = token
            kept.after = state[slot].float().clone()


def _keys(found: CacheRead, request: Request, args: Sequence[Any], count: int) -> None:
    _, k_cache, v_cache, table, _, _, query_lens, seq_lens, _ = args
    for i, (n, length) in enumerate(zip(query_lens, seq_lens)):
        if request.block_ids and length <= count and int(table[i, 0]) == request.block_ids[0]:
            pages = (gather_pages(cache, table[i], length).float().clone() for cache in (k_cache, v_cache))
            found.keys.append(KeyRead(length - n, length, *pages))


@contextlib.contextmanager
def _watch(spec: OpSpec, watcher: _Watcher) -> Iterator[None]:
    def watch(*args: Any, **kwargs: Any) -> Any:
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        position = spec.implementations.index(entry)
        del spec.implementations[position]
        try:
            token = watcher.before(spec.name, args)
            result = dispatch(spec, device, args, kwargs)
            watcher.after(token)
        finally:
            spec.implementations.insert(position, entry)
        return result

    entry = Implementation("watched", "any", watch, priority=1 << 30)
    spec.implementations.insert(0, entry)
    try:
        yield
    finally:
        spec.implementations.remove(entry)
