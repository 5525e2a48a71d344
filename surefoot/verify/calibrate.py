"""Runs that are right by construction and yet not equal: they show how far a right device may be from the reference.

Each variant changes only what no specification fixes: in which order a sum is taken, where a product is rounded, how
attention is arranged. Its embedding is dithered by half a unit in the last place, so that every later rounding is drawn
anew; without that, two bf16 runs share most of their rounding errors and would make the noise look smaller than it is.

What these runs show is stored with the proof. The device's own spread is measured the same way on the target.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from surefoot.verify.quantised import QuantisedLinear, roughened


@dataclass(frozen=True)
class Variant:
    """One way to compute the same thing. `apply(model, seed)` is a context manager on an nn.Module with HF names."""

    name: str
    apply: Callable[[nn.Module, int], contextlib.AbstractContextManager[Any]]


def model_of(backend: Any) -> nn.Module | None:
    """The module tree of an in-process backend, None for a black box."""
    engine = getattr(backend, "engine", None)
    model = getattr(engine, "model", None) if engine is not None else getattr(backend, "model", None)
    return model if isinstance(model, nn.Module) else None


def embedding_of(model: nn.Module) -> nn.Module | None:
    return next((m for name, m in model.named_modules() if name.endswith("embed_tokens")), None)


@contextlib.contextmanager
def dithered(model: nn.Module, seed: int) -> Iterator[None]:
    """Each embedding value times 1 + eps/2 * U(-1, 1), eps being the spacing of the dtype at 1.

    Quantised layers are dithered as well, see `quantised.roughened`.
    """
    embedding = embedding_of(model)
    if embedding is None:
        yield
        return
    generator = torch.Generator().manual_seed(seed)

    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        half = torch.finfo(output.dtype).eps / 2
        noise = 2 * torch.rand(output.shape, generator=generator) - 1
        # NOTE: fp64, because 1 + 6e-8 is 1 in fp32; and on the host, because an NPU has none and says nothing.
        return (output.cpu().double() * (1 + half * noise.double())).to(output.dtype).to(output.device)

    handle = embedding.register_forward_hook(hook)
    try:
        with roughened(model, generator):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def linears(model: nn.Module, compute: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Let every dense layer compute by `compute(x, weight, bias)`."""
    changed = [m for m in model.modules() if type(m).__name__ == "Linear"]

    quantised = [m for m in model.modules() if isinstance(m, QuantisedLinear)]

    def replacement(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: compute(x, module.weight, module.bias)

    for module in changed:
        module.forward = replacement(module)  # type: ignore[method-assign]
    for layer in quantised:
        layer.product = compute
    try:
        yield
    finally:
        for module in changed:
            del module.forward
        for layer in quantised:
            layer.product = F.linear


def reversed_sums(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The same products, summed from the other end."""
    return F.linear(x.flip(-1), weight.flip(-1), bias)


def two_blocks(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Split-K: two partial sums, each rounded to the dtype, then added."""
    half = x.shape[-1] // 2
    return F.linear(x[..., :half], weight[:, :half]) + F.linear(x[..., half:], weight[:, half:], bias)


@contextlib.contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """transformers' other arrangement of attention; a model of ours has one only and stays as it is."""
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if before is None or not hasattr(model, "set_attn_implementation"):
        yield
        return
    model.set_attn_implementation("sdpa" if before == "eager" else implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _with_dither(change: Callable[[nn.Module], contextlib.AbstractContextManager[Any]]):
    @contextlib.contextmanager
    def apply(model: nn.Module, seed: int) -> Iterator[None]:
        with change(model), dithered(model, seed):
            yield

    return apply


DITHER = Variant("dithered embedding", dithered)
VARIANTS = (
    DITHER,  # in another dtype than fp32 the undithered run takes its place
    Variant("reversed sums", _with_dither(lambda m: linears(m, reversed_sums))),
    Variant("two K-blocks", _with_dither(lambda m: linears(m, two_blocks))),
    Variant("other attention", _with_dither(lambda m: attention(m, "eager"))),
)
