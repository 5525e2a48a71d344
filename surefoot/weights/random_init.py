"""Random weights at a model's true shapes: run any config without a weights file.

A parameter depends on (seed, its name) only: not on the order, the device, the number of threads, or the dtype it is
held in (numbers are drawn in fp32 on the CPU and then rounded), so two engines given the same seed hold the same model.
"""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import as_completed
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn

from surefoot.device import hugepages
from surefoot.weights.assign import (
    CONVERT_BYTES,
    Converter,
    LoadReport,
    Progress,
    held_dtype,
    place,
    place_converted,
    tensor_slots,
    tie,
)
from surefoot.weights.workers import count, workers

BUFFER_ELEMENTS = 4 << 20
SMALL_ELEMENTS = 64 << 10


def random_weights(
    model: Any,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress | None = None,
    converter: Converter | None = None,
) -> LoadReport:
    """Fill `model` through `model.init_weight(name, tensor, generator)`.

    NOTE: a tensor of more than 64 Ki elements is handed to `init_weight` in slices along its first dimension, one after
    the other with the same generator; what `init_weight` does must not depend on how many rows it sees.
    """
    started = time.monotonic()
    # What is tied to another tensor has none of its own, unless it is converted.
    own = {name: name for name in tensor_slots(model) if name not in model.tied}
    own |= {alias: name for alias, name in model.tied.items() if converter and converter.takes(alias)}
    slots = {name: slot for name, slot in tensor_slots(model).items() if name in own}
    total = sum(slot.numel() for slot in slots.values()) or 1
    report = LoadReport(used=len(slots))
    done = 0
    # Drawing is single-threaded inside torch, tensors are independent; the largest first, so that none is left over.
    order = sorted(slots, key=lambda name: -slots[name].numel())
    buffers: SimpleQueue[torch.Tensor] = SimpleQueue()
    for _ in range(count()):
        buffers.put(torch.empty(BUFFER_ELEMENTS))

    def fill(name: str) -> tuple[str, torch.Tensor | nn.Module]:
        convert = converter is not None and converter.takes(name)
        buffer = buffers.get()
        try:
            where = "cpu" if convert else device
            tensor = hugepages.empty(slots[name].shape, held_dtype(model, name, slots[name], dtype), where)
            draw(model, own[name], tensor, seed, buffer)
        finally:
            buffers.put(buffer)
        if not convert:
            return name, tensor
        assert converter is not None
        layer = model.get_submodule(name.rpartition(".")[0])
        rows = max(1, CONVERT_BYTES // (tensor.shape[1] * tensor.itemsize))
        return name, converter.convert(name, layer, tensor.split(rows), device)

    with workers() as pool:
        for future in as_completed([pool.submit(fill, name) for name in order]):
            name, made = future.result()
            if isinstance(made, torch.Tensor):
                place(model, name, made)
                report.bytes += made.nbytes
            else:
                assert converter is not None
                report.bytes += place_converted(model, converter, name, made)
            done += slots[name].numel()
            if progress:
                progress("drawing random weights", done / total)
    tie(model)
    model.finalize()
    report.seconds = time.monotonic() - started
    return report


@torch.no_grad()
def draw(model: Any, name: str, tensor: torch.Tensor, seed: int, buffer: torch.Tensor) -> None:
    """Fill one tensor, as many rows at a time as fit into `buffer`; integers and what is small in one go."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if not tensor.is_floating_point() or tensor.numel() <= SMALL_ELEMENTS:
        scratch = torch.empty(tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)
        model.init_weight(name, scratch, generator)
        tensor.copy_(scratch)
        return
    row = tensor[0].numel()
    rows = max(1, buffer.numel() // row)
    if row > buffer.numel():
        buffer = torch.empty(row)
    for begin in range(0, tensor.shape[0], rows):
        part = tensor[begin : begin + rows]
        scratch = buffer[: part.numel()].view(part.shape)
        model.init_weight(name, scratch, generator)
        part.copy_(scratch)
