"""Fill a model that was built on the meta device from a checkpoint (`random_weights`: without one).

Loading is strict: each tensor of the checkpoint is used or matches one of `model.ignored`, each parameter and
persistent buffer of the model is filled, shapes agree; otherwise one error lists all that is wrong, nothing is loaded.

Memory: parameters are ordinary memory in the dtype they are held in, read straight from the file by all threads; where
the dtype differs, through a small buffer of each thread's, onto another device through one of 16 MB. The peak is the
weights as held plus the buffers. A `Converter` takes weights row by row to hold them quantised; the peak is then the
quantised weights plus some buffers. An embedding on a CPU stays in its file (mapped.py), other weights, if wanted, for
the beginning (moving.py).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surefoot.core.errors import ModelError
from surefoot.device import hugepages
from surefoot.weights import mapped, moving
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
from surefoot.weights.checkpoint import CHUNK_BYTES, Checkpoint
from surefoot.weights.header import TensorInfo
from surefoot.weights.messages import some
from surefoot.weights.random_init import random_weights
from surefoot.weights.reader import read, spans
from surefoot.weights.workers import count as num_workers
from surefoot.weights.workers import workers

__all__ = ["LoadReport", "Progress", "load_weights", "random_weights"]

CAST_BYTES = 32 << 20  # a thread's share of a tensor that is held in another dtype
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Plan:
    """Which checkpoint tensor fills which model tensor; tied aliases that the file holds although it need not."""

    sources: dict[str, str]  # checkpoint tensor -> model tensor
    aliases: dict[str, str]  # checkpoint tensor -> model tensor that it must equal
    ignored: dict[str, int]

    def targets(self) -> dict[str, str]:
        return {**self.sources, **self.aliases}


def load_weights(
    model: Any,
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress | None = None,
    converter: Converter | None = None,
    lazy: bool = False,
) -> LoadReport:
    """Fill `model` from `checkpoint`. `dtype` is the default; `model.param_dtype` may hold some tensors otherwise.

    lazy: on a CPU, leave in their files what can be used there; `report.unmoved` is then to be moved into memory.
    """
    started = time.monotonic()
    plan = match(model, checkpoint)
    report = LoadReport(used=len(plan.targets()), ignored=plan.ignored)
    converted = _to_convert(model, plan, converter)
    plain = {source: name for source, name in plan.sources.items() if name not in converted}
    on_cpu = torch.device(device).type == "cpu"
    held = _held(model, plain, checkpoint, dtype)
    left = _left(model, plain, checkpoint, held, converted, lazy) if on_cpu else {}
    infos = {source: checkpoint.info(source) for source in left}
    there = {source: report.mapped.map(infos[source]) for source, move in left.items() if not move}
    there |= report.mapped.map_all({source: infos[source] for source, move in left.items() if move})
    tensors = {s: hugepages.empty(checkpoint.info(s).shape, d, device) for s, d in held.items() if s not in left}
    count = _counter(sum(checkpoint.info(source).nbytes for source in (*tensors, *converted.values())), progress)
    with workers() as pool:
        jobs = _reading(pool, checkpoint, tensors) if on_cpu else {}
        layers = {
            pool.submit(_convert, model, checkpoint, device, converter, name, source): name
            for name, source in converted.items()
        }
        if not on_cpu:
            _read_in_turn(checkpoint, tensors, count)
        for future in as_completed([*jobs, *layers]):
            future.result()
            count(jobs[future] if future in jobs else checkpoint.info(converted[layers[future]]).nbytes)
    for source, tensor in {**there, **tensors}.items():
        place(model, plain[source], tensor)
        report.bytes += tensor.nbytes
    for alias, name in plan.aliases.items():
        if name not in converted:
            _check_equal(checkpoint, alias, name, model)
    for future, name in layers.items():
        assert converter is not None
        report.bytes += place_converted(model, converter, name, future.result())
    tie(model)
    report.unmoved = moving.hold_back(model, {plain[source] for source, move in left.items() if move})
    model.finalize()
    report.seconds = time.monotonic() - started
    return report


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress("loading weights", done / (total or 1))

    return count


def _to_convert(model: Any, plan: Plan, converter: Converter | None) -> dict[str, str]:
    """Model tensor -> checkpoint tensor of what the converter takes, also tied tensors that get their own by that."""
    if converter is None:
        return {}
    source_of = {name: source for source, name in plan.sources.items()}
    source_of |= {alias: source_of[name] for alias, name in model.tied.items()}
    return {name: source for name, source in source_of.items() if converter.takes(name)}


def _convert(
    model: Any, checkpoint: Checkpoint, device: torch.device | str, converter: Any, name: str, source: str
) -> nn.Module:
    layer = model.get_submodule(name.rpartition(".")[0])
    return converter.convert(name, layer, checkpoint.rows(source, CONVERT_BYTES), device)


def _held(model: Any, plain: dict[str, str], checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype to hold each plain tensor in, by its name in the checkpoint, in the order of the disk."""
    slots = tensor_slots(model)
    return {
        source: held_dtype(model, plain[source], slots[plain[source]], dtype, info.dtype)
        for source, info in checkpoint.names().items()
        if source in plain
    }


