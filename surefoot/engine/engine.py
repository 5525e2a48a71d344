"""The engine: requests in, tokens out. `step()` is schedule -> run -> commit; everything else feeds or drains it.

    engine = Engine.load("canary-llama", EngineConfig(dtype="float32"))
    engine.generate([engine.tokenizer.encode("The capital of France is")], SamplingParams(max_tokens=16))

Not thread-safe: one thread owns an engine (the server gives it a worker thread of its own).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from surefoot.core.config import EngineConfig, EngineInfo
from surefoot.core.errors import InputError, StepError, SurefootError
from surefoot.core.outputs import Completion, RequestOutput, TokenLogprob
from surefoot.core.request import Request
from surefoot.core.sampling import SamplingParams
from surefoot.engine.outputs import Accumulator, OutputProcessor
from surefoot.engine.postponed import Postponed
from surefoot.engine.runner import Runner, StepResult
from surefoot.engine.sampler import check_token_ids
from surefoot.engine.scheduler import Schedule, Scheduled, Scheduler

if TYPE_CHECKING:
    from surefoot.weights.tokenizer import Tokenizer

Progress = Callable[[str, float | None], None]


@dataclass
class _Live:
    """A request that is not over, and what has been gathered for it so far."""

    request: Request
    outputs: OutputProcessor
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])
    prompt_logprobs_sent: bool = False
    logits: list[torch.Tensor] = field(default_factory=list)
    logits_rows: int = 0


class Engine:
    """One model on one device, with its cache and its scheduler. Build it with `Engine.load`."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        config: EngineConfig,
        info: EngineInfo,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        postponed: Postponed | None = None,
    ):
        self.runner, self.scheduler, self.config, self._info = runner, scheduler, config, info
        self.tokenizer, self.eos_token_ids = tokenizer, eos_token_ids
        self.postponed = Postponed() if postponed is None else postponed
        self._began = False
        self._live: dict[str, _Live] = {}
        self._ended: list[RequestOutput] = []
        self._ids = itertools.count()

    @staticmethod
    def load(
        model_ref: str,
        config: EngineConfig | None = None,
        progress: Progress | None = None,
        lazy: bool = False,
    ) -> Engine:
        """An engine for a model reference (folder, canary-..., hf:..., modelscope:...).

        lazy: on a CPU, be ready for the first token as soon as possible. The weights are then moved into memory of
        their own by the steps after it, which take longer, or by `settle`; results are the same, bit by bit.
        """
        from surefoot.engine.load import load_engine

        return load_engine(model_ref, config or EngineConfig(), progress, lazy=lazy)

    @property
    def model(self):
        return self.runner.model

    @property
    def vocab_size(self) -> int:
        return self.runner.model.vocab_size

    @property
    def max_model_len(self) -> int:
        return self.scheduler.max_model_len

    @property
    def info(self) -> EngineInfo:
        """What is in effect, with the op implementations that were chosen so far."""
        from surefoot import ops

        self._info.ops = ops.chosen()
        return self._info

    # ---- requests

    def add_request(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        score: bool = False,
    ) -> str:
        """Queue a request; returns its id. Raises InputError or CapacityError for one that can never run."""
        prompt = list(prompt_token_ids)
        bad = next((t for t in prompt if not 0 <= t < self.vocab_size), None)
        if bad is not None:
            raise InputError(f"token id {bad} is outside the model's vocabulary of {self.vocab_size}")
        check_token_ids(params, self.vocab_size)
        if params.stop and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this model folder has none: use stop_token_ids")
        request_id = request_id if request_id is not None else f"req-{next(self._ids)}"
        request = Request(request_id, prompt, params, self.eos_token_ids, score)
        self.scheduler.add(request)
        stream = self.tokenizer.stream(params.skip_special_tokens) if self.tokenizer and not score else None
        self._live[request_id] = _Live(request, OutputProcessor(request, stream, self.max_model_len))
        return request_id

    def cancel(self, request_id: str) -> None:
        """End a request; its last output, with finish_reason "abort", comes with the next step."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self.scheduler.cancel(request_id)
            self._ended.append(live.outputs.abort())

    def has_unfinished(self) -> bool:
        return bool(self._live or self._ended)

    # ---- one step

    def step(self) -> list[RequestOutput]:
        """Advance every scheduled request; returns what is new, one output per request that has something new.

        A forward pass that fails raises `StepError`: its requests are over, and the next step serves the others.
        """
        if self._began:
            self.postponed.advance()
        outputs, self._ended = self._ended, []
        schedule = self.scheduler.schedule()
        if not schedule.items:
            return outputs
        self._began = True
        try:
            result = self.runner.run(schedule)
        except BaseException as error:
            self._ended = outputs
            ended = self._abandon(schedule)
            if isinstance(error, Exception) and not isinstance(error, SurefootError):
                raise StepError(ended, error) from error
            raise
        self.scheduler.advance(schedule)
        for item in schedule.items:
            output = self._commit(item, result)
            if output is not None:
                outputs.append(output)
        return outputs

    def _abandon(self, schedule: Schedule) -> list[str]:
        """The forward failed: end its requests, so that the engine stays consistent; returns their ids."""
        ended = [item.request.request_id for item in schedule.items]
        for item in schedule.items:
            self.scheduler.finish(item.request, "error")
            self._live.pop(item.request.request_id, None)
        self.scheduler.advance(schedule)
        return ended

    def _commit(self, item: Scheduled, result: StepResult) -> RequestOutput | None:
        request = item.request
        live = self._live.get(request.request_id)
        if live is None:
            return None
        self._gather(live, item, result)
        if request.score:
            return self._finish(live, live.outputs.scored()) if item.final else None
        if not item.samples:
            return None
        token, logprob = result.tokens[request.request_id]
        if token >= 0:
            request.output_token_ids.append(token)
        output = live.outputs.process(token, logprob)
        if request.params.prompt_logprobs is not None and not live.prompt_logprobs_sent:
            live.prompt_logprobs_sent = True
            output.prompt_logprobs = live.prompt_logprobs
        return self._finish(live, output) if output.finished else output

    def _finish(self, live: _Live, output: RequestOutput) -> RequestOutput:
        self.scheduler.finish(live.request, output.finish_reason or "stop")
        if not live.request.score:
            del self._live[live.request.request_id]
        return output

    def _gather(self, live: _Live, item: Scheduled, result: StepResult) -> None:
        """Keep what the prompt's rows gave. After a preemption the same rows come again; they are taken once."""
        rows = result.prompt_logprobs.get(item.request.request_id)
        if rows is not None and item.start + 1 == len(live.prompt_logprobs):
            live.prompt_logprobs += rows
        logits = result.logits.get(item.request.request_id)
        if logits is not None and item.start == live.logits_rows:
            live.logits += logits
            live.logits_rows += sum(map(len, logits))

    # ---- conveniences that run to the end

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Run these prompts to the end, together; results in the order given."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InputError(f"{len(prompts)} prompts but {len(each)} sampling parameters")
        ids = [self.add_request(prompt, p) for prompt, p in zip(prompts, each)]
        collect = {i: Accumulator(i, list(prompt), started=time.monotonic()) for i, prompt in zip(ids, prompts)}
        while any(not c.finished for c in collect.values()):
            for output in self.step():
                if output.request_id in collect:
                    collect[output.request_id].add(output)
        return [collect[i].completion() for i in ids]

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Teacher-forced logits: for each sequence [T, vocab] fp32 on the host; row t predicts token t + 1."""
        params = SamplingParams(max_tokens=1)
        ids = [self.add_request(sequence, params, score=True) for sequence in sequences]
        waiting = set(ids)
        while waiting:
            for output in self.step():
                if output.finished:
                    waiting.discard(output.request_id)
        return [_join(self._live.pop(i).logits) for i in ids]

    def settle(self, progress: Progress | None = None) -> None:
        """Finish what a lazy load left for later, before times are measured."""
        self.postponed.finish(progress)

    def stats(self) -> dict[str, int]:
        return self.scheduler.stats()


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    """torch.cat that gives each part's memory back once it is copied: rows over a large vocabulary are big."""
    if len(parts) == 1:
        return parts[0]
    out = torch.empty(sum(map(len, parts)), *parts[0].shape[1:])
    row = 0
    while parts:
        part = parts.pop(0)
        out[row : row + len(part)] = part
        row += len(part)
    return out
