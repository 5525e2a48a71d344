"""Settings of `--backend vllm`: what is asked for besides `EngineConfig` (flags: backends/vllm_flags.py)."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields

from surefoot.core.errors import InputError


@dataclass(frozen=True)
class VllmSettings:
    """What only `--backend vllm` has.

    vllm_executable: `vllm` on the path, or a file.  vllm_args: further flags as in a shell, handed on untouched.
    tensor_parallel_size, pipeline_parallel_size: devices per layer, groups of layers.  ray: let Ray place the workers,
    on the cluster of `ray_address` (HOST:PORT; "auto" is the one that this node is part of).
    quantization: vLLM's name of a method, such as "ascend" or "fp8"; compressed-tensors folders need none.
    gpu_memory_utilization: share of the device's memory that vLLM may take.  vllm_seed: its --seed.
    start_timeout: seconds until it must answer.  vllm_log: file of its output; None takes a temporary one.
    """

    vllm_executable: str = "vllm"
    vllm_args: str = ""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    ray: bool = False
    ray_address: str | None = None
    quantization: str | None = None
    gpu_memory_utilization: float | None = None
    vllm_seed: int = 0
    start_timeout: float = 1800.0
    vllm_log: str | None = None

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.start_timeout > 0:
            raise InputError(f"start_timeout must be positive, got {self.start_timeout:g}")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise InputError(f"gpu_memory_utilization must lie in (0, 1], got {self.gpu_memory_utilization:g}")
        if self.ray_address is not None and not self.ray:
            raise InputError("--ray-address belongs to --ray: give both")
        try:
            shlex.split(self.vllm_args)
        except ValueError as error:
            raise InputError(f"--vllm-args {self.vllm_args!r} cannot be split as a shell would: {error}") from None

    def check_unused(self, backend: str) -> None:
        """None of this may be given with another backend."""
        for field in fields(self):
            if getattr(self, field.name) != field.default:
                raise InputError(f"--{field.name.replace('_', '-')} belongs to --backend vllm, not to {backend}")
