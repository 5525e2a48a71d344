"""The same random weights at a config's true shapes in every peer's format, made once and kept in a folder.

    full/            the checkpoint in bf16, for transformers and Surefoot
    w8a8/, w4a8/, w4a16/
                     Surefoot's quantised folders (compressed-tensors), output layer included
    Q8_0.gguf, ...   llama.cpp's formats, by its own quantiser; Llama family only

Speed does not depend on the values, so one block of 16 Mi random numbers is repeated; a whole draw would take minutes.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from peers.gguf_export import export_f16
from peers.gguf_export import quantise as quantise_gguf
from surefoot.layers.quant_linear import shapes
from surefoot.models.registry import build
from surefoot.quant import schemes
from surefoot.quant.folder import write_quantised
from surefoot.quant.select import select
from surefoot.weights.assign import tensor_slots
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.writer import Entry, SafetensorsWriter

BLOCK = 1 << 24
SCHEMES = ("w8a8", "w4a8", "w4a16")
FORMATS = ("F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M")


def prepare(model: Path, cache: Path) -> Path:
    """Make what is missing; returns the folder of this model's files."""
    out = cache / model.name
    out.mkdir(parents=True, exist_ok=True)
    full = out / "full"
    if not full.exists():
        print(f"writing {full}", flush=True)
        random_checkpoint(model, full)
    for scheme in SCHEMES:
        if not (out / scheme).exists():
            print(f"writing {out / scheme}", flush=True)
            quantised(full, out / scheme, scheme)
    if is_llama(model):
        for ftype in FORMATS:
            _gguf(model, out, ftype)
    return out


def is_llama(model: Path) -> bool:
    return json.loads((model / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def random_checkpoint(model: Path, out: Path) -> None:
    """All tensors of the text model: matrices `normal(0, 0.02)`, norms and the like as they are initialised."""
    partial = out.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for file in model.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja"):
            shutil.copy(file, partial / file.name)
    built = build(json.loads((model / "config.json").read_text()))
    slots = {name: slot for name, slot in tensor_slots(built).items() if name not in built.tied}
    generator = torch.Generator().manual_seed(0)
    values = (torch.randn(BLOCK, generator=generator) * 0.02).bfloat16()
    entries = {name: Entry(torch.bfloat16, tuple(slot.shape)) for name, slot in slots.items()}
    with SafetensorsWriter(partial / "model.safetensors", entries) as file:
        for name, slot in slots.items():
            if slot.dim() < 2 or "conv1d" in name:
                small = torch.empty(slot.shape)
                built.init_weight(name, small, generator)
                file.write(name, 0, small.bfloat16())
                continue
            for begin in range(0, slot.numel(), BLOCK):
                file.write(name, begin, values[: min(BLOCK, slot.numel() - begin)])
    partial.rename(out)


def quantised(full: Path, out: Path, scheme: str) -> None:
    checkpoint = Checkpoint(full)
    built = build(checkpoint.config)
    selection = select(shapes(built), schemes.scheme(scheme, None), built.quant_exclude, lm_head=True)
    write_quantised(checkpoint, out, selection, tied=built.tied)


def _gguf(model: Path, out: Path, ftype: str) -> None:
    path, partial = out / f"{ftype}.gguf", out / f"{ftype}.partial"
    if path.exists():
        return
    print(f"writing {path}", flush=True)
    if ftype == "F16":
        export_f16(model, partial)
    else:
        quantise_gguf(out / "F16.gguf", partial, ftype)
    partial.rename(path)
