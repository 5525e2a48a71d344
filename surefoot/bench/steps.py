"""Backends driven step by step, each step timed with the device synchronised before and after it.

prefill   every sequence of the step is still working on its prompt (or finishes it here)
decode    every sequence of the batch extends its answer by one token
mixed     some decode while others still prefill; belongs to neither rate and is reported as such
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from surefoot.core.sampling import SamplingParams

if TYPE_CHECKING:
    from surefoot.backends.native import NativeBackend
    from surefoot.backends.transformers import TransformersBackend
    from surefoot.device import Device

Prompts = Sequence[list[int]]


@dataclass(frozen=True)
class Step:
    """kind, when it began (monotonic), seconds, tokens that it brought out."""

    kind: str
    begin: float
    seconds: float
    tokens: int


@dataclass
class Pass:
    """B prompts from their first step to their last. ttft: seconds from the begin of the pass, by sequence."""

    steps: list[Step] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    preemptions: int = 0
    cached_tokens: int = 0

    def seconds(self, kind: str) -> float:
        return sum(s.seconds for s in self.steps if s.kind == kind)

    def of(self, kind: str) -> list[Step]:
        return [s for s in self.steps if s.kind == kind]

    @property
    def wall(self) -> float:
        """From the begin of the first step to the end of the last, what lies between them included."""
        return self.steps[-1].begin + self.steps[-1].seconds - self.steps[0].begin


class Stepper(Protocol):
    """A model that runs `len(prompts)` sequences together and answers each with `num_tokens` greedy tokens."""

    device: Device
    vocab_size: int

    def run(self, prompts: Prompts, num_tokens: int) -> Pass: ...


class NativeSteps:
    """Surefoot's engine: scheduling, sampling and the text of the tokens are inside the timed step."""

    def __init__(self, backend: NativeBackend):
        from surefoot.device import get_device

        self.engine = backend.engine
        self.device, self.vocab_size = get_device(self.engine.info.device), backend.vocab_size

    def run(self, prompts: Prompts, num_tokens: int) -> Pass:
        engine, result = self.engine, Pass()
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        before = engine.stats()["preemptions"]
        ids = [engine.add_request(prompt, params) for prompt in prompts]
        begun: set[str] = set()
        try:
            while engine.has_unfinished():
                step, outputs = self._step(len(begun) == len(ids))
                decoding = any(o.request_id in begun for o in outputs)
                if step.kind == "prefill" and decoding:
                    step = Step("mixed", step.begin, step.seconds, step.tokens)
                result.steps.append(step)
                for output in outputs:
                    if output.request_id not in begun:
                        begun.add(output.request_id)
                        result.ttft.append(step.begin + step.seconds - result.steps[0].begin)
                        result.cached_tokens += output.num_cached_tokens
        except BaseException:
            for request_id in ids:
                engine.cancel(request_id)
            raise
        result.preemptions = engine.stats()["preemptions"] - before
        return result

    def _step(self, all_begun: bool) -> tuple[Step, list[Any]]:
        self.device.synchronize()
        begin = time.monotonic()
        outputs = self.engine.step()
        self.device.synchronize()
        seconds = time.monotonic() - begin
        return Step("decode" if all_begun else "prefill", begin, seconds, len(outputs)), outputs


class TransformersSteps:
    """transformers' own forward with its cache, prompts of one length (its best case), greedy choice on the host."""

    def __init__(self, backend: TransformersBackend):
        from surefoot.device import get_device

        self.model, self.vocab_size = backend.model, backend.vocab_size
        self.device = get_device(str(backend.device))

    def run(self, prompts: Prompts, num_tokens: int) -> Pass:
        import torch

        result, cache = Pass(), None
        feed = torch.tensor(prompts, device=self.device.torch_device)
        for i in range(num_tokens):

            def forward(feed=feed, cache=cache):
                with torch.inference_mode():
                    out = self.model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    chosen = out.logits[:, -1].argmax(-1)
                    return out.past_key_values, chosen, chosen.tolist()

            step, (cache, chosen, _) = self._timed("decode" if i else "prefill", len(prompts), forward)
            result.steps.append(step)
            feed = chosen[:, None]
        result.ttft = [result.steps[0].seconds] * len(prompts)
        return result

    def _timed(self, kind: str, tokens: int, work: Callable[[], Any]) -> tuple[Step, Any]:
        self.device.synchronize()
        begin = time.monotonic()
        out = work()
        self.device.synchronize()
        return Step(kind, begin, time.monotonic() - begin, tokens), out


def open_stepper(backend: Any) -> Stepper:
    return NativeSteps(backend) if backend.name == "native" else TransformersSteps(backend)
