"""Runs a scheduled step on the device: states, forward, logits, sampling, and the one copy back to the host.

NOTE: this is the only file of engine, layers and models that may copy from device to host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from surefoot import ops
from surefoot.cache.plan import CachePlan, LinearStateSpec
from surefoot.core.batch import KVPages, LinearState
from surefoot.core.outputs import TokenLogprob
from surefoot.engine import inputs, sampler
from surefoot.engine.decode_graphs import DecodeGraphs
from surefoot.engine.padding import Padding
from surefoot.engine.scheduler import Schedule, Scheduled
from surefoot.models.base import CausalLM
from surefoot.ops.spec import intercepted

# Logits of long prompts are worked off in slices of this size, so that a vocabulary of 248,320 stays affordable.
LOGITS_BYTES = 128 << 20


@dataclass
class StepResult:
    """What one step computed, by request id.

    tokens: sampled token id (-1: the logits held a NaN) and its log-probability if wanted.
    prompt_logprobs: log-probabilities of the prompt tokens that this step's rows predict.
    logits: for score requests, fp32 rows of this step's tokens on the host, in slices [n, vocab].
    """

    tokens: dict[str, tuple[int, TokenLogprob | None]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprob]] = field(default_factory=dict)
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)


def allocate(model: CausalLM, plan: CachePlan, block_size: int, dtype: torch.dtype, device: torch.device):
    """Cache of every decoder layer, in layer order. Untouched memory stays uncommitted on a CPU."""
    layers: list[KVPages | LinearState] = []
    for spec in model.state_specs():
        if isinstance(spec, LinearStateSpec):
            conv = (plan.num_state_rows, spec.conv_dim, spec.conv_width)
            recurrent = (plan.num_state_rows, spec.num_v_heads, spec.head_k_dim, spec.head_v_dim)
            layers.append(
                LinearState(
                    torch.empty(conv, dtype=dtype, device=device),
                    torch.empty(recurrent, dtype=torch.float32, device=device),
                )
            )
        else:
            pages = (plan.num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
            layers.append(KVPages(*(torch.empty(pages, dtype=dtype, device=device) for _ in range(2))))
    return layers


class Runner:
    """Owns the model and its cache. `padding` fills steps up to buckets, `graphs` replays captured decode steps; either
    may be None, and `eagerly` sets the graphs aside for a while. `check` raises if the weights have been changed."""

    def __init__(
        self,
        model: CausalLM,
        plan: CachePlan,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        ops_policy: str = "auto",
        padding: Padding | None = None,
        graphs: DecodeGraphs | None = None,
        check: Callable[[], object] = lambda: None,
    ):
        self.model, self.device, self.block_size = model, device, block_size
        self.ops_policy, self.padding, self.graphs, self.check = ops_policy, padding, graphs, check
        self.layers = allocate(model, plan, block_size, dtype, device)
        self.length_dependent_rope = model.rotary.config.depends_on_length

    def run(self, step: Schedule) -> StepResult:
        self.check()
        with torch.inference_mode(), ops.use(self.ops_policy):
            self._prepare_states(step)
            result = StepResult()
            padded = step if self.padding is None else self.padding.pad(step)
            if not self._replay(padded, step, result):
                self._eager(padded, result)
            for source, target in step.state_saves:
                self._copy_state(source, target)
            return result

    def _replay(self, padded: Schedule, step: Schedule, result: StepResult) -> bool:
        """Run a decode step as a captured graph, if there is one for it and nobody watches the ops."""
        if self.graphs is None or intercepted():
            return False
        decoded = self.graphs.run(padded)
        if decoded is None:
            return False
        rows = [i for i, item in enumerate(step.items) if item.samples]
        items = [step.items[i] for i in rows]
        if all(item.request.params.plain for item in items):
            tokens = decoded.greedy[:, 0].tolist()
            result.tokens = {step.items[i].request.request_id: (tokens[i], None) for i in rows}
            return True
        logits, greedy = decoded.logits[: len(step.items)], decoded.greedy[: len(step.items)]
        if len(rows) < len(step.items):
            keep = torch.tensor(rows, device=self.device)
            logits, greedy = logits.index_select(0, keep), greedy.index_select(0, keep)
        self._choose(logits, items, result, greedy)
        return True

    def _eager(self, step: Schedule, result: StepResult) -> None:
        sampling = [(row, item) for row, item in _last_rows(step) if item.samples]
        batch = inputs.build(
            step,
            block_size=self.block_size,
            layers=self.layers,
            device=self.device,
            logits_rows=[row for row, _ in sampling],
            length_dependent_rope=self.length_dependent_rope,
        )
        hidden = self.model(batch)
        if sampling:
            logits = self.model.compute_logits(hidden.index_select(0, batch.logits_indices))
            self._choose(logits, [item for _, item in sampling], result)
        self._prompt_logits(hidden, step, result)

    @contextlib.contextmanager
    def eagerly(self) -> Iterator[None]:
        """Within the block, no graph is replayed."""
        graphs, self.graphs = self.graphs, None
        try:
            yield
        finally:
            self.graphs = graphs

    def _prepare_states(self, step: Schedule) -> None:
        for slot in step.state_resets:
            for layer in self._linear_states():
                layer.conv[slot].zero_()
                layer.recurrent[slot].zero_()
        for source, target in step.state_restores:
            self._copy_state(source, target)

    def _linear_states(self) -> list[LinearState]:
        return [layer for layer in self.layers if isinstance(layer, LinearState)]

    def _copy_state(self, source: int, target: int) -> None:
        for layer in self._linear_states():
            layer.conv[target].copy_(layer.conv[source])
            layer.recurrent[target].copy_(layer.recurrent[source])

    def _choose(
        self, logits: torch.Tensor, items: list[Scheduled], result: StepResult, greedy: torch.Tensor | None = None
    ) -> None:
        """The next token of each item from its row of logits. `greedy`: that choice, packed, where a graph made it."""
        if not items:
            return
        requests = [item.request for item in items]
        settings = sampler.build(requests, self.model.vocab_size, self.device)
        chosen = greedy if greedy is not None and settings.plain else sampler.sample(logits, settings).pack()
        packed = chosen.cpu().numpy()
        tokens = sampler.unpack(packed, [r.params.logprobs for r in requests])
        result.tokens = {r.request_id: token for r, token in zip(requests, tokens)}

    def _prompt_logits(self, hidden: torch.Tensor, step: Schedule, result: StepResult) -> None:
        """Logits, or log-probabilities, at the prompt positions of requests that want them."""
        for last, item in _last_rows(step):
            request, first = item.request, last + 1 - item.num_new_tokens
            if not request.needs_prompt_logits or item.start >= request.num_prompt_tokens:
                continue
            count = min(item.end, request.num_prompt_tokens) - item.start
            if request.score:
                rows = self._logits_in_slices(hidden[first : first + count])
                result.logits[request.request_id] = [part.float().cpu() for part in rows]
                continue
            # Row i predicts token i + 1; nothing in the prompt follows its last token.
            count = min(count, request.num_prompt_tokens - 1 - item.start)
            targets = request.prompt_token_ids[item.start + 1 : item.start + 1 + count]
            result.prompt_logprobs[request.request_id] = self._logprobs(
                hidden[first : first + count], targets, request.params.prompt_logprobs or 0
            )

    def _logits_in_slices(self, hidden: torch.Tensor):
        step = max(1, LOGITS_BYTES // (4 * self.model.vocab_size))
        for part in hidden.split(step):
            yield self.model.compute_logits(part)

    def _logprobs(self, hidden: torch.Tensor, targets: list[int], k: int) -> list[TokenLogprob]:
        found: list[TokenLogprob] = []
        for logits in self._logits_in_slices(hidden):
            ids = torch.tensor(targets[len(found) : len(found) + len(logits)], device=self.device)
            packed = sampler.SampledTokens(ids, *sampler.token_logprobs(logits, ids, k)).pack().cpu().numpy()
            found += [lp for _, lp in sampler.unpack(packed, [k] * len(logits)) if lp is not None]
        return found


def _last_rows(step: Schedule) -> list[tuple[int, Scheduled]]:
    """Packed row of each item's last token."""
    rows, end = [], 0
    for item in step.items:
        end += item.num_new_tokens
        rows.append((end - 1, item))
    return rows
