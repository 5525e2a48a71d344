"""Reference modules, one at a time, on inputs of one's choice: what a module adds of its own, without what it inherits.

One plain forward of the reference is watched, and every module's arguments are kept (masks, rotary tables, positions;
the hidden states only as a shape). After that `run` calls any module again with another hidden state: the target's, for
its own error; the same one slightly perturbed or in the target's dtype, for the error that is to be expected.

Shapes: T tokens; captured tensors are [T, ...] on the host; errors and noises are per token, [T] fp32 norms.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surefoot.backends.base import Backend, Capture
from surefoot.verify.pathcapture import plain
from surefoot.verify.quantised import QuantisedLinear, roughened

# How far apart two right orders of summation in the reference's own dtype may be, in roundings of the input: one piece
# of arithmetic, and a token mixer, where a state or a softmax carries errors on.
PERTURBATION, MIXER_PERTURBATION = 8.0, 64.0
SAMPLES, MIXER_SAMPLES = 1, 3
LAYER = re.compile(r"(.*\.layers\.\d+)")
NOTHING = "(?!)"  # a pattern that no path matches
HIDDEN_NAMES = ("hidden_states", "hidden_state", "input_ids", "input", "x")


def roundings(path: str) -> float:
    return MIXER_PERTURBATION if path.endswith(MIXERS) else PERTURBATION


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding: 2^-24 fp32, 2^-11 fp16, 2^-8 bf16."""
    return torch.finfo(dtype).eps / 2


@dataclass
class Call:
    """How the reference called one module: its arguments with a hole where the hidden state was."""

    args: list[Any]
    kwargs: dict[str, Any]
    shape: torch.Size
    keyword: str | None  # the hole is this keyword, or the first positional argument


class Replay:
    """A reference backend over a transformers model, and the calls of its modules on `token_ids`.

    Paths are those of the text-only container. Order of `calls`: order of completion.
    """

    def __init__(self, reference: Backend, token_ids: Sequence[int]):
        self.reference: Any = reference
        self.model: Any = getattr(reference, "model")  # noqa: B009
        self.token_ids = list(token_ids)
        self.calls: dict[str, Call] = {}
        self._names = {plain(name): name for name, _ in self.model.named_modules() if name}
        self._resident: tuple[str, contextlib.ExitStack] = ("", contextlib.ExitStack())
        handles = [
            module.register_forward_hook(self._keeper(plain(name)), with_kwargs=True)
            for name, module in self.model.named_modules()
            if name and not isinstance(module, nn.ModuleList)
        ]
        try:
            reference.capture(self.token_ids, NOTHING)
        finally:
            for handle in handles:
                handle.remove()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def module(self, path: str) -> nn.Module:
        """The reference's module, with its weights in memory."""
        name = self._names[path]
        self._hold(name)
        return self.model.get_submodule(name)

    def _hold(self, name: str) -> None:
        """A streamed reference keeps the layer that is asked for, and lets the one before go."""
        weights, layer = getattr(self.reference, "weights", None), LAYER.match(name)
        if weights is None or layer is None or layer[1] == self._resident[0]:
            return
        self.close()
        stack = contextlib.ExitStack()
        stack.enter_context(weights.resident(self.model.get_submodule(layer[1]), f"{layer[1]}."))
        self._resident = (layer[1], stack)

    def close(self) -> None:
        self._resident[1].close()
        self._resident = ("", contextlib.ExitStack())

    def _keeper(self, name: str):
        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            keyword = None if args else next((k for k in HIDDEN_NAMES if k in kwargs), None)
            hidden = args[0] if args else kwargs.get(keyword or "")
            if not isinstance(hidden, torch.Tensor):
                return
            rest = {k: v for k, v in kwargs.items() if k != keyword}
            self.calls[name] = Call(list(args[1:]), rest, hidden.shape, keyword)

        return keep

    @torch.inference_mode()
    def run(
        self,
        path: str,
        hidden: torch.Tensor,
        dtype: torch.dtype = torch.float32,
        second: torch.Tensor | None = None,
        module: nn.Module | None = None,
    ) -> torch.Tensor:
        """Output of a module for this hidden state, [T, ...] in `dtype`, computed in `dtype`.

        second: replaces the second positional argument (the gate of a gated norm).  module: stands in for the one at
        `path`, with the same arguments.
        """
        call = self.calls[path]
        module = module or self.module(path)
        if dtype != torch.float32:
            module = lowered(module, dtype)
        hidden = hidden.reshape(call.shape)
        args = [_cast(a, dtype) for a in call.args]
        if second is not None and args:
            args[0] = second.reshape(call.args[0].shape).to(dtype)
        kwargs = {k: _cast(v, dtype) for k, v in call.kwargs.items()}
        given = hidden if not hidden.is_floating_point() else hidden.to(dtype)
        if call.keyword:
            kwargs[call.keyword] = given
        else:
            args.insert(0, given)
        return self.rows(module(*args, **kwargs))

    def rows(self, value: Any) -> torch.Tensor:
        """The first tensor of an output, without the leading batch of one."""
        while isinstance(value, (tuple, list)):
            value = value[0]
        if value.ndim > 1 and value.shape[0] == 1 and self.num_tokens > 1:
            value = value[0]
        return value.reshape(self.num_tokens, *value.shape[1:]) if value.shape[0] == self.num_tokens else value

    def expected(
        self, path: str, hidden: torch.Tensor, dtype: torch.dtype, right: torch.Tensor, second: torch.Tensor | None
    ) -> torch.Tensor:
        """Per-token error that right arithmetic in `dtype` makes at this module, [T].

        16-bit dtypes: the reference module computed in that dtype, as it is and on inputs perturbed by a rounding.
        fp32, the reference's own dtype: on inputs perturbed by a few roundings, which stands for another order of
        summation (Monte Carlo arithmetic, Parker 1997). The largest of the samples, because one may be small by luck;
        never less than one rounding of the output, nor than the median relative error of the rows. Quantised layers
        see fp32 activations in 16 bits, or as int8 of which one may be rounded to the other side.
        """
        generator = torch.Generator().manual_seed(0)
        low = dtype != torch.float32
        step = unit_roundoff(dtype) * (1.0 if low else roundings(path))
        samples = [row_norm(self.run(path, hidden, dtype, second).float() - right)] if low else []
        module = self.module(path)
        for _ in range(MIXER_SAMPLES if path.endswith(MIXERS) else SAMPLES):
            noisy = perturbed(hidden, step, generator)
            gate = None if second is None else perturbed(second, step, generator)
            with roughened(module, generator):
                samples.append(row_norm(self.run(path, noisy, dtype, gate).float() - right))
        if isinstance(module, QuantisedLinear):
            samples.append(module.one_step(hidden))
        return floored(torch.stack(samples).amax(0), row_norm(right), step)