def _left(
    model: Any,
    plain: dict[str, str],
    checkpoint: Checkpoint,
    held: dict[str, torch.dtype],
    converted: Collection[str],
    lazy: bool,
) -> dict[str, bool]:
    """Tensors that can be used as they lie in their file, and whether to move them into memory afterwards."""
    found: dict[str, bool] = {}
    for source, dtype in held.items():
        name, info = plain[source], checkpoint.info(source)
        if dtype != info.dtype or not mapped.can_map(info):
            continue
        if _looked_up(model, name, converted):
            if info.nbytes >= mapped.MIN_BYTES:
                found[source] = False
        elif lazy and info.nbytes >= moving.MIN_BYTES:
            found[source] = True
    total = sum(checkpoint.info(source).nbytes for source, move in found.items() if move)
    return {source: move for source, move in found.items() if not move or total >= moving.LEAST}


def _looked_up(model: Any, name: str, converted: Collection[str]) -> bool:
    """Whether rows of this tensor are read, never all of it: an embedding that no output layer shares."""
    shared = any(name == tied for alias, tied in model.tied.items() if alias not in converted)
    return not shared and getattr(model.get_submodule(name.rpartition(".")[0]), "looked_up", False)


def _reading(pool: Executor, checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> dict[Future, int]:
    """Jobs that fill tensors on the CPU, and the bytes that each reads."""
    infos = {source: checkpoint.info(source) for source in tensors}
    same = [(infos[source], tensor) for source, tensor in tensors.items() if tensor.dtype == infos[source].dtype]

    def cast(source: str, flat: torch.Tensor, begin: int, end: int) -> None:
        for at, piece in checkpoint.chunks(source, torch.empty(CONVERT_BYTES, dtype=torch.uint8), begin, end):
            flat[at : at + piece.numel()].copy_(piece)

    jobs: dict[Future, int] = {pool.submit(read, span): span.nbytes for span in spans(same, num_workers())}
    for source, tensor in tensors.items():
        size, flat = infos[source].dtype.itemsize, tensor.view(-1)
        if tensor.dtype != infos[source].dtype:
            for begin in range(0, flat.numel(), CAST_BYTES // size):
                end = min(flat.numel(), begin + CAST_BYTES // size)
                jobs[pool.submit(cast, source, flat, begin, end)] = (end - begin) * size
    return jobs


def _read_in_turn(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor], count: Callable[[int], None]) -> None:
    """Onto a device, by one thread and through one buffer."""
    buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
    for source, tensor in tensors.items():
        flat = tensor.view(-1)
        for at, piece in checkpoint.chunks(source, buffer):
            flat[at : at + piece.numel()].copy_(piece)
        count(checkpoint.info(source).nbytes)


def match(model: Any, checkpoint: Checkpoint) -> Plan:
    """Pair the tensors of file and model, or raise one error that lists all that is wrong."""
    tensors, slots = checkpoint.names(), tensor_slots(model)
    _refuse_quantised(checkpoint)
    plan = Plan({}, {}, {})
    missing = []
    for name in slots:
        if name in model.tied:
            continue
        # A tied pair is stored once, normally under the embedding's name.
        names = [name, *(alias for alias, source in model.tied.items() if source == name)]
        stored = [n for n in names if n in tensors]
        if not stored:
            missing.append(name)
            continue
        plan.sources[stored[0]] = name
        plan.aliases.update((alias, name) for alias in stored[1:])
    unexpected = []
    for name in tensors.keys() - plan.targets().keys():
        pattern = next((p for p in model.ignored if re.match(p, name)), None)
        if pattern is None:
            unexpected.append(name)
        else:
            plan.ignored[pattern] = plan.ignored.get(pattern, 0) + 1
    pairs = {source: (tensors[source], slots[name]) for source, name in plan.targets().items()}
    misshapen = [
        f"{source} (file {list(info.shape)}, model {list(slot.shape)})"
        for source, (info, slot) in pairs.items()
        if info.shape != tuple(slot.shape)
    ]
    _complain(checkpoint, missing, sorted(unexpected), misshapen)
    _refuse_dtypes(checkpoint, pairs)
    return plan


def _complain(checkpoint: Checkpoint, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    kinds = ((missing, "missing"), (unexpected, "unexpected"), (misshapen, "of another shape"))
    wrong = [f"{len(names)} {what}: {some(names)}" for names, what in kinds if names]
    if not wrong:
        return
    hint = "config.json and weight files must belong together"
    if missing == ["lm_head.weight"] and not unexpected and not misshapen:
        hint = 'if the model ties it to the embedding, config.json must say "tie_word_embeddings": true'
    raise ModelError(f"the weights in {checkpoint.folder} do not fit the model; tensors {'; '.join(wrong)} ({hint})")


def _refuse_quantised(checkpoint: Checkpoint) -> None:
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        quantisation = config.get("quantization_config") if isinstance(config, dict) else None
        method = quantisation.get("quant_method", "?") if isinstance(quantisation, dict) else "?"
        if quantisation and method != "compressed-tensors":
            raise ModelError(
                f"{checkpoint.folder} is quantised (quant_method {method!r}), which is not supported yet: "
                "use the BF16, F16 or F32 version of the model"
            )


def _refuse_dtypes(checkpoint: Checkpoint, pairs: dict[str, tuple[TensorInfo, torch.Tensor]]) -> None:
    bad = [
        f"{source} ({str(info.dtype).removeprefix('torch.')})"
        for source, (info, slot) in pairs.items()
        if info.dtype != slot.dtype and not (info.dtype in FLOATS and slot.is_floating_point())
    ]
    if bad:
        hint = "use the BF16, F16 or F32 version of the model"
        if "quantization_config" in checkpoint.config:
            hint = "they are not as compressed-tensors writes them: quantise the model again (surefoot quantize)"
        raise ModelError(
            f"{len(bad)} tensors in {checkpoint.folder} have a dtype that cannot be used here: {some(bad)}; {hint}"
        )


def _check_equal(checkpoint: Checkpoint, alias: str, name: str, model: nn.Module) -> None:
    """A tensor that is stored although it is tied must be the same, else the file contradicts the config."""
    held = model.get_parameter(name).detach().view(-1)
    for begin, piece in checkpoint.chunks(alias, torch.empty(CHUNK_BYTES, dtype=torch.uint8)):
        ours = held[begin : begin + piece.numel()].cpu()
        if not torch.equal(ours.view(torch.uint8), piece.to(ours.dtype).view(torch.uint8)):
            raise ModelError(
                f"{checkpoint.folder}: config.json ties {alias} to {name}, but the file holds two different tensors; "
                'if the file is right, set "tie_word_embeddings": false in config.json'
            )
