"""Which shapes a workload gives the model, and which buckets to pad them to.

Nothing is guessed about how requests share steps: the engine's own scheduler plays the workload, `concurrency` requests
in flight, and counts the tokens of every step. A decode step has as many rows as requests; a step that prefills has the
packed tokens of its prompts and of whoever decodes beside them.

    played = play(requests("uniform:16,4096/fixed:64", 500), Limits(max_model_len=8192))
    advice = advise(played, most=16)
    advice["bucketed"]["batch_buckets"], advice["bucketed"]["token_buckets"]
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surefoot.bench.buckets import Choice, choices, padding, powers_of_two, split
from surefoot.bench.workload import read_trace
from surefoot.cache.pages import BlockPool
from surefoot.cache.plan import kv_bytes_per_token, state_bytes_per_slot
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.request import Request
from surefoot.core.sampling import SamplingParams
from surefoot.engine.graphs import GraphPlan
from surefoot.engine.padding import num_dummy_blocks
from surefoot.engine.scheduler import Scheduler
from surefoot.models.base import CausalLM
from surefoot.models.registry import build
from surefoot.weights.hub import resolve
from surefoot.weights.jsonfile import read_json_object

Progress = Callable[[str, float | None], None]
TOKEN_ALIGN = 16
FORMS = "uniform:LOW,HIGH, lognormal:MEDIAN,SIGMA[,MAX] or fixed:N, and the same for outputs after a /"


@dataclass(frozen=True)
class Limits:
    """Of the engine that the workload is played on."""

    max_model_len: int
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    prefill_chunk_size: int | None = None


@dataclass
class Played:
    """Rows per step and how often: `decode` and `prefill` steps. `left_out`: requests longer than max_model_len."""

    limits: Limits
    num_requests: int
    left_out: int = 0
    prompts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    decode: Counter[int] = field(default_factory=Counter)
    prefill: Counter[int] = field(default_factory=Counter)


def requests(said: str, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt, output) tokens of a trace file's first `count` requests, or that many drawn from a distribution."""
    if Path(said).is_file():
        return [(row.prompt_tokens, row.output_tokens) for row in read_trace(Path(said), count)]
    kind = said.partition(":")[0]
    if kind not in ("uniform", "lognormal", "fixed"):
        raise InputError(f"--workload {said!r} is neither a trace file nor a distribution: {FORMS}")
    prompt, _, output = said.partition("/")
    random_lengths = random.Random(seed)
    draws = _distribution(prompt, random_lengths), _distribution(output or "fixed:128", random_lengths)
    return [(draws[0](), draws[1]()) for _ in range(count)]


def _distribution(said: str, source: random.Random) -> Callable[[], int]:
    kind, _, rest = said.partition(":")
    try:
        numbers = [float(part) for part in rest.split(",")]
        if not all(0 <= n < math.inf for n in numbers):
            raise ValueError
        if kind == "fixed" and len(numbers) == 1 and numbers[0] >= 1:
            return lambda: int(numbers[0])
        if kind == "uniform" and len(numbers) == 2 and 1 <= numbers[0] <= numbers[1]:
            return lambda: source.randint(int(numbers[0]), int(numbers[1]))
        if kind == "lognormal" and len(numbers) in (2, 3) and numbers[0] >= 1:
            most = numbers[2] if len(numbers) == 3 else math.inf
            return lambda: max(1, round(min(most, source.lognormvariate(math.log(numbers[0]), numbers[1]))))
    except ValueError:
        pass
    raise InputError(f"cannot read the distribution {said!r}: {FORMS}")


