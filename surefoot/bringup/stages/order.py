"""The stages in the order in which they run. Torch-free."""

from __future__ import annotations

from surefoot.bringup.settings import BringupSettings
from surefoot.bringup.stages import checks, explain, measure, prove, publish
from surefoot.bringup.stages.base import Stage


def _model(verb: str, *more: str):
    return lambda s: ["surefoot", verb, s.model, *s.flags(), *more]


def _numbers(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


def _bench(s: BringupSettings) -> list[str]:
    sweep = ["--batch", _numbers(s.batch), "--prompt-len", _numbers(s.prompt_lens)]
    sweep += ["--output-len", _numbers(s.output_lens), "--repeats", str(s.repeats)]
    return [
        "surefoot",
        "bench",
        s.model,
        *s.flags(),
        *sweep,
        "--calibration",
        "calibration.json",
        "--proof",
        "proof.json",
    ]


def _load(s: BringupSettings) -> list[str]:
    sweep = ["--concurrency", _numbers(s.concurrency), "--prompt-len", _numbers(s.prompt_lens[:1])]
    sweep += ["--output-len", _numbers(s.output_lens[-1:])]
    sweep += [] if s.requests is None else ["--requests", str(s.requests)]
    return ["surefoot", "bench", "--url", "http://127.0.0.1:8000", *sweep]


def _calibrate(s: BringupSettings) -> list[str]:
    threads = [] if s.num_threads is None else ["--threads", str(s.num_threads)]
    repeats = ["--repeats", str(s.calibration_repeats)]
    return ["surefoot", "calibrate", "--device", s.device, *threads, *repeats, "-o", "calibration.json"]


def _estimate(s: BringupSettings) -> list[str]:
    sweep = ["--batch", _numbers(s.batch), "--length", _numbers(s.prompt_lens)]
    return ["surefoot", "estimate", s.model, "--chip", "calibration.json", *sweep]


STAGES: tuple[Stage, ...] = (
    Stage(
        "doctor",
        checks.run_doctor,
        checks.doctor_outcome,
        lambda s: ["surefoot", "doctor", "--device", s.device.partition(":")[0]],
        seconds=4,
    ),
    Stage("coverage", checks.run_coverage, checks.coverage_outcome, lambda s: ["surefoot", "ops", s.model], seconds=4),
    Stage(
        "answers",
        checks.run_answers,
        checks.answers_outcome,
        lambda s: ["surefoot", "selftest", "--device", s.device],
        seconds=12,
    ),
    Stage("proof", prove.run_proof, prove.proof_outcome, _model("verify", "-o", "proof.json"), seconds=25),
    Stage("calibration", measure.run_calibration, measure.calibration_outcome, _calibrate, seconds=20),
    Stage("bench", measure.run_bench, measure.bench_outcome, _bench, needs=("proof", "calibration"), seconds=20),
    Stage("load", measure.run_load, measure.load_outcome, _load, needs=("proof",), seconds=15),
    Stage(
        "estimate",
        explain.run_estimate,
        explain.estimate_outcome,
        _estimate,
        needs=("calibration", "bench"),
        seconds=8,
    ),
    Stage(
        "audit",
        explain.run_audit,
        explain.audit_outcome,
        lambda s: ["surefoot", "audit", "claims.json"],
        needs=("calibration", "bench", "estimate"),
        seconds=5,
    ),
    Stage(
        "report",
        publish.run_report,
        publish.report_outcome,
        lambda s: ["surefoot", "bringup", "--resume", "."],
        needs=("doctor", "coverage", "answers", "proof", "calibration", "bench", "load", "estimate", "audit"),
        seconds=8,
    ),
)
BY_NAME = {stage.name: stage for stage in STAGES}
