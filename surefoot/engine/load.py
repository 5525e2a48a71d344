"""From a model reference and settings to a running engine: resolve, read, build, fill, plan, allocate."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

import torch

from surefoot.cache.pages import BlockPool
from surefoot.cache.plan import CachePlan, plan
from surefoot.cache.states import StatePool
from surefoot.core import collector
from surefoot.core.config import EngineConfig, EngineInfo
from surefoot.core.errors import InputError, ModelError
from surefoot.core.request import Request
from surefoot.device import Device, get_device
from surefoot.engine import graph_setup, quantised
from surefoot.engine.engine import Engine
from surefoot.engine.graphs import GraphPlan
from surefoot.engine.padding import num_dummy_blocks
from surefoot.engine.postponed import Postponed
from surefoot.engine.runner import Runner
from surefoot.engine.scheduler import Scheduler
from surefoot.models.base import CausalLM
from surefoot.models.registry import build
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.fingerprint import fingerprint
from surefoot.weights.hub import resolve
from surefoot.weights.load import LoadReport, load_weights, random_weights
from surefoot.weights.tokenizer import Tokenizer

Progress = Callable[[str, float | None], None]

# Share of the free memory that the cache may take unless told otherwise. A CPU's memory belongs to others too.
CACHE_SHARE = {"cpu": 0.25}
DEFAULT_CACHE_SHARE = 0.85
TINY_PARAMETERS = 16_000_000


def load_engine(
    model_ref: str,
    config: EngineConfig,
    progress: Progress | None = None,
    device: Device | None = None,
    lazy: bool = False,
) -> Engine:
    """See `Engine.load`. `device`: one that is at hand already, in place of config.device."""
    device = device or get_device(config.device)
    with device.loading(), collector.paused():
        return _load(model_ref, config, progress, device, lazy and device.type == "cpu")


def _load(model_ref: str, config: EngineConfig, progress: Progress | None, device: Device, lazy: bool) -> Engine:
    scheme = quantised.scheme_of(config)
    folder = resolve(model_ref, progress=progress)
    checkpoint = Checkpoint(folder)
    model = build(checkpoint.config)
    num_parameters = quantised.count_parameters(model)
    converter = quantised.on_load(model, scheme, config.quant_lm_head)
    set_threads(num_parameters, config, device)
    dtype, note = device.resolve_dtype(config.dtype, checkpoint_dtype(checkpoint.config))
    notes = [*device.notes, note] if note else [*device.notes]
    if config.random_weights is not None:
        report = random_weights(model, config.random_weights, device.torch_device, dtype, progress, converter)
        notes.append(f"random weights, seed {config.random_weights}: the text is meaningless")
    else:
        report = load_weights(model, checkpoint, device.torch_device, dtype, progress, converter, lazy)
    # Not beside the reading: both map memory, and each waits for the other's page faults (measured: 1.6 s, not 1.2 s).
    tokenizer = Tokenizer.try_load(folder)
    report.mapped.wait(progress)
    if tokenizer is None:
        notes.append("no tokenizer in the model folder: token ids only")
    block_size = choose_block_size(config, device)
    graphs = graph_setup.plan_for(model, config, device, dtype, block_size)
    moving = report.unmoved
    cache = plan_cache(model, config, device, dtype, block_size, graphs, sum(piece.nbytes for piece in moving))
    runner = Runner(
        model,
        cache,
        block_size=block_size,
        dtype=dtype,
        device=device.torch_device,
        ops_policy=config.ops,
        check=report.mapped.check,
    )
    work = [*(piece.move for piece in moving), *([report.mapped.moved] if moving else [])]
    postponed = Postponed(("moving weights into memory", piece) for piece in work)
    notes += graph_setup.install(runner, graphs, device, cache.max_model_len, progress, lambda: not postponed)
    scheduler, caching = make_scheduler(model, cache, config, block_size)
    info = describe(model_ref, model, device, dtype, report, cache, config, block_size, caching, notes + cache.notes)
    info.graph, info.batch_buckets, info.token_buckets = graphs.mode, graphs.batch_buckets, graphs.token_buckets
    info.num_parameters, info.quant = num_parameters, quantised.describe(model, converter)
    info.weights_digest = fingerprint(checkpoint) if config.random_weights is None else None
    eos = tokenizer.eos_token_ids if tokenizer is not None else eos_of(checkpoint.config)
    return Engine(runner, scheduler, config, info, tokenizer, eos, postponed)


def set_threads(num_parameters: int, config: EngineConfig, device: Device) -> None:
    """Threads of torch's CPU pool: as asked, else one for a tiny model (it gains nothing from more)."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif device.type == "cpu" and num_parameters < TINY_PARAMETERS:
        torch.set_num_threads(1)


