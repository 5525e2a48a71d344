"""calibration, bench, load: what the device can do, what the engine makes of it, and what a server's clients see."""

from __future__ import annotations

from typing import Any

from surefoot.bringup.stages.base import GOOD, WARN, Record, Work

CALIBRATED = ("float32", "bfloat16", "float16")


def run_calibration(work: Work) -> Record:
    """Bandwidth, matrix peak, launch cost and small engine steps, in the dtype that the model runs in."""
    from surefoot.analyze import calibrate

    s = work.settings
    fewer: dict[str, Any] = {"prompts": (16, 128), "batches": (1, 8), "contexts": (64,)} if s.quick else {}
    settings = calibrate.Settings(
        device=s.device, variants=(variant_of(work),), threads=s.num_threads, repeats=s.calibration_repeats, **fewer
    )
    return calibrate.calibrate(settings, work.progress).as_dict()


def in_effect(work: Work) -> Record:
    """What the engine said of itself, in the answers or the proof."""
    answers, proof = work.record("answers"), work.record("proof")
    return (answers or {}).get("info") or (proof or {}).get("target") or {}


def dtype_of(work: Work) -> str:
    """The dtype in effect, else as asked for."""
    asked = work.settings.dtype
    return in_effect(work).get("dtype") or (asked if asked in CALIBRATED else "bfloat16")


def variant_of(work: Work) -> str:
    """What the linear layers compute in: the scheme of a quantised model, else the dtype."""
    scheme = (in_effect(work).get("quant") or {}).get("scheme") or work.settings.quant
    return scheme or dtype_of(work)


def calibration_outcome(record: Record) -> tuple[str, str]:
    from surefoot.analyze.numbers import amount

    notes = record.get("notes") or []
    said = f"read bandwidth {amount(record['bandwidth'][0], 'B/s')} on {record['threads']} threads"
    return (WARN, f"{said}; {notes[0]}") if notes else (GOOD, said)


def run_bench(work: Work) -> None:
    """The sweep in process; the record grows point by point and is marked partial until its end."""
    from surefoot.bench.engine import EngineSettings
    from surefoot.bench.run import bench_engine

    s = work.settings
    settings = EngineSettings(batch=s.batch, prompt_lens=s.prompt_lens, output_lens=s.output_lens, repeats=s.repeats)
    config = s.engine(max_num_seqs=max(32, *s.batch))
    bench_engine(
        s.model,
        "native",
        config,
        settings,
        work.path / "bench.json",
        named_proof(work),
        work.progress,
        **_calibrated(work),
    )


def _calibrated(work: Work) -> dict[str, Any]:
    """The peaks that this run has measured, for MFU and MBU."""
    from surefoot.analyze.calibrate import load

    if work.record("calibration") is None:
        return {}
    return {"calibrated": load(work.path / "calibration.json").peaks}


def named_proof(work: Work) -> Any:
    """This run's proof with what its own check finds, or None."""
    from surefoot.bench.run import NamedProof
    from surefoot.verify.proof import Proof

    if work.record("proof") is None:
        return None
    proof = Proof.load(work.path / "proof.json")
    return NamedProof(proof.data, "proof.json", proof.check())


def bench_outcome(record: Record) -> tuple[str, str]:
    from surefoot.analyze.numbers import seconds

    points = [p for p in record["points"] if p.get("decode")]
    if not points:
        return WARN, "no decode step was measured"
    one, most = points[0], max(points, key=lambda p: p["decode"]["tokens_per_s"])
    text = (
        f"decode step {seconds(one['decode']['step_s']['median'])} at batch {one['batch']}; "
        f"up to {most['decode']['tokens_per_s']:,.0f} tok/s at batch {most['batch']}"
    )
    warned = sum(len(p["warnings"]) for p in record["points"]) + len(record["host"]["warnings"])
    return (WARN, f"{text}; warnings: {warned}") if warned else (GOOD, text)


def run_load(work: Work) -> None:
    """The same engine behind HTTP in a process of its own, asked by this process: closed loop by concurrency."""
    from surefoot.bench.result import match_proof, plain
    from surefoot.bench.run import bench_server
    from surefoot.bench.server import ServerSettings
    from surefoot.bringup.server import served
    from surefoot.core import confighash

    s = work.settings
    work.folder.set_aside("load.measured")
    settings = ServerSettings(
        concurrency=s.concurrency,
        prompt_lens=s.prompt_lens[:1],
        output_lens=s.output_lens[-1:],
        requests=s.requests,
    )
    work.progress("starting the server", 0.0)
    measured = work.path / "load.measured.json"
    with served(work) as server:
        data = bench_server(server.url, settings, measured, progress=work.progress)
    # The benchmark sees a black box behind HTTP. Which engine answered is known here, because it was started here.
    proof = named_proof(work)
    if proof is not None:
        data["proof"] = vars(match_proof(proof.data, proof.file, server.identity, proof.complaints))
    data["served"] = {
        "config_hash": confighash.digest(server.identity),
        "config_identity": server.identity,
        "config": server.info,
    }
    measured.with_suffix(".raw.jsonl").replace(work.path / "load.raw.jsonl")
    work.folder.write("load", plain(data | {"model": s.model}))
    measured.unlink()


def load_outcome(record: Record) -> tuple[str, str]:
    best = max(record["points"], key=lambda p: p.get("output_tokens_per_s") or 0.0)
    failed = sum(p["failed"] for p in record["points"])
    text = f"up to {best.get('output_tokens_per_s') or 0:,.0f} tok/s at concurrency {best['concurrency']}"
    return (WARN, f"{text}; {failed} requests failed") if failed else (GOOD, text)
