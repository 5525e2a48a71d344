"""doctor, coverage, answers: is the installation sound, are the operators there, are known answers right?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from surefoot.bringup.stages.base import BAD, GOOD, WARN, Record, Work


def run_doctor(work: Work) -> Record:
    from surefoot.bringup.doctor import examine
    from surefoot.bringup.machine import look
    from surefoot.device.probe import probe

    work.progress("looking at the installation", None)
    return examine(look(), probe, work.settings.device.partition(":")[0]).as_dict()


def doctor_outcome(record: Record) -> tuple[str, str]:
    return (GOOD if record["ready"] else BAD), record["verdict"]


def run_coverage(work: Work) -> Record:
    """Against the NPU registry whatever the device is: it says what would happen there."""
    from surefoot.analyze.check import check_operators

    work.progress("tracing the operators", None)
    settings = work.settings
    return check_operators(settings.model, "npu", dtype=settings.dtype).as_dict()


def coverage_outcome(record: Record) -> tuple[str, str]:
    fallbacks = sum(record["operators"].get("CPU fallback", {}).values())
    level = BAD if record["runs"] is False else WARN if record["runs"] is None or fallbacks else GOOD
    return level, f"on an NPU: {record['verdict']}"


def run_answers(work: Work) -> Record:
    """The canaries' known answers in the dtype in question and in fp32, then this model's own sample answers."""
    import torch

    from surefoot.bringup import selftest
    from surefoot.engine.engine import Engine

    settings = work.settings
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    work.progress("loading the model", 0.0)
    engine = Engine.load(settings.model, settings.engine())
    samples = _samples(work, engine)
    info = engine.info.as_dict()
    del engine
    dtypes = tuple(dict.fromkeys((info["dtype"], "float32")))
    config = settings.engine(random_weights=None)

    def progress(what: str, fraction: float | None) -> None:
        work.progress(what, 0.3 + 0.7 * (fraction or 0.0))

    checks = selftest.run(config, dtypes, progress)
    passed, line = selftest.verdict(checks, str(info["device"]))
    return {
        "format": "surefoot-answers/1",
        "passed": passed,
        "verdict": line,
        "checks": [asdict(c) for c in checks],
        "num_checks": len(checks),
        "num_passed": sum(c.passed for c in checks),
        "info": info,
        "samples": samples,
    }


def _samples(work: Work, engine: Any) -> Record:
    """Greedy answers to the built-in prompts."""
    from surefoot.core.sampling import SamplingParams
    from surefoot.verify.prompts import built_in

    tokenizer = engine.tokenizer
    if tokenizer is None:
        return {"items": [], "why": "the model has no tokenizer"}
    work.progress("sample answers", 0.1)
    asked = built_in(tokenizer.has_chat_template).prompts
    ids = [tokenizer.encode_chat(p.messages) if p.messages else tokenizer.encode(p.text) for p in asked]
    done = engine.generate(ids, SamplingParams(max_tokens=work.settings.sample_tokens))
    items = [
        {
            "prompt": prompt.name,
            "form": "chat template" if prompt.messages else "plain text",
            "text": completion.text,
            "prompt_tokens": len(completion.prompt_token_ids),
            "output_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        for prompt, completion in zip(asked, done, strict=True)
    ]
    return {"sampling": "greedy", "max_tokens": work.settings.sample_tokens, "items": items}


def answers_outcome(record: Record) -> tuple[str, str]:
    return (GOOD if record["passed"] else BAD), record["verdict"]