def checkpoint_dtype(config: dict) -> torch.dtype:
    """The dtype that a config.json names; fp32 if it names none."""
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None and isinstance(config.get("text_config"), dict):
        return checkpoint_dtype(config["text_config"])
    dtype = getattr(torch, str(name or "float32").removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ModelError(f"config.json: unknown dtype {name!r}; pass --dtype")
    return dtype


def eos_of(config: dict) -> frozenset[int]:
    """End-of-sequence ids of a config without a tokenizer."""
    eos = config.get("eos_token_id", (config.get("text_config") or {}).get("eos_token_id"))
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else eos)


def choose_block_size(config: EngineConfig, device: Device) -> int:
    block_size = config.block_size or device.capabilities.block_size
    alignment = device.capabilities.block_alignment
    if block_size % alignment:
        raise InputError(f"block_size {block_size} must be a multiple of {alignment} on {device}")
    return block_size


def plan_cache(
    model: CausalLM,
    config: EngineConfig,
    device: Device,
    dtype: torch.dtype,
    block_size: int,
    graphs: GraphPlan,
    unmoved_bytes: int = 0,
) -> CachePlan:
    """unmoved_bytes: of weights that will still want memory of their own."""
    free = device.memory()[0] - graphs.memory_bytes - unmoved_bytes
    checkpoints = config.num_state_checkpoints if config.enable_prefix_caching else 0
    return plan(
        model.state_specs(),
        dtype_bytes=dtype.itemsize,
        max_model_len=config.max_model_len,
        model_max_len=model.rotary.config.max_length,
        max_num_seqs=config.max_num_seqs,
        block_size=block_size,
        kv_cache_tokens=config.kv_cache_tokens,
        num_checkpoints=checkpoints,
        budget_bytes=int(free * CACHE_SHARE.get(device.type, DEFAULT_CACHE_SHARE)),
        num_dummy_blocks=num_dummy_blocks(graphs, block_size),
        num_dummy_slots=graphs.num_dummy_rows,
    )


def make_scheduler(model: CausalLM, cache: CachePlan, config: EngineConfig, block_size: int) -> tuple[Scheduler, str]:
    """The scheduler, and a line that says what prefix caching does."""
    states = None
    if cache.num_slots:
        dummies = cache.num_dummy_slots
        states = StatePool(cache.num_slots - dummies, cache.num_checkpoints, dummies)
    rope = model.rotary.config

    def cacheable(request: Request, end: int) -> bool:
        # NOTE: beyond the trained length, keys under a length-dependent rope differ from prompt to prompt.
        return max(end, request.num_prompt_tokens) <= rope.max_position_embeddings

    scheduler = Scheduler(
        BlockPool(cache.num_blocks, block_size, config.enable_prefix_caching, cache.num_dummy_blocks),
        states,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=cache.max_model_len,
        prefill_chunk_size=config.prefill_chunk_size,
        cacheable=cacheable if rope.depends_on_length else None,
    )
    if not config.enable_prefix_caching:
        return scheduler, "off"
    if states is None:
        return scheduler, "on"
    if not cache.num_checkpoints:
        return scheduler, "off: a recurrent state can only be reused from checkpoints, and there are none"
    return scheduler, f"on, from {cache.num_checkpoints} checkpoints of the recurrent state"


def describe(
    model_ref: str,
    model: CausalLM,
    device: Device,
    dtype: torch.dtype,
    report: LoadReport,
    cache: CachePlan,
    config: EngineConfig,
    block_size: int,
    caching: str,
    notes: list[str],
) -> EngineInfo:
    return EngineInfo(
        model=model_ref,
        architecture=model.architecture,
        device=str(device),
        device_name=device.name(),
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=0,
        weight_bytes=report.bytes,
        max_model_len=cache.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=block_size,
        num_blocks=cache.num_blocks,
        num_dummy_blocks=cache.num_dummy_blocks,
        kv_cache_bytes=cache.kv_bytes,
        state_bytes=cache.state_bytes,
        prefix_caching=caching,
        num_threads=torch.get_num_threads(),
        notes=notes,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("surefoot", "torch", "transformers", "tokenizers", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
