"""Does this device compute the right thing? Both canaries answer their known questions and score stored sequences.

A canary's known answers must come out word for word (greedy, all in one batch, each ended by its end token), and its
teacher-forced logits must equal those of `transformers` (fp32, CPU), stored beside the canary by
tools/make_expected_logits.py. The logit error is the largest absolute difference divided by the range (max - min) of
the expected logits at that position.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surefoot import canaries
from surefoot.core.config import EngineConfig
from surefoot.core.errors import SurefootError
from surefoot.core.sampling import SamplingParams

if TYPE_CHECKING:
    import numpy as np

    from surefoot.engine.engine import Engine

EXPECTED_FILE = "expected_logits.npz"

# Largest logit error as a share of the logit range. Measured on a CPU: float32 2e-7, bfloat16 3e-3, float16 4e-4.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}

# Room for all answers in one batch: few long steps instead of many short ones, and a small, known cache.
MARGIN_TOKENS = 16
SIZES: dict[str, Any] = {
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "max_model_len": 1024,
    "kv_cache_tokens": 65536,
}


@dataclass(frozen=True)
class Check:
    """One line of the verdict."""

    canary: str
    dtype: str
    what: str
    passed: bool
    detail: str
    seconds: float


@dataclass(frozen=True)
class Sequence:
    """Token ids to score, and the expected logits [P, vocab] fp32 at P positions."""

    token_ids: list[int]
    positions: list[int]
    logits: np.ndarray


def expected(name: str) -> list[Sequence]:
    """The stored sequences of a canary."""
    import numpy as np

    with np.load(canaries.path(name) / EXPECTED_FILE) as file:
        return [
            Sequence(file[f"token_ids_{i}"].tolist(), file[f"positions_{i}"].tolist(), file[f"logits_{i}"])
            for i in range(int(file["count"]))
        ]


def run(
    config: EngineConfig, dtypes: tuple[str, ...], progress: Callable[[str, float | None], None] | None = None
) -> list[Check]:
    """All checks of all canaries in each dtype. What breaks in one canary does not keep the others from being tried."""
    checks: list[Check] = []
    steps = [(name, dtype) for name in canaries.CANARIES for dtype in dtypes]
    for number, (name, dtype) in enumerate(steps):
        if progress:
            progress(f"selftest {name} {dtype}", number / len(steps))
        checks += _canary(name, replace(config, dtype=dtype, **SIZES))
    return checks


def _canary(name: str, config: EngineConfig) -> list[Check]:
    from surefoot.engine.engine import Engine

    began = time.monotonic()
    try:
        engine = Engine.load(name, config)
    except SurefootError:
        raise  # an absent device or an impossible setting: one clear line, not a failed check
    except Exception as error:
        return [Check(name, config.dtype, "load", False, _brief(error), time.monotonic() - began)]
    dtype = engine.info.dtype
    return [_timed(name, dtype, what, check, engine) for what, check in (("answers", _answers), ("logits", _logits))]


def _timed(name: str, dtype: str, what: str, check: Callable[[str, Engine], tuple[bool, str]], engine: Engine) -> Check:
    began = time.monotonic()
    try:
        passed, detail = check(name, engine)
    except Exception as error:  # a kernel that fails on a new device is a finding, not the end of the test
        passed, detail = False, _brief(error)
    return Check(name, dtype, what, passed, detail, time.monotonic() - began)


def _answers(name: str, engine: Engine) -> tuple[bool, str]:
    """All known answers, greedily and word for word."""
    items = canaries.known_answers(name)
    tokenizer: Any = engine.tokenizer
    prompts = [
        tokenizer.encode_chat(i["messages"]) if "messages" in i else tokenizer.encode(i["prompt"]) for i in items
    ]
    budget = max(len(tokenizer.encode(i["answer"])) for i in items) + MARGIN_TOKENS
    done = engine.generate(prompts, SamplingParams(max_tokens=budget))
    wrong = [
        n
        for n, (i, c) in enumerate(zip(items, done, strict=True))
        if c.text != i["answer"] or c.finish_reason != "stop"
    ]
    if not wrong:
        return True, f"{len(items)} of {len(items)} exact"
    first = wrong[0]
    question = items[first].get("prompt") or items[first]["messages"][-1]["content"]
    return False, f"{len(items) - len(wrong)} of {len(items)} exact; to {question!r} it said {done[first].text[:60]!r}"


def _logits(name: str, engine: Engine) -> tuple[bool, str]:
    """Teacher-forced logits against the stored ones: error within tolerance, and the same most likely token in fp32."""
    import numpy as np

    sequences = expected(name)
    scored = engine.score([s.token_ids for s in sequences])
    worst, positions = 0.0, 0
    for sequence, logits in zip(sequences, scored, strict=True):
        ours = logits[sequence.positions].float().numpy()
        span = np.ptp(sequence.logits, axis=-1)
        error = np.abs(ours - sequence.logits).max(axis=-1) / span
        worst = max(worst, float(np.nan_to_num(error, nan=np.inf).max()))
        positions += len(sequence.positions)
    allowed = TOLERANCE[engine.info.dtype]
    detail = f"largest error {worst:.1e} of the logit range at {positions} positions, allowed {allowed:.0e}"
    return worst <= allowed, detail


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def verdict(checks: list[Check], device: str) -> tuple[bool, str]:
    """Whether all passed, and the last line: what it means and what to do next."""
    failed = [c for c in checks if not c.passed]
    seconds = sum(c.seconds for c in checks)
    if not failed:
        return True, f"PASS: {device} computes both canaries right ({len(checks)} checks, {seconds:.1f} s)"
    return False, (
        f"FAIL: {len(failed)} of {len(checks)} checks on {device}. "
        "Next: the same with --ops reference; if that passes, one of the device's op implementations is at fault"
    )
