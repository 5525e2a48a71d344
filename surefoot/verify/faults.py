"""The catalogue of faults: mistakes that real engines have made, planted to see whether the proof finds them.

Each names the cause class of the field evidence that it stands for (1 template and tokens, 2 rope, 3 norm, 4 mask and
softmax, 5 overflow, 6 KV cache, 7 head mapping and collectives, 8 quantisation, 9 weights, 10 graphs and races,
11 padding, 12 sampling defaults, 13 delta net, 14 kernels), where it must be found, and what it must be called.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from surefoot.backends.native import NativeBackend

CAUSE_CLASSES = {
    1: "template, BOS, tokenizer",
    2: "rotary embedding",
    3: "norm",
    4: "mask, softmax, scale",
    5: "overflow, NaN",
    6: "KV cache",
    7: "head mapping, collectives",
    8: "quantisation",
    9: "weights",
    10: "graph replay, races",
    11: "padding",
    12: "sampling defaults",
    13: "linear attention",
    14: "kernel",
}

LLAMA, QWEN = ("llama",), ("qwen3.5",)
ATTENTION = r"model\.layers\.\d+\.self_attn"
DELTA = r"model\.layers\.\d+\.linear_attn"


@dataclass(frozen=True)
class Fault:
    """One mistake.

    id: name in the catalogue.  cause: class 1 to 14.  where: regex that the named module must match, or the check
    ("tokens", "sampler").  names: causes that count as right.  apply(target, scale): plants it within a `with` block;
    scale makes it smaller or larger where that has a meaning.  models: families that it can be planted in ("llama",
    "qwen3.5").  path: the first path of the engine that shows it.  dtype: target dtype that it needs.
    subtle: smaller than the noise of 16 bits, and no exact check sees it.  needs(config): whether an HF config has what
    the fault breaks.  quant: scheme that the target is quantised by.
    """

    id: str
    cause: int
    where: str
    names: tuple[str, ...]
    apply: Callable[[NativeBackend, float], AbstractContextManager[Any]]
    models: tuple[str, ...] = ("llama", "qwen3.5")
    path: str = "whole"
    dtype: str = "float32"
    scales: bool = False
    subtle: bool = False
    needs: Callable[[Any], bool] = lambda config: True
    quant: str | None = None


def catalogue() -> dict[str, Fault]:
    """All faults by id."""
    from surefoot.verify import faults_engine, faults_modules, faults_quant, faults_weights

    every = [*faults_modules.FAULTS, *faults_weights.FAULTS, *faults_quant.FAULTS, *faults_engine.FAULTS]
    found = {fault.id: fault for fault in every}
    assert len(found) == len(every), "two faults have the same id"
    return found
