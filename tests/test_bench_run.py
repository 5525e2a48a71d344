"""Whole benchmarks: the record, the proof that it names, and what is left when something goes wrong."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import mock_server
import pytest

from surefoot.analyze.calibrate import save
from surefoot.analyze.rates import Calibration, Variant
from surefoot.bench.engine import EngineBench, EngineSettings, check_sweep
from surefoot.bench.rawlog import read
from surefoot.bench.result import NO_PROOF, Result, match_proof, new_data
from surefoot.bench.run import bench_engine
from surefoot.bench.sizes import capacity, peaks, share
from surefoot.bench.steps import open_stepper
from surefoot.cli.main import run_cli
from surefoot.core import confighash
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.device.chips import Capabilities
from surefoot.device.cpu import CpuDevice

CANARY = "canary-llama"


@pytest.fixture(scope="module")
def mock():
    with mock_server.running() as server:
        yield server


@pytest.fixture
def bench(mock, tmp_path, capsys):
    """Run the verb against the mock; returns exit code, record, raw logs, printed text."""

    def run(*flags: str):
        path = tmp_path / "b.json"
        code = run_cli(["bench", "--url", mock.url, "-o", str(path), *flags])
        printed = capsys.readouterr()
        data = json.loads(path.read_text()) if path.is_file() else None
        logs = list(read(path.with_suffix(".raw.jsonl"))) if data else []
        return code, data, logs, printed.out + printed.err

    return run


# ---- servers


def test_a_sweep_over_concurrency(bench):
    flags = ("--model", "ttft=5,itl=1", "--concurrency", "1,4", "--prompt-len", "5,9", "--output-len", "3")
    code, data, logs, text = bench(*flags, "--requests", "6", "--warmup", "2", "--goodput", "ttft:1000", "--tools")
    assert code == 0
    assert [p["name"] for p in data["points"]] == [
        f"concurrency {c}, prompt {p}, out 3" for c in (1, 4) for p in (5, 9)
    ]
    assert not data["partial"]
    assert all(p["completed"] == 6 and p["warmup"]["requests"] == 2 for p in data["points"])
    assert len(logs) == 4 * 8
    assert {log.phase for log in logs} == {"measured", "warmup"}
    assert data["points"][0]["goodput"]["share"] == 1
    assert data["points"][0]["prompt_tokens"] == 30
    assert "UNPROVEN" in text
    assert "guidellm" in text


def test_open_loop_and_trace(bench, tmp_path):
    code, data, _, _ = bench("--model", "ttft=2,itl=1", "--rate", "200", "--arrival", "burst", "--requests", "16")
    assert (code, data["points"][0]["load"], data["points"][0]["completed"]) == (0, "open loop, burst", 16)
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{i},{5 + i},{2 + i}\n" for i in range(5)))
    code, data, logs, _ = bench("--model", "ttft=2,itl=1", "--trace", str(trace), "--trace-speed", "20")
    assert code == 0
    measured = [log for log in logs if log.phase == "measured"]
    assert [(log.prompt_tokens, log.output_tokens) for log in measured] == [(5 + i, 2 + i) for i in range(5)]
    assert [round(log.scheduled - measured[0].scheduled, 3) for log in measured] == [0, 0.05, 0.1, 0.15, 0.2]


def test_unproven_stands_in_every_output(bench, tmp_path):
    _, data, _, text = bench("--model", "ttft=1,itl=1", "--concurrency", "1", "--requests", "2", "--output-len", "2")
    header = json.loads((tmp_path / "b.raw.jsonl").read_text().splitlines()[0])
    assert "UNPROVEN" in text
    assert data["proof"]["status"] == header["proof"]["status"] == "UNPROVEN"


def test_a_server_that_fails_every_request(bench):
    code, data, logs, text = bench("--model", "fail=500", "--concurrency", "1,2,4", "--requests", "2")
    assert code == 2
    assert "failed every request: HTTP 500" in text
    assert "marked partial" in text
    assert data["partial"]
    assert len(data["points"]) == 2
    assert all(log.status == 500 for log in logs)


def test_a_server_that_hangs(bench):
    code, data, _, text = bench(
        "--model", "hang=1", "--concurrency", "2", "--requests", "2", "--warmup", "0", "--timeout", "0.3"
    )
    assert code == 2
    assert "no byte from the server for 0.3 s" in text
    assert data["points"][0]["failed"] == 2


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--prompt-len", "9000"], "exceeds the server's max_model_len of 8192"),
        (["--concurrency", "1,x"], "--concurrency '1,x': write positive numbers"),
        (["--rate", "0"], "--rate '0'"),
        (["--rate", "1", "--concurrency", "1"], "give one of the two"),
        (["--batch", "1"], "--batch belongs to a benchmark in process"),
        (["--arrival", "sometimes", "--rate", "1"], "unknown arrival pattern"),
        (["--goodput", "speed:1"], "--goodput"),
        (["--endpoint", "images"], "unknown endpoint"),
        (["--requests", "0"], "--requests must lie in"),
        (["--proof", "missing.json"], "cannot read missing.json"),
        (["-o", "nowhere/b.json"], "cannot write nowhere/b.json"),
    ],
)
def test_impossible_requests_end_in_one_line(bench, flags, says):
    code, _, _, text = bench(*flags)
    assert code == 2
    assert says in text
    assert text.count("\n") == 1


def test_unreachable(tmp_path, capsys):
    assert run_cli(["bench", "--url", "http://127.0.0.1:9", "-o", str(tmp_path / "b.json")]) == 2
    assert "cannot reach http://127.0.0.1:9" in capsys.readouterr().err
    assert run_cli(["bench"]) == 2
    assert "one of the two" in capsys.readouterr().err


def test_definitions(capsys):
    assert run_cli(["bench", "--definitions"]) == 0
    assert "(cm - c1) / (n - 1)" in capsys.readouterr().out


# ---- in process

SETTINGS = EngineSettings(batch=(1, 3), prompt_lens=(8,), output_lens=(1, 4), repeats=2, warmup=1)
CONFIG = EngineConfig(dtype="float32", max_model_len=64, kv_cache_tokens=1024, num_threads=1)


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "e.json"
    return bench_engine(CANARY, "native", CONFIG, SETTINGS, path), path


def passes(path: Path) -> list[dict]:
    lines = map(json.loads, path.with_suffix(".raw.jsonl").read_text().splitlines())
    return [line for line in lines if line["record"] == "pass"]


def test_prefill_and_decode_are_measured_by_themselves(native):
    data, path = native
    found = passes(path)
    prefill = [p for p in found if p["what"] == "prefill"]
    assert all([s[0] for s in p["steps"]] == ["prefill"] for p in prefill)
    full = [p for p in found if p["what"] == "generate" and p["batch"] == 3 and len(p["steps"]) > 1]
    assert all([s[0] for s in p["steps"]] == ["prefill", "decode", "decode", "decode"] for p in full)
    assert all(s[3] == 3 for p in full for s in p["steps"])
    first = [p for p in found if p["what"] == "settle"]
    assert found[: len(first)] == first and {p["phase"] for p in first} == {"warmup"}
    assert data["first_warmup"]["passes"] == len(first) and data["first_warmup"]["first_s"] == first[0]["wall_s"]
    assert len(found) - len(first) == (2 + 4) * 3  # shapes x (warm-up + repeats)
    turns = [len(p["steps"]) for p in found if (p["what"], p["phase"], p["batch"]) == ("generate", "measured", 3)]
    assert turns == [1, 4, 1, 4]  # output lengths 1 and 4 take turns
    point = data["points"][-1]
    assert (point["batch"], point["output_len"], point["decode"]["step_s"]["n"]) == (3, 4, 6)
    assert data["points"][0]["decode"] is None  # one token: nothing decodes
    assert point["generation_s"]["min"] >= 3 * point["decode"]["step_s"]["min"]


def test_the_record_says_what_ran(native):
    data, path = native
    assert json.loads(path.read_text())["points"][0]["batch"] == 1
    assert data["config"]["ops"]
    assert data["config"]["versions"]["torch"]
    assert data["load"]["seconds"] > 0
    assert data["memory"]["capacity"]["kv_tokens"] == 1024
    assert data["memory"]["peak_bytes"] >= data["points"][-1]["peak_memory_bytes"] > 1e7
    assert data["points"][0]["prefill"]["mfu"] is None  # this CPU's peak is unknown, and stays so
    assert data["points"][0]["power"] is None


def calibration(**changes) -> Calibration:
    linear = {1: (1e-9, 1e-9), 64: (2e-9, 2e-9)}  # seconds per weight: 2 GFLOP/s and 4 GB/s, 64 GFLOP/s
    given = {"device": "cpu", "device_name": CpuDevice().name(), "date": "today", "threads": 1, "memory": 10**9,
             "bandwidth": (1e9, 2e9), "launch": 1e-6, "variants": {"float32": Variant(linear=linear)}}  # fmt: skip
    return Calibration(**(given | changes))


def test_mfu_and_mbu_are_shares_of_a_calibration(tmp_path, capsys, monkeypatch):
    file, record = tmp_path / "calibration.json", tmp_path / "b.json"
    save(calibration(), file)
    flags = ["--dtype", "float32", "--threads", "1", "--batch", "2", "--prompt-len", "8", "--output-len", "4"]
    flags += ["--repeats", "1", "--warmup", "0", "-o", str(record)]
    assert run_cli(["bench", CANARY, *flags, "--calibration", str(file)]) == 0
    assert "64 GFLOP/s, 4 GB/s (best seen by surefoot calibrate, today, 1 threads)" in capsys.readouterr().out
    (point,) = json.loads(record.read_text())["points"]
    data = json.loads(record.read_text())
    step, memory = point["decode"]["step_s"]["median"], data["memory"]
    kv = memory["kv_cache_bytes"] / (data["config"]["num_blocks"] * data["config"]["block_size"])
    read = memory["weight_bytes"] + 2 * (8 + 4 / 2) * kv
    assert point["decode"]["mbu"] == pytest.approx(read / step / 4e9, rel=0.01)
    assert point["prefill"]["mfu"] > point["decode"]["mfu"] / 10 > 0
    monkeypatch.setattr("surefoot.analyze.calibrate.default_path", lambda device: file)
    assert run_cli(["bench", CANARY, *flags]) == 0, "the machine's own calibration is taken without being named"
    assert json.loads(record.read_text())["memory"]["peaks"]["bytes_per_s"] == pytest.approx(4e9)
    save(calibration(device_name="another"), file)
    assert run_cli(["bench", CANARY, *flags, "--calibration", str(file)]) == 2
    assert "was measured on another" in capsys.readouterr().err


def test_peaks_are_those_of_what_the_linear_layers_compute_in():
    chip = SimpleNamespace(capabilities=Capabilities(peak_flops={"bfloat16": 1.0, "int8": 2.0}, source="sheet"))
    assert peaks(chip, {"dtype": "bfloat16", "quant": {}})["flops_per_s"] == 1
    assert peaks(chip, {"dtype": "bfloat16", "quant": {"scheme": "w8a8"}})["flops_per_s"] == 2
    assert peaks(chip, {"dtype": "bfloat16", "quant": {"scheme": "w4a16"}})["flops_per_s"] == 1
    assert peaks(chip, {"dtype": "bfloat16"}, calibration().peaks)["flops_per_s"] is None, "not measured: unknown"


def test_a_tiny_budget_gives_mixed_steps_that_count_in_neither_rate():
    from surefoot.backends import open_backend

    config = EngineConfig(dtype="float32", max_model_len=64, kv_cache_tokens=1024, num_threads=1,
                          max_num_batched_tokens=10)  # fmt: skip
    done = open_stepper(open_backend("native", CANARY, config)).run([[5] * 8, [6] * 8, [7] * 8], 4)
    kinds = [s.kind for s in done.steps]
    assert "mixed" in kinds
    assert all(s.tokens == 3 for s in done.of("decode") if s.tokens == 3)
    assert len(done.ttft) == 3


def test_captures_and_compilations_inside_the_measured_passes_are_named(monkeypatch, tmp_path):
    """A stepper that captures in the warm-up of one shape and in the second measured pass of the other."""
    from surefoot.backends import open_backend

    backend = open_backend("native", CANARY, CONFIG)
    backend.engine.runner.graphs = SimpleNamespace(captures=2, run=lambda padded: None)
    stepper, passes = open_stepper(backend), []
    monkeypatch.setattr("surefoot.bench.engine.FIRST_WARMUP", 0.0)  # one pass

    def run(prompts, count, original=stepper.run):
        passes.append(count)
        if len(passes) in (2, 7):  # one before all; each shape: one of warm-up, two measured
            backend.engine.runner.graphs.captures += 1
        return original(prompts, count)

    monkeypatch.setattr(stepper, "run", run)
    settings = EngineSettings(batch=(1,), prompt_lens=(8,), output_lens=(3,), repeats=2, warmup=1)
    bench = EngineBench(stepper, backend.engine.model, backend.info(), settings, None)
    facts = confighash.identity(backend.info(), CANARY)
    with Result(tmp_path / "b.json", new_data("engine", backend.info(), facts, NO_PROOF)) as result:
        bench.run(result)
    (point,) = result.data["points"]
    assert point["prefill"]["warnings"] == []
    assert any("1 x graph capture inside the measured passes" in w for w in point["warnings"])
    assert [result.data["events"][phase]["graph capture"] for phase in ("load", "warmup", "measured")] == [2, 1, 1]


def test_transformers_backend(tmp_path):
    settings = EngineSettings(batch=(2,), prompt_lens=(8,), output_lens=(3,), repeats=1, warmup=0)
    data = bench_engine(CANARY, "transformers", EngineConfig(num_threads=1), settings, tmp_path / "t.json")
    assert data["points"][0]["decode"]["step_s"]["n"] == 2
    assert data["config"]["backend"] == "transformers"
    assert data["memory"]["capacity"] is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (EngineSettings(batch=(0,)), "batch must be positive"),
        (EngineSettings(prompt_lens=(60,), output_lens=(5,)), "65 tokens, max_model_len is 64"),
        (EngineSettings(batch=(33,), prompt_lens=(8,), output_lens=(8,)), "raise --max-num-seqs"),
        (EngineSettings(batch=(32,), prompt_lens=(40,), output_lens=(8,)), "KV cache of 1024 tokens"),
    ],
)
def test_an_impossible_sweep_is_refused_before_it_runs(settings, says):
    info = {"max_model_len": 64, "max_num_seqs": 32, "num_blocks": 65, "block_size": 16}
    with pytest.raises(InputError, match=says):
        check_sweep(settings, info)


def test_capacity_and_shares():
    held = capacity({"num_blocks": 101, "block_size": 16, "max_num_seqs": 4}, [17, 512])
    assert held["kv_tokens"] == 1600
    assert held["requests_of_length"] == {"17": 50, "512": 3}
    assert share(10.0, 2.0, 50.0) == 0.1
    assert share(10.0, 2.0, None) is None


# ---- proofs and records


def proof_of(facts: dict, **changes) -> dict:
    """A proof document of the same configuration, as `surefoot verify` writes it."""
    proof = {
        "verdict": "proven", "partial": False, "seal": "ab" * 32, "created": "2026-01-01T00:00:00+00:00",
        "settings": {"model": facts["model"], "ops": facts["ops"], "random_weights": facts["random_weights"]},
        "model": {"name": facts["model"], "files_sha256": {"config.json": facts["config_sha256"]}},
        "target": {k: facts.get(k) for k in confighash.FACTS} | {"versions": facts["versions"]},
    }  # fmt: skip
    return proof | changes


def test_a_proof_counts_for_its_own_configuration_only(native):
    facts = native[0]["config_identity"]
    good = match_proof(proof_of(facts), "p.json", facts, [])
    assert good.status == "PROVEN"
    assert good.config_hash == native[0]["config_hash"]
    target = proof_of(facts)["target"]
    for proof, complaints, newest, says in [
        (proof_of(facts, target=target | {"dtype": "bfloat16"}), [], None, "dtype float32 here, bfloat16 there"),
        (proof_of(facts, verdict="refuted"), [], None, "says refuted"),
        (proof_of(facts, partial=True), [], None, "partial evidence"),
        (proof_of(facts), ["the seal does not fit"], None, "not sound"),
        (proof_of(facts), [], 2e9, "weights were changed after"),
    ]:
        state = match_proof(proof, "p.json", facts, complaints, newest)
        assert state.status == "UNPROVEN"
        assert says in state.reason


def test_a_full_disk_keeps_what_was_written_and_says_so(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "b.json"
    path.with_suffix(".raw.jsonl").symlink_to("/dev/full")
    facts = confighash.identity({"backend": "http"}, "m")
    result = Result(path, new_data("server", {}, facts, NO_PROOF))
    with pytest.raises(InputError, match="cannot write .*no space left on device"), result:
        result.add_point({"name": "first"})
        result.write({"record": "request", "text": "x" * 100_000})
        result.add_point({"name": "second"})
    data = json.loads(path.read_text())
    assert data["partial"]
    assert "no space left" in data["ended_by"]


def test_a_disk_that_fills_up_ends_the_verb_in_one_line(tmp_path, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "b.json"
    path.with_suffix(".raw.jsonl").symlink_to("/dev/full")
    flags = ["--batch", "1,2", "--prompt-len", "8", "--output-len", "2", "--repeats", "1", "--warmup", "0"]
    assert run_cli(["bench", CANARY, *flags, "--threads", "1", "-o", str(path)]) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "no space left on device; what was measured until then is in" in line
    data = json.loads(path.read_text())
    assert data["partial"] and len(data["points"]) == 1, "the first point was done"


def test_an_interrupt_leaves_a_partial_record(tmp_path):
    facts = confighash.identity({"backend": "http"}, "m")
    result = Result(tmp_path / "b.json", new_data("server", {}, facts, NO_PROOF))
    with pytest.raises(KeyboardInterrupt), result:
        result.add_point({"name": "first"})
        raise KeyboardInterrupt
    data = json.loads((tmp_path / "b.json").read_text())
    assert (data["partial"], data["ended_by"], len(data["points"])) == (True, "interrupted", 1)


def test_the_key_is_not_recorded(monkeypatch):
    from surefoot.bench.result import command_line

    monkeypatch.setattr("sys.argv", ["/x/surefoot", "bench", "--api-key", "sk-1", "--api-key=sk-2"])
    assert "sk-" not in command_line()


def test_power_is_reported_where_the_device_tells(monkeypatch, tmp_path):
    """The CPU tells nothing; with a reading the joules per token appear."""
    from surefoot.backends import open_backend
    from surefoot.device.telemetry import Reading

    monkeypatch.setattr("surefoot.device.telemetry.read", lambda device: Reading("test", power=100.0))
    monkeypatch.setattr("surefoot.bench.engine.TELEMETRY_EVERY", 0.001)
    backend = open_backend("native", CANARY, CONFIG)
    settings = EngineSettings(batch=(1,), prompt_lens=(8,), output_lens=(20,), repeats=2, warmup=0)
    bench = EngineBench(open_stepper(backend), backend.engine.model, backend.info(), settings, None)
    with Result(tmp_path / "p.json", new_data("engine", {}, {}, NO_PROOF)) as result:
        bench.run(result)
    (point,) = result.data["points"]
    assert point["power"]["mean_w"] == pytest.approx(100.0)
    assert point["joules_per_output_token"] > 0


def test_against_our_own_server(tmp_path, capsys):
    """`surefoot serve` takes every field, names the tokens of each chunk and counts as we asked."""
    from serve_helpers import serving

    from surefoot.engine.engine import Engine

    path = tmp_path / "s.json"
    with serving(lambda: Engine.load(CANARY, CONFIG)) as served:
        flags = ["--concurrency", "1,4", "--requests", "4", "--prompt-len", "12", "--output-len", "6"]
        assert run_cli(["bench", "--url", served.base_url, "-o", str(path), *flags]) == 0
        chat = ["--endpoint", "chat", "--concurrency", "2", "--requests", "4", "--prompt-len", "40", *flags[-2:]]
        assert run_cli(["bench", "--url", served.base_url, "-o", str(tmp_path / "c.json"), *chat]) == 0
    data = json.loads(path.read_text())
    assert data["config"]["dtype"] == "float32"
    assert set(data["request"]["extra_fields"]) == {"ignore_eos", "return_token_ids"}
    for point in [*data["points"], *json.loads((tmp_path / "c.json").read_text())["points"]]:
        assert point["completed"] == 4
        assert point["output_tokens"] == 24
        assert point["tokens_counted_by"] == {"usage": 4}
        assert point["prompt_tokens"] == 4 * point["prompt_len"]
    assert all(c.tokens == 1 for log in read(path.with_suffix(".raw.jsonl")) for c in log.token_chunks)
