"""Write a quantised copy of a model folder, tensor by tensor, in the `compressed-tensors` format (vLLM reads it too).

The full-precision model is never held: each weight goes through in pieces of some megabytes. What is not quantised is
copied bit by bit, also tensors that Surefoot does not use (a vision tower), and the small files come along.
The folder appears under its name only when it is whole; until then it is called NAME.partial.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surefoot.core.errors import InputError, ModelError
from surefoot.quant.compressed_tensors import config_for, format_of
from surefoot.quant.packing import pack_int8
from surefoot.quant.schemes import group_scale_dtype, quantise_rows
from surefoot.quant.select import Selection
from surefoot.weights.checkpoint import INDEX, Checkpoint
from surefoot.weights.header import TensorInfo
from surefoot.weights.workers import workers
from surefoot.weights.writer import Entry, SafetensorsWriter

Progress = Callable[[str, "float | None"], None]

SHARD_BYTES = 5_000_000_000
COPY_BYTES = 4 << 20
ROWS_BYTES = 256 << 10  # with the scratch of rounding they fit a core's cache
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Small files that make the folder a model: tokenizer, template, generation config, licence.
COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")
COPIED_BEGINNINGS = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
NOT_COPIED = ("config.json", INDEX, "adapter_config.json")


@dataclass(frozen=True)
class Written:
    """What came out."""

    folder: Path
    bytes_before: int
    bytes_after: int
    files: int


def write_quantised(
    checkpoint: Checkpoint,
    out: Path,
    selection: Selection,
    *,
    tied: dict[str, str],
    progress: Progress | None = None,
) -> Written:
    """`tied`: as the model's; a tied layer that is selected gets a tensor of its own, and the tie is cut."""
    sources = _sources(checkpoint, selection, tied)
    shards = _shards(checkpoint, selection, sources)
    after = sum(entry.nbytes for shard in shards for entry in shard.values())
    untied = [name for name in tied if name.removesuffix(".weight") in selection.modules]
    with _appearing(out, after) as folder:
        _copy_small_files(checkpoint.folder, folder)
        names = _file_names(len(shards))
        done, total = 0, sum(checkpoint.info(source).nbytes for source, _ in sources) or 1
        owner = {name: i for i, shard in enumerate(shards) for name in shard}
        for i, shard in enumerate(shards):
            mine = [(s, t) for s, t in sources if owner[_entries(checkpoint.info(s), t, selection)[0][0]] == i]
            with SafetensorsWriter(folder / names[i], shard) as file, workers() as pool, _stopping() as stop:
                pending = {pool.submit(_write, checkpoint, s, t, selection, file, stop): s for s, t in mine}
                for future in as_completed(pending):
                    future.result()
                    done += checkpoint.info(pending[future]).nbytes
                    if progress:
                        progress(f"quantising to {selection.scheme}", done / total)
        if len(shards) > 1:
            weight_map = {name: names[i] for name, i in sorted(owner.items())}
            _write_json(folder / INDEX, {"metadata": {"total_size": after}, "weight_map": weight_map})
        # Last: a folder that a kill left half written is no model folder, even if its file has the full length.
        _write_json(folder / "config.json", _config(checkpoint, selection, cut_tie=bool(untied)))
    return Written(out, checkpoint.total_bytes, after, len(shards))


def _sources(checkpoint: Checkpoint, selection: Selection, tied: dict[str, str]) -> list[tuple[str, str]]:
    """(tensor of the checkpoint, tensor that it becomes): all of them, and tied layers that get their own."""
    stored = checkpoint.names()
    sources = [(name, name) for name in stored]
    for alias, name in tied.items():
        if alias.removesuffix(".weight") in selection.modules and alias not in stored:
            sources.append((name, alias))
    targets = {target for _, target in sources}
    absent = [name for name in selection.modules if f"{name}.weight" not in targets]
    if absent:
        raise ModelError(f"{checkpoint.folder} has no tensor {absent[0]}.weight: config.json and weights must fit")
    return sources


