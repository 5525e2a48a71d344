"""Two small random models and the engine steps that a calibration times: big enough to leave the caches of a CPU, small
enough for a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from surefoot import ops
from surefoot.analyze.roofline import OpCall, Step, decode_step, describe_call, prefill_steps
from surefoot.core.sampling import SamplingParams
from surefoot.device.base import Device
from surefoot.engine.engine import Engine
from surefoot.ops.spec import OpSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size")


def models(scale: int) -> list[dict[str, Any]]:
    """The probe configs, `scale` times narrower."""
    return [{k: v // scale if k in WIDTHS else v for k, v in config.items()} for config in (LLAMA, QWEN)]


def plan(prompts: Sequence[int], batches: Sequence[int], contexts: Sequence[int]) -> Iterator[tuple[str, Step]]:
    """(phase, step) of everything that is timed."""
    for prompt in prompts:
        yield "prefill", prefill_steps(prompt, prompt)[0]
    for context in contexts:
        for batch in batches:
            yield "decode", decode_step(batch, context)


def run(engine: Engine, phase: str, step: Step) -> float:
    """Wall seconds of this step, brought about by requests of these lengths; the engine is empty before and after."""
    if phase == "prefill":
        return prefill(engine, step)
    with decoding(engine, step):
        return timed(engine)


def seconds(engine: Engine, phase: str, step: Step, repeats: int, ops_too: OpTimes | None = None) -> list[float]:
    """The same `repeats` times, after once for warming up. Decode steps follow each other, so contexts grow by one.

    ops_too: gets the op calls of one more such step, which is not in the result.
    """
    watched = ops_too.watch() if ops_too is not None else None
    if phase == "prefill":
        found = [prefill(engine, step) for _ in range(repeats + 1)][1:]
        if watched is not None:
            with watched:
                prefill(engine, step)
        return found
    with decoding(engine, step):
        found = [timed(engine) for _ in range(repeats + 1)][1:]
        if watched is not None:
            with watched:
                timed(engine)
        return found


def prefill(engine: Engine, step: Step) -> float:
    params = SamplingParams(max_tokens=1, ignore_eos=True, temperature=0.0)
    for i, length in enumerate(step.seq_lens):
        engine.add_request(prompt(engine, i, length), params)
    took = timed(engine)
    while engine.has_unfinished():
        engine.step()
    return took


@contextmanager
def decoding(engine: Engine, step: Step) -> Iterator[list[str]]:
    """Requests that have their first token, so that the engine's next step is `step`. Cancelled at the end."""
    room = engine.info.max_model_len - max(step.seq_lens) + 1
    params = SamplingParams(max_tokens=room, ignore_eos=True, temperature=0.0)
    lengths = [max(1, length - 1) for length in step.seq_lens]
    ids = [engine.add_request(prompt(engine, i, length), params) for i, length in enumerate(lengths)]
    begun: set[str] = set()
    try:
        while len(begun) < len(ids):
            begun |= {output.request_id for output in engine.step()}
        yield ids
    finally:
        drop(engine, ids)


def op_seconds(engine: Engine, device: Device, phase: str, step: Step) -> OpTimes:
    """Every op call of this step, timed by itself."""
    times = OpTimes(device)
    if phase == "prefill":
        with times.watch():
            prefill(engine, step)
        return times
    with decoding(engine, step), times.watch():
        timed(engine)
    return times


def drop(engine: Engine, ids: Sequence[str]) -> None:
    """End these requests."""
    for request_id in ids:
        engine.cancel(request_id)
    if engine.has_unfinished() and not engine.scheduler.has_unfinished():
        engine.step()


def prompt(engine: Engine, index: int, length: int) -> list[int]:
    return [(7 * index + 13 * j) % engine.vocab_size for j in range(length)]


def timed(engine: Engine) -> float:
    started = time.perf_counter()
    engine.step()
    return time.perf_counter() - started


@dataclass
class OpTimes:
    """Every op call of a block with its seconds, waiting for the device after each:

    with OpTimes(device).watch() as times: engine.step()
    """

    device: Device
    calls: list[tuple[OpCall, float]] = field(default_factory=list)

    def watch(self):
        return ops.intercept(self._time)

    def _time(self, spec: OpSpec, args: tuple, kwargs: dict, run: Callable[[], Any]) -> Any:
        self.device.synchronize()
        started = time.perf_counter()
        result = run()
        self.device.synchronize()
        seconds = time.perf_counter() - started
        self.calls.append((describe_call(spec, args, kwargs, result), seconds))
        return result

    def by_class(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for call, seconds in self.calls:
            found[call.op_class] = found.get(call.op_class, 0.0) + seconds
        return found
