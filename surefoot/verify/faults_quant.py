"""Faults in the kernels of quantised layers: scales, groups, packed integers, activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from surefoot.backends.native import NativeBackend
from surefoot.ops.quant import in_rows, pack_int4, quantise_tokens, unpack_int4
from surefoot.verify import inject
from surefoot.verify.faults import Fault

WHERE = r"model\.layers\.1\.mlp\.up_proj"


def _op(name: str, fn):
    """The faults below see weights in rows, whatever layout the layer holds."""

    def unpacked(right, x, q, scale, *rest):
        return fn(right, x, *in_rows(q, scale, rest[-1]), *rest[:-1])

    return lambda target, scale: inject.op(_layer(target), name, unpacked)


def _layer(target: NativeBackend):
    return inject.layer_with(target, "mlp", 1).up_proj


def _twice(right, x, q, scale, bias, act):
    return right(x, q, scale * scale, bias, act)


def _missing(right, x, q, scale, bias, act):
    return right(x, q, torch.ones_like(scale), bias, act)


def _along_inputs(right, x, q, scale, bias, act):
    inputs = (x.float() * scale[: x.shape[-1]]).to(x.dtype)
    return right(inputs, q, torch.ones_like(scale), bias, act)


def _transposed(right, x, q, scale, size, *rest):
    return right(x, q, scale.t().contiguous().view_as(scale), size, *rest)


def _neighbour(right, x, q, scale, size, *rest):
    return right(x, q, scale.roll(1, -1), size, *rest)


def _shared(right, x, q, scale, size, *rest):
    """Two groups share the scale of the first."""
    return right(x, q, scale[:, torch.arange(scale.shape[1]) // 2 * 2], size, *rest)


def _reversed(right, x, q, scale, size, *rest):
    return right(x, pack_int4(unpack_int4(q).unflatten(-1, (-1, 8)).flip(-1).flatten(-2)), scale, size, *rest)


def _offset(right, x, q, scale, size, *rest):
    wide = scale.float().repeat_interleave(size, -1)
    return (right(x, q, scale, size, *rest).float() + F.linear(x.float(), 8 * wide)).to(x.dtype)


def _first_scale(right, x, q, scale, bias, act):
    """Every token of a step is scaled back by the first token's step."""
    whole, step = quantise_tokens(x)
    return right(whole * step[:1], q, scale, bias, "float").to(x.dtype)


def _fault(name: str, cause: str, op: str, fn, quant: str) -> Fault:
    return Fault(name, 8, WHERE, (cause,), _op(op, fn), quant=quant)


FAULTS = [
    _fault("q_scale_twice", "scale_twice", "linear_w8", _twice, "w8a16"),
    _fault("q_scale_missing", "scale_twice", "linear_w8", _missing, "w8a8"),
    _fault("q_scale_axis", "scale_axis", "linear_w8", _along_inputs, "w8a16"),
    _fault("q_scale_transposed", "scale_axis", "linear_w4", _transposed, "w4a16"),
    _fault("q_group_neighbour", "group_wrong", "linear_w4", _neighbour, "w4a16"),
    _fault("q_group_shared", "group_wrong", "linear_w4", _shared, "w4a16"),
    _fault("q_int4_reversed", "int4_order", "linear_w4", _reversed, "w4a16"),
    _fault("q_int4_offset", "int4_order", "linear_w4", _offset, "w4a16"),
    _fault("q_act_scale", "act_scale", "linear_w8", _first_scale, "w8a8"),
]
