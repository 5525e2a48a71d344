"""Graphs and padding when an engine is loaded: what the model and the device allow, and the captures themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch

from surefoot import ops
from surefoot.cache.plan import kv_bytes_per_token
from surefoot.core.config import EngineConfig
from surefoot.device import Device
from surefoot.engine.decode_graphs import DecodeGraphs, static_bytes
from surefoot.engine.graphs import GraphPlan, default_buckets, exact_buckets, plan_graphs
from surefoot.engine.padding import Padding
from surefoot.engine.runner import Runner
from surefoot.models.base import CausalLM
from surefoot.ops.cpu import kernels

Progress = Callable[[str, float | None], None]


def plan_for(model: CausalLM, config: EngineConfig, device: Device, dtype: torch.dtype, block_size: int) -> GraphPlan:
    """The graphs of this model on this device. Comes before the cache is planned, which gets what they leave."""
    max_len = config.max_model_len or model.rotary.config.max_length
    width = -(-max_len // block_size)
    specs = model.state_specs()
    kv_layer = max((kv_bytes_per_token(spec, dtype.itemsize) for spec in specs), default=0)
    kv_all = sum(kv_bytes_per_token(spec, dtype.itemsize) for spec in specs)
    widest = max((p.shape[0] for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n), default=0)
    own_attention = any(i.device == device.type for i in ops.REGISTRY["paged_attention"].implementations)

    def bytes_for(buckets: tuple[int, ...]) -> int:
        kept = sum(static_bytes(b, width) + b * (model.vocab_size * dtype.itemsize + 4) for b in buckets)
        row = 4 * model.hidden_size + 3 * widest
        if device.captures_on_use:  # every layer's results are held, there is no pool
            return kept + sum(buckets) * len(specs) * row * dtype.itemsize
        return kept + max(buckets) * (4 * row + (0 if own_attention else 2 * max_len * kv_layer))

    most_rows = None
    if not own_attention and kv_all:
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        most_rows = weights // (max_len * kv_all)
    return plan_graphs(
        config,
        no_graphs=no_graphs(device),
        stream_limit=device.capabilities.graph_streams,
        free_bytes=device.memory()[0],
        bytes_for=bytes_for,
        most_rows=most_rows,
        default=exact_buckets if device.captures_on_use else default_buckets,
    )


def no_graphs(device: Device) -> str | None:
    """Why there are none; None if there are."""
    if device.captures_on_use and kernels is None:
        return "without the C++ kernels a CPU repeats PyTorch's calls more slowly than it runs them"
    return device.no_graphs()


def install(
    runner: Runner,
    plan: GraphPlan,
    device: Device,
    max_model_len: int,
    progress: Progress | None,
    ready: Callable[[], bool],
) -> list[str]:
    """Give the runner its padding and its graphs; returns the notes for the user. `ready`: see `DecodeGraphs`."""
    padding = Padding(plan, runner.block_size)
    runner.padding = padding
    notes = []
    if plan.mode == "off" and device.capabilities.graph:
        notes.append(plan.line)
    if plan.mode == "off" and plan.batch_buckets:
        notes.append(f"decode steps are padded to batches of {_sizes(plan.batch_buckets)}, and run eagerly")
    if plan.token_buckets:
        notes.append(f"steps that prefill are padded to {_sizes(plan.token_buckets)} tokens")
    if plan.mode == "off":
        return notes
    graphs = DecodeGraphs(
        runner.model,
        device,
        plan.batch_buckets if device.captures_on_use else (),
        ready,
        max_model_len=max_model_len,
        block_size=runner.block_size,
        layers=runner.layers,
        rope=runner.length_dependent_rope,
    )
    if not device.captures_on_use:
        with ops.use(runner.ops_policy), torch.inference_mode():
            notes.append(_capture(graphs, padding, plan, device, progress))
    runner.graphs = graphs
    return notes


def _capture(graphs: DecodeGraphs, padding: Padding, plan: GraphPlan, device: Device, progress: Progress | None) -> str:
    """Capture every bucket, the largest first: smaller ones find its working memory in the pool."""
    if progress is not None:
        progress(plan.line, 0.0)
    free = device.memory()[0]
    for i, bucket in enumerate(reversed(plan.batch_buckets)):
        if progress is not None:
            progress(f"capturing graphs: batch {bucket}", i / len(plan.batch_buckets))
        graphs.capture(bucket, padding.rows(bucket))
    took = max(0, free - device.memory()[0])
    return (
        f"{graphs.captures} graphs captured in {graphs.seconds:.1f} s, {took / 2**20:.0f} MiB, "
        f"for batches of {_sizes(plan.batch_buckets)}: {plan.why}"
    )


def _sizes(buckets: tuple[int, ...]) -> str:
    return ", ".join(map(str, buckets))
