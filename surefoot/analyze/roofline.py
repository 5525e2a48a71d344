"""What one engine step costs: the model runs on the meta device and every op call is charged by its own `OpSpec.cost`.

    cost = step_cost(model, decode_step(batch=8, context=1024), dtype)      # tensors without memory: any model fits
    lower_bound(cost, chip_peak(chip.peak_flops, "bfloat16"), chip.memory_bandwidth)      # nothing is faster

Bytes are counted twice. `bytes` is what the op moves when it runs alone, `must_move` the part that no fusion and no
cache avoids: weights once, the cache that is read and written, ids; activations are left out. Units: FLOP, bytes, s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from surefoot import ops
from surefoot.cache.plan import LinearStateSpec
from surefoot.core.batch import Batch, KVPages, LinearState
from surefoot.models.base import CausalLM
from surefoot.ops.spec import OpSpec

CLASSES = {
    "linear": "linear",
    "linear_w8": "linear",
    "linear_w4": "linear",
    "paged_attention": "attention",
    "kv_write": "attention",
    "gated_delta_step": "delta rule",
    "gated_delta_chunk": "delta rule",
    "delta_gates": "delta rule",
    "causal_conv": "delta rule",
    "causal_conv_step": "delta rule",
}  # everything else: "elementwise"


@dataclass(frozen=True)
class Step:
    """One forward pass: new tokens and tokens in the cache afterwards, for each request; decodes come first.

    num_logits: requests whose next token is chosen in this step.
    """

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_logits: int

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)


def decode_step(batch: int, context: int) -> Step:
    """One new token for each of `batch` requests that then have `context` tokens in the cache."""
    return Step((1,) * batch, (context,) * batch, batch)


def prefill_steps(prompt: int, max_num_batched_tokens: int, batch: int = 1) -> list[Step]:
    """The steps that the engine takes for `batch` prompts of equal length, as many tokens at a time as it may."""
    steps, done = [], [0] * batch
    while min(done) < prompt:
        room, parts = max_num_batched_tokens, []
        for i in range(batch):
            n = min(room, prompt - done[i])
            if n:
                done[i] += n
                room -= n
                parts.append((n, done[i]))
        parts.sort(key=lambda part: part[0] > 1)
        queries, lengths = zip(*parts)
        steps.append(Step(queries, lengths, sum(length == prompt for length in lengths)))
    return steps


@dataclass(frozen=True)
class OpCall:
    """One call, without its position in the model. kind: what its speed goes by, such as "bfloat16" or "w8a8".

    rows: tokens that enter.  weights: elements of the weight matrix, for linear ops.
    """

    op: str
    kind: str
    rows: int
    weights: int
    flops: float
    bytes: float
    must_move: float

    @property
    def op_class(self) -> str:
        return CLASSES.get(self.op, "elementwise")


Calls = Counter[OpCall]


@dataclass(frozen=True)
class StepCost:
    """calls: how often each op call occurs.  passed: tokens x layers x hidden size, what goes from layer to layer.
    logits: requests x vocabulary, what the sampler reads."""

    calls: Calls
    passed: int
    logits: int

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(self.calls + other.calls, self.passed + other.passed, self.logits + other.logits)

    def total(self, value: Callable[[OpCall], float]) -> float:
        return sum(count * value(call) for call, count in self.calls.items())

    def by_class(self, value: Callable[[OpCall], float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for call, count in self.calls.items():
            found[call.op_class] = found.get(call.op_class, 0.0) + count * value(call)
        return {name: found[name] for name in sorted(found) if found[name]}


def _like_first(first: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(first)


def _two_like(first: torch.Tensor, second: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(first), torch.empty_like(second)


def _product(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


# On the meta device only the shape of a result matters; ops that are not here run in their plain PyTorch form, some of
# which loop over requests and tokens.
_SHAPE_OF: dict[str, Callable[..., Any]] = {
    "add": _like_first,
    "add_rms_norm": _two_like,
    "causal_conv": _like_first,
    "causal_conv_step": _like_first,
    "embedding": lambda ids, weight: weight.new_empty(*ids.shape, weight.shape[1]),
    "gated_delta_chunk": lambda q, k, v, *rest: torch.empty_like(v),
    "gated_delta_step": lambda q, k, v, *rest: torch.empty_like(v),
    "gated_rms_norm": _like_first,
    "kv_write": lambda *args: None,
    "linear": _product,
    "linear_w4": _product,
    "linear_w8": _product,
    "paged_attention": _like_first,
    "rms_norm": _like_first,
    "rotary": _two_like,
    "rotary_angles": lambda positions, freq: tuple(freq.new_empty(len(positions), freq.shape[-1]) for _ in range(2)),
    "sigmoid_mul": _like_first,
    "swiglu": _like_first,
}


def kind_of(spec: OpSpec, args: tuple, kwargs: dict) -> str:
    """float dtype of the activations, or the scheme of a quantised linear op."""
    if spec.name == "linear_w4":
        act = kwargs.get("act", args[5] if len(args) > 5 else "float")
        return "w4a8" if act == "int8" else "w4a16"
    if spec.name == "linear_w8":
        act = kwargs.get("act", args[4] if len(args) > 4 else "float")
        return "w8a8" if act == "int8" else "w8a16"
    floats = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
    return str(floats[0].dtype).removeprefix("torch.") if floats else "float32"


def describe_call(spec: OpSpec, args: tuple, kwargs: dict, result: Any, resident: set[int] | None = None) -> OpCall:
    """The record of one call. `resident`: storages of weights and caches; without it, all that moves must move."""
    cost = spec.cost(*args, **kwargs)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    linear = CLASSES.get(spec.name) == "linear"
    weights = (args[1].numel() * (8 if spec.name == "linear_w4" else 1)) if linear else 0
    must_move = cost.bytes
    if resident is not None:
        results = result if isinstance(result, tuple) else (result,)
        passing = [t for t in tensors if t.is_floating_point() and storage(t) not in resident]
        passing += [t for t in results if isinstance(t, torch.Tensor)]
        must_move = max(0.0, cost.bytes - sum(t.nbytes for t in passing))
    rows = tensors[0].shape[0] if tensors[0].dim() else 1
    return OpCall(spec.name, kind_of(spec, args, kwargs), rows, weights, cost.flops, cost.bytes, must_move)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def resident_storages(model: CausalLM, layers: Iterable[KVPages | LinearState]) -> set[int]:
    """Storages of what stays on the device between steps."""
    held = [*model.parameters(), *model.buffers()]
    held += [t for layer in layers for t in vars(layer).values()]
    return {storage(t) for t in held}


@torch.inference_mode()
def step_cost(model: CausalLM, step: Step, dtype: torch.dtype, block_size: int = 16) -> StepCost:
    """Every op call of a step of a model whose tensors are on the meta device (see `estimate.sketch`)."""
    batch = meta_batch(model, step, dtype, block_size)
    resident = resident_storages(model, batch.layers)
    calls: Calls = Counter()

    def charge(spec: OpSpec, args: tuple, kwargs: dict, run: Callable[[], Any]) -> Any:
        shape_of = _SHAPE_OF.get(spec.name)
        result = shape_of(*args) if shape_of else run()
        calls[describe_call(spec, args, kwargs, result, resident)] += 1
        return result

    with ops.intercept(charge):
        hidden = model(batch)
        if step.num_logits:
            model.compute_logits(hidden[: step.num_logits])
    return StepCost(calls, *step_size(model, step))


def step_size(model: CausalLM, step: Step) -> tuple[int, int]:
    """`passed` and `logits` of a `StepCost`."""
    return step.num_tokens * len(model.decoder_layers) * model.hidden_size, step.num_logits * model.vocab_size


def meta_batch(model: CausalLM, step: Step, dtype: torch.dtype, block_size: int) -> Batch:
    """A `Batch` of this shape whose tensors have no memory."""
    tokens, requests = step.num_tokens, len(step.query_lens)
    pages = sum(-(-n // block_size) for n in step.seq_lens) + 1

    def ints(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rope_lens = ints(tokens) if model.rotary.config.depends_on_length else None
    return Batch(
        input_ids=ints(tokens),
        positions=ints(tokens),
        slot_mapping=ints(tokens),
        query_start_loc=ints(requests + 1, dtype=torch.int32),
        seq_lens=ints(requests, dtype=torch.int32),
        block_table=ints(requests, pages, dtype=torch.int32),
        state_slots=ints(requests),
        logits_indices=ints(requests),
        query_lens_host=list(step.query_lens),
        seq_lens_host=list(step.seq_lens),
        num_decodes=sum(n == 1 for n in step.query_lens),
        layers=meta_cache(model, pages, requests + 1, block_size, dtype),
        rope_lens=rope_lens,
    )


def meta_cache(model: CausalLM, pages: int, slots: int, block_size: int, dtype: torch.dtype):
    layers: list[KVPages | LinearState] = []
    for spec in model.state_specs():
        if isinstance(spec, LinearStateSpec):
            recurrent = (slots, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim)
            layers.append(
                LinearState(
                    torch.empty(slots, spec.conv_dim, spec.conv_width, dtype=dtype, device="meta"),
                    torch.empty(recurrent, dtype=torch.float32, device="meta"),
                )
            )
        else:
            shape = (pages, block_size, spec.num_kv_heads, spec.head_dim)
            layers.append(KVPages(*(torch.empty(shape, dtype=dtype, device="meta") for _ in range(2))))
    return layers


def lower_bound(cost: StepCost, peak: Callable[[OpCall], float | None], bandwidth: float | None) -> float | None:
    """Seconds that no implementation undercuts: the longer of all arithmetic at the peak and all that must move at full
    bandwidth (perfect overlap). None if neither limit is known; calls without a known peak are not charged."""

    def compute(call: OpCall) -> float:
        flops = peak(call)
        return call.flops / flops if flops else 0.0

    memory = cost.total(lambda call: call.must_move) / bandwidth if bandwidth else 0.0
    return max(cost.total(compute), memory) or None


def chip_peak(peak_flops: Mapping[str, float], dtype: str) -> Callable[[OpCall], float | None]:
    """A chip's peak for a call of a model in `dtype`: weight-only schemes multiply in that dtype, W8A8 in int8."""
    best = max((peak_flops.get(name, 0.0) for name in ("float32", dtype)), default=0.0) or None

    def peak(call: OpCall) -> float | None:
        if call.op_class != "linear":
            # NOTE: parts in fp32 may run on matrix units too, so a bound must not charge them the fp32 peak.
            return best
        by = {"w8a8": "int8", "w4a8": "int8", "w8a16": dtype, "w4a16": dtype}
        return peak_flops.get(by.get(call.kind, call.kind))

    return peak
