"""Our settings as flags of `vllm serve`, and what vLLM says of the settings in effect. Torch-free.

A setting that vLLM cannot honour is refused before anything starts; what it reports after its start is compared with
what was asked for. Tried with vLLM 0.32; the flags are those that vLLM-Ascend's versions of vLLM (0.11 and later) have.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.vllm import VllmSettings

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
# What vLLM cannot honour: field, and what to do instead.
REFUSED = {
    "prefill_chunk_size": "vLLM's limit does not hold for a request that is alone: use --max-num-batched-tokens",
    "num_state_checkpoints": "vLLM keeps recurrent states its own way",
    "ops": "vLLM has kernels of its own: --ops belongs to the native backend",
    "random_weights": "vLLM draws other weights from a seed: --vllm-args='--load-format dummy' takes its own",
    "token_buckets": "vLLM chooses them itself",
    "quant": "vLLM does not quantise this way while loading: `surefoot quantize MODEL --scheme ... -o DIR`, then DIR",
    "quant_group_size": "it belongs to --quant",
    "quant_lm_head": "it belongs to --quant",
}
# The engine's own line: "... LLM engine (v0.32.0) with config: model='...', dtype=torch.bfloat16, ..."
CONFIG_LINE = re.compile(r"LLM engine \((?P<version>v[^)]*)\) with config: (?P<config>.*)")
REPORTED = {
    "dtype": r"\bdtype=(?:torch\.)?(\w+)",
    "max_model_len": r"\bmax_seq_len=(\d+)",
    "device": r"\bdevice_config=(\w+)",
    "quantization": r"\bquantization=(\w+)",
    "enforce_eager": r"\benforce_eager=(\w+)",
    "tensor_parallel_size": r"\btensor_parallel_size=(\d+)",
    "pipeline_parallel_size": r"\bpipeline_parallel_size=(\d+)",
    "graph_mode": r"cudagraph_mode\W+CUDAGraphMode\.(\w+)",
    "kv_cache_dtype": r"\bkv_cache_dtype=(\w+)",
    "seed": r"\bseed=(\d+)",
    "enable_prefix_caching": r"\benable_prefix_caching=(\w+)",
}


def engine_flags(config: EngineConfig, vllm: VllmSettings) -> list[str]:
    """The flags that decide what is computed and how fast."""
    defaults = EngineConfig()
    for name, instead in REFUSED.items():
        if getattr(config, name) != getattr(defaults, name):
            flag = name.removeprefix("num_").replace("_", "-")
            raise InputError(f"--{flag} cannot be honoured by vLLM: {instead}")
    caching = "--enable-prefix-caching" if config.enable_prefix_caching else "--no-enable-prefix-caching"
    given: list[tuple[str, Any]] = [
        ("--dtype", config.dtype),
        ("--max-model-len", config.max_model_len),
        ("--max-num-seqs", config.max_num_seqs),
        ("--max-num-batched-tokens", config.max_num_batched_tokens),
        ("--block-size", config.block_size),
        ("--num-gpu-blocks-override", _blocks(config)),
        ("--tensor-parallel-size", vllm.tensor_parallel_size),
        ("--pipeline-parallel-size", vllm.pipeline_parallel_size),
        ("--distributed-executor-backend", "ray" if vllm.ray else None),
        ("--quantization", vllm.quantization),
        ("--gpu-memory-utilization", vllm.gpu_memory_utilization),
        ("--seed", vllm.vllm_seed),
    ]
    flags = [word for flag, value in given if value is not None for word in (flag, str(value))]
    return [*flags, caching, *_graph(config), *shlex.split(vllm.vllm_args)]


def _blocks(config: EngineConfig) -> int | None:
    if config.kv_cache_tokens is None:
        return None
    if config.block_size is None:
        raise InputError("--kv-cache-tokens becomes a number of blocks for vLLM: give --block-size too")
    return -(-config.kv_cache_tokens // config.block_size)


def _graph(config: EngineConfig) -> list[str]:
    if config.graph == "off":
        return ["--enforce-eager"]
    wanted: dict[str, Any] = {"cudagraph_mode": "FULL_DECODE_ONLY"} if config.graph == "full" else {}
    if config.batch_buckets is not None:
        wanted["cudagraph_capture_sizes"] = list(config.batch_buckets)
    return ["--compilation-config", json.dumps(wanted)] if wanted else []


def child_environment(config: EngineConfig, vllm: VllmSettings, api_key: str | None) -> dict[str, str]:
    """vLLM takes these from the environment only; the key goes this way because its flags stand in its log."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    kind, _, index = config.device.partition(":")
    if index:
        if kind not in VISIBLE:
            raise InputError(f"--device {config.device}: vLLM takes no index there, say --device {kind}")
        if vllm.tensor_parallel_size * vllm.pipeline_parallel_size > 1:
            raise InputError(f"--device {config.device} is one device, and several are to work: say --device {kind}")
        env[VISIBLE[kind]] = index
    if config.num_threads is not None:
        if kind != "cpu":
            raise InputError("--threads cannot be honoured by vLLM on a device other than cpu: leave it out")
        env |= {"OMP_NUM_THREADS": str(config.num_threads), "VLLM_CPU_OMP_THREADS_BIND": _cpus(config.num_threads)}
    if vllm.ray_address is not None:
        env["RAY_ADDRESS"] = vllm.ray_address
    if api_key is not None:
        env["VLLM_API_KEY"] = api_key
    return env


def _cpus(count: int) -> str:
    """vLLM binds each OpenMP thread to a CPU of this list."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if count > len(usable):
        raise InputError(f"--threads {count}: vLLM binds a thread to each CPU, and there are {len(usable)}")
    return ",".join(map(str, usable[:count]))


def reported(log: str) -> dict[str, Any]:
    """The settings that vLLM's log says are in effect; empty if the line is not there."""
    line = CONFIG_LINE.search(log)
    if line is None:
        return {}
    found = {name: re.search(pattern, line["config"]) for name, pattern in REPORTED.items()}
    return {"version": line["version"]} | {name: match[1] for name, match in found.items() if match}


def check_effective(config: EngineConfig, vllm: VllmSettings, effective: Mapping[str, Any]) -> None:
    """Refuse a server whose settings are not the requested ones."""
    wanted: dict[str, Any] = {
        "device": config.device.partition(":")[0],
        "dtype": None if config.dtype == "auto" else config.dtype,
        "max_model_len": config.max_model_len,
        "tensor_parallel_size": vllm.tensor_parallel_size,
        "pipeline_parallel_size": vllm.pipeline_parallel_size,
        "quantization": vllm.quantization,
        "enforce_eager": True if config.graph == "off" else None,
    }
    if config.graph == "full" and "FULL" not in effective.get("graph_mode", "FULL"):
        raise InputError(f"--graph full was asked for, vLLM runs with {effective['graph_mode']}: say --graph auto")
    for name, value in wanted.items():
        if value is not None and name in effective and str(value) != effective[name]:
            flag = name.replace("_", "-")
            raise InputError(
                f"--{flag} {value} was asked for, vLLM runs with {effective[name]}: ask for that, or mend it"
            )