def _entries(info: TensorInfo, target: str, selection: Selection) -> list[tuple[str, Entry]]:
    """What a tensor becomes: itself, or the tensors of a quantised layer."""
    module = target.removesuffix(".weight")
    scheme = selection.scheme
    if not target.endswith(".weight") or module not in selection.modules:
        return [(target, Entry(info.dtype, info.shape))]
    if info.dtype not in FLOATS or len(info.shape) != 2:
        raise ModelError(f"{target} is {info.dtype} {list(info.shape)}: only BF16, F16 and F32 matrices are quantised")
    outer, inner = info.shape
    if scheme.bits == 4:
        assert scheme.group_size
        scale = Entry(group_scale_dtype(info.dtype), (outer, inner // scheme.group_size))
    else:
        scale = Entry(torch.float32, (outer, 1))
    if format_of(scheme) == "int-quantized":
        return [(f"{module}.weight", Entry(torch.int8, info.shape)), (f"{module}.weight_scale", scale)]
    words = math.ceil(inner * scheme.bits / 32)
    return [
        (f"{module}.weight_packed", Entry(torch.int32, (outer, words))),
        (f"{module}.weight_scale", scale),
        (f"{module}.weight_shape", Entry(torch.int64, (2,))),
    ]


def _shards(checkpoint: Checkpoint, selection: Selection, sources: list[tuple[str, str]]) -> list[dict[str, Entry]]:
    """Entries of each file; the tensors of one layer stay together."""
    shards: list[dict[str, Entry]] = [{}]
    size = 0
    for source, target in sources:
        entries = dict(_entries(checkpoint.info(source), target, selection))
        nbytes = sum(entry.nbytes for entry in entries.values())
        if size and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1].update(entries)
        size += nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """Set when the block ends: after Ctrl-C nobody waits until a tensor of gigabytes is written to its end."""
    stop = threading.Event()
    try:
        yield stop
    finally:
        stop.set()


def _write(
    checkpoint: Checkpoint,
    source: str,
    target: str,
    selection: Selection,
    file: SafetensorsWriter,
    stop: threading.Event,
) -> None:
    info = checkpoint.info(source)
    names = [name for name, _ in _entries(info, target, selection)]
    if len(names) == 1:
        buffer = torch.empty(min(COPY_BYTES, max(info.nbytes, 16)), dtype=torch.uint8)
        for begin, piece in checkpoint.chunks(source, buffer):
            if stop.is_set():
                return
            file.write(target, begin, piece)
        return
    row = 0
    for piece in checkpoint.rows(source, ROWS_BYTES):
        if stop.is_set():
            return
        held = quantise_rows(piece, selection.scheme, target)
        weight = next(tensor for leaf, tensor in held.items() if leaf != "weight_scale")
        if weight.dtype == torch.int8 and names[0].endswith("weight_packed"):
            weight = pack_int8(weight)
        scale = held["weight_scale"].view(piece.shape[0], -1)
        file.write(names[0], row * weight.shape[1], weight)
        file.write(names[1], row * scale.shape[1], scale)
        row += piece.shape[0]
    if len(names) == 3:
        file.write(names[2], 0, torch.tensor(info.shape))


def _config(checkpoint: Checkpoint, selection: Selection, cut_tie: bool) -> dict[str, Any]:
    """config.json of the new folder. All matrices that could be taken for linear layers are listed as ignored."""
    config = json.loads(json.dumps(checkpoint.config))
    matrices = [
        name.removesuffix(".weight")
        for name, info in checkpoint.names().items()
        if name.endswith(".weight") and len(info.shape) == 2
    ]
    ignore = sorted({*selection.excluded, *matrices} - set(selection.modules))
    config["quantization_config"] = config_for(selection.scheme, ignore)
    if cut_tie:
        for place in (config, config.get("text_config")):
            if isinstance(place, dict) and place.get("tie_word_embeddings"):
                place["tie_word_embeddings"] = False
    return config


def _copy_small_files(source: Path, target: Path) -> None:
    for path in sorted(source.iterdir()):
        wanted = path.suffix in COPIED or path.name.startswith(COPIED_BEGINNINGS)
        if path.is_file() and wanted and path.name not in NOT_COPIED and not path.name.startswith("."):
            shutil.copyfile(path, target / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _appearing(out: Path, nbytes: int) -> Iterator[Path]:
    """A folder OUT.partial to fill, renamed to OUT when the block ends well and removed when it does not."""
    check_target(out)
    partial = out.with_name(out.name + ".partial")
    try:
        if partial.exists():
            raise InputError(f"{partial} exists: another run is writing it, or one was killed; then delete it")
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
    except OSError as error:
        raise InputError(f"cannot create {partial}: {error.strerror or error}") from None
    try:
        if free < nbytes:
            raise InputError(f"{out} needs {nbytes / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB free")
        yield partial
        check_target(out)  # somebody may have made it meanwhile
        os.replace(partial, out)
        _sync(out.parent)
    except OSError as error:
        raise ModelError(f"cannot write {partial}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(out: Path) -> None:
    """Refuse to touch what is there already; an empty folder is fine."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise InputError(f"{out} exists and is no folder: choose another place")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} exists and is not empty: choose another folder, or delete it first")


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
