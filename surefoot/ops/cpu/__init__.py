"""Implementations of ops for CPUs: C++ kernels for the best instruction set of this machine.

`kernels` is the extension module, None where it was not built; the ops then run on PyTorch, and the first says so.
"""

from __future__ import annotations

import warnings
from types import ModuleType

import torch

from surefoot.ops.spec import register

INTERFACE = 3  # as in csrc/module.cpp: Python files that were updated without a new build do not fit the old kernels

kernels: ModuleType | None
state = "not built"
try:
    from surefoot.ops.cpu import _kernels as kernels  # type: ignore[attr-defined, no-redef]
except ImportError:
    kernels = None
if kernels is not None and getattr(kernels, "INTERFACE", 1) != INTERFACE:
    kernels, state = None, "older or newer than its Python files"


def instruction_set() -> str | None:
    """What the kernels use, such as "avx512_bf16", "avx2", "neon", "portable"; None without kernels."""
    return kernels.isa() if kernels else None


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Of each row [N, V]: its largest logit, and the first id that has it; -1 for a NaN or nothing above -inf.

    None where PyTorch has to find them.
    """
    if kernels is None or logits.device.type != "cpu" or not elementwise.takes_argmax(logits):
        return None
    return elementwise.argmax(logits)


def pack_(qweight: torch.Tensor, scale: torch.Tensor) -> bool:
    """Integer weights on a CPU into the layout of its kernels, in place; False where they stay in rows."""
    return kernels is not None and qweight.device.type == "cpu" and linear.pack_(qweight, scale)


def why_slow(isa: str | None) -> str | None:
    """What the user should know of the kernels for this instruction set (None: there are none)."""
    if isa is None:
        return (
            f"Surefoot's CPU kernels are {state}, so the CPU runs on PyTorch's ops, several times slower: "
            "install a C++17 compiler and reinstall (pip install --force-reinstall --no-deps surefoot)"
        )
    if isa == "portable":
        return "this CPU has no AVX2 (or NEON), so Surefoot's kernels run without vector instructions, ten times slower"
    return None


if kernels:
    from surefoot.ops.cpu import attention, delta, elementwise, linear  # noqa: F401

if (slow := why_slow(instruction_set())) is not None:

    @register("linear", "cpu", "missing", supports=lambda *args, **kwargs: _say_once(), priority=20)
    def _missing(*args, **kwargs):
        raise AssertionError("never chosen")

    def _say_once() -> bool:
        """Tell the user where a CPU computes, not at the import. `warnings` says it once."""
        warnings.warn(str(slow), stacklevel=2)
        return False