def play(
    asked: Sequence[tuple[int, int]], limits: Limits, concurrency: int | None = None, progress: Progress | None = None
) -> Played:
    """Run the scheduler over the requests, in order, without a model and without a prefix cache."""
    fitting = [(prompt, output) for prompt, output in asked if prompt + output <= limits.max_model_len]
    if not fitting:
        raise InputError(f"no request of the workload fits into max_model_len {limits.max_model_len}: raise it")
    played = Played(limits, len(fitting), len(asked) - len(fitting))
    played.prompts, played.outputs = [p for p, _ in fitting], [o for _, o in fitting]
    block = 16
    pages = -(-limits.max_model_len // block) * limits.max_num_seqs
    scheduler = Scheduler(
        BlockPool(pages + 1, block, enable_caching=False),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        prefill_chunk_size=limits.prefill_chunk_size,
    )
    flight = concurrency or limits.max_num_seqs
    waiting, live, done = list(reversed(fitting)), 0, 0
    while waiting or live:
        while waiting and live < flight:
            prompt, output = waiting.pop()
            params = SamplingParams(max_tokens=output, ignore_eos=True)
            scheduler.add(Request(f"{len(waiting)}", [0] * prompt, params))
            live += 1
        step = scheduler.schedule()
        (played.decode if step.num_decodes == len(step.items) else played.prefill)[step.num_tokens] += 1
        scheduler.advance(step)
        for item in step.items:
            if not item.samples:
                continue
            item.request.output_token_ids.append(0)
            if len(item.request.output_token_ids) == item.request.params.max_tokens:
                scheduler.finish(item.request, "length")
                live, done = live - 1, done + 1
        if progress is not None:
            progress("playing the workload", done / len(fitting))
    return played


def advise(played: Played, most: int) -> dict[str, dict[str, Any]]:
    """For dynamic, bucketed (at most `most` shapes, chosen together), powers of two, and fixed: buckets and waste."""
    limits = played.limits
    rows, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
    if most < 2:
        raise InputError(f"--max-captures must be at least 2, one shape for decode and one for prefill, got {most}")
    decode = choices(played.decode, most - 1, cover=rows)
    prefill = choices(played.prefill, most - 1, align=TOKEN_ALIGN, cover=tokens)
    best = split(decode, prefill, most)
    plain = padding(played.decode, powers_of_two(rows)), padding(played.prefill, powers_of_two(tokens))
    fixed = padding(played.decode, (rows,)), padding(played.prefill, (tokens,))
    none = (
        padding(played.decode, tuple(sorted(played.decode)) or (rows,)),
        padding(played.prefill, tuple(sorted(played.prefill))),
    )
    return {
        "dynamic": _mode(*none, padded=False),
        "bucketed": _mode(*best),
        "powers of two": _mode(*plain),
        "fixed": _mode(*fixed),
    }


def _mode(decode: Choice, prefill: Choice, padded: bool = True) -> dict[str, Any]:
    total = decode.tokens + prefill.tokens + decode.padded + prefill.padded
    return {
        "batch_buckets": list(decode.buckets) if padded else None,
        "token_buckets": list(prefill.buckets) if padded else None,
        "decode_shapes": len(decode.buckets),
        "prefill_shapes": len(prefill.buckets),
        "decode_waste": decode.waste,
        "prefill_waste": prefill.waste,
        "waste": (decode.padded + prefill.padded) / max(1, total),
    }


def _model(name: str) -> CausalLM:
    return build(read_json_object(resolve(name, config_only=True) / "config.json"))


def limits_of(model: str, config: EngineConfig) -> Limits:
    """As an engine with these settings would have them, memory permitting."""
    length = config.max_model_len or _model(model).rotary.config.max_length
    return Limits(length, config.max_num_seqs, config.max_num_batched_tokens, config.prefill_chunk_size)


def add_memory(model: str, config: EngineConfig, modes: dict[str, dict[str, Any]]) -> None:
    """`memory_bytes` of each mode: pages and state slots that only padded rows use."""
    block, dtype_bytes = config.block_size or 16, 4 if config.dtype == "float32" else 2
    specs = _model(model).state_specs()
    page = block * sum(kv_bytes_per_token(spec, dtype_bytes) for spec in specs)
    slot = sum(state_bytes_per_slot(spec, dtype_bytes) for spec in specs)
    for mode in modes.values():
        plan = GraphPlan(
            "auto",
            batch_buckets=tuple(mode["batch_buckets"] or ()),
            token_buckets=tuple(mode["token_buckets"] or ()),
        )
        mode["memory_bytes"] = num_dummy_blocks(plan, block) * page + plan.num_dummy_rows * slot