def floored(error: torch.Tensor, norm: torch.Tensor, step: float) -> torch.Tensor:
    """Expected errors [T], smoothed: a single sample of an error may be zero by luck."""
    finite = torch.isfinite(error)
    typical = (error / norm.clamp(min=1e-30))[finite]
    typical = typical.median() if len(typical) else torch.tensor(0.0)
    error = torch.where(finite, error, torch.zeros_like(error))
    return torch.maximum(error, norm * torch.clamp(typical, min=step)) + 1e-30


def row_norm(x: torch.Tensor) -> torch.Tensor:
    """L2 norm of each token's row: [T, ...] -> [T]."""
    return x.float().reshape(x.shape[0], -1).norm(dim=-1)


def perturbed(x: torch.Tensor, step: float, generator: torch.Generator) -> torch.Tensor:
    """x with every element off by up to `step`, relatively, in fp32; integers stay as they are."""
    if not x.is_floating_point():
        return x
    noise = torch.rand(x.shape, generator=generator) * 2 - 1
    return x.float() * (1 + step * noise)


def lowered(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of one module in another dtype, without hooks."""
    twin = copy.deepcopy(module).to(dtype)
    for part in twin.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return twin


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        # NOTE: an additive mask holds fp32's smallest number, -inf in 16 bits: softmax of a row of those is NaN.
        return value.clamp(min=torch.finfo(dtype).min, max=torch.finfo(dtype).max).to(dtype)
    if isinstance(value, (tuple, list)):
        return type(value)(_cast(v, dtype) for v in value)
    return value


def input_of(path: str, capture: Capture, token_ids: Sequence[int]) -> torch.Tensor | None:
    """What the target's module was given, in the reference's terms; None if it was not captured.

    NOTE: Surefoot's fused norms take (attended, residual) where transformers' take the sum; so the sum is made here,
    with the rounding that the sum has in the model's dtype.
    """
    if path.endswith("embed_tokens"):
        return torch.tensor(list(token_ids))
    if path.endswith(".post_attention_layernorm"):
        layer = path.rpartition(".")[0]
        mixed = next((capture.outputs[p] for m in MIXERS if (p := f"{layer}.{m}") in capture.outputs), None)
        return None if mixed is None or layer not in capture.inputs else capture.inputs[layer] + mixed
    if path == "lm_head":
        return next((v for k, v in capture.outputs.items() if k.endswith("model.norm")), None)
    return capture.inputs.get(path)


def second_of(path: str, capture: Capture) -> torch.Tensor | None:
    """The gate that a gated norm of the target was given."""
    if path.endswith("linear_attn.norm"):
        return capture.outputs.get(path.removesuffix("norm") + "in_proj_z")
    return None


MIXERS = ("self_attn", "linear_attn")
