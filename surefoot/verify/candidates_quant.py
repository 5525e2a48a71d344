"""Candidate mistakes of quantised layers: scales, groups, the order of packed integers, and how activations enter.

The right output is x' (q s) with whole numbers q [out, in], scales s [out, groups] spread over the inputs, and x' the
activations as the scheme has them; each candidate changes one of the three.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from surefoot.ops.quant import quantise_tokens
from surefoot.verify.candidates import LINEAR, Candidate, Case, Variant

PACK = 8  # int4 values in a word
ORDERS = {
    "in reverse": (7, 6, 5, 4, 3, 2, 1, 0),
    "in swapped pairs": (1, 0, 3, 2, 5, 4, 7, 6),
    "in AWQ's order": (0, 2, 4, 6, 1, 3, 5, 7),
    "in the order that undoes AWQ's": (0, 4, 1, 5, 2, 6, 3, 7),
}


def _product(case: Case, weight: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
    bias = case.module.bias
    seen = case.module.seen(case.x) if x is None else x
    return case.like(F.linear(seen, weight, bias if bias is None else bias.float()))


def _wide(case: Case, scales: torch.Tensor | None = None) -> torch.Tensor:
    return case.module.spread(case.module.scales if scales is None else scales)


def _scale_twice(case: Case) -> Iterator[Variant]:
    q, wide = case.module.integers, _wide(case)
    yield "the scale is applied twice", _product(case, q * wide * wide)
    yield "the scale is not applied", _product(case, q)


def _scale_axis(case: Case) -> Iterator[Variant]:
    q, scales = case.module.integers, case.module.scales
    outer, groups = scales.shape
    if groups > 1:
        turned = scales.t().contiguous().view(outer, groups)
        yield "the table of group scales is read transposed", _product(case, q * _wide(case, turned))
        return
    if case.module.in_features <= outer:
        yield "the scales run along the inputs", _product(case, q * scales[: case.module.in_features].t())
    yield "every channel has the scale of the first", _product(case, q * scales[:1])


def _group_wrong(case: Case) -> Iterator[Variant]:
    q, scales = case.module.integers, case.module.scales
    groups, inner = scales.shape[1], case.module.in_features
    if groups == 1:
        return
    for shift in (1, -1):
        yield f"groups have the scale {shift:+d} beside theirs", _product(case, q * _wide(case, scales.roll(-shift, 1)))
    size = inner // groups
    for taken in (2 * size, 4 * size, size // 2):
        index = (torch.arange(inner) // taken) % groups
        first = f"groups of {taken} instead of {size}, scales one after another"
        yield first, _product(case, q * scales[:, index])
        if taken > size:
            index = torch.arange(inner) // taken * (taken // size)
            yield f"{taken} inputs share the scale of the first {size}", _product(case, q * scales[:, index])


def _order(case: Case) -> Iterator[Variant]:
    if case.module.scheme.bits != 4 or case.module.in_features % PACK:
        return
    q, wide = case.module.integers, _wide(case)
    words = q.unflatten(-1, (-1, PACK))
    for label, order in ORDERS.items():
        yield f"the eight integers of a word are unpacked {label}", _product(case, words[..., order].flatten(-2) * wide)
    yield "the 8 that is added for storage is not taken off", _product(case, (q + 8) * wide)


def _clamped(case: Case) -> Iterator[Variant]:
    q, wide = case.module.integers, _wide(case)
    for limit in (3, 6) if case.module.scheme.bits == 4 else (7, 15, 31, 63, 64):
        yield f"whole numbers are clamped to ±{limit}", _product(case, q.clamp(-limit, limit) * wide)


def _activations(case: Case) -> Iterator[Variant]:
    x, weight = case.x, case.module.weight
    if case.module.scheme.act != "int8":
        q, step = quantise_tokens(x)
        yield "activations are rounded to int8 although the scheme keeps them", _product(case, weight, q * step)
        return
    q, step = quantise_tokens(x)
    together = x.abs().max() / 127
    yield "activations are not rounded", _product(case, weight, x)
    yield "all tokens share one scale", _product(case, weight, (x / together).round() * together)
    yield "the scale of the token is left out", _product(case, weight, q)
    yield "the scale of the token is applied twice", _product(case, weight, q * step * step)
    yield "each token has the scale of the first", _product(case, weight, q * step[:1])


_REPLACED = ("scale_twice", "scale_axis", "quant_clamped")
QUANTISED = [
    Candidate("scale_twice", "a quantisation scale is applied twice or never", "linear", _scale_twice),
    Candidate("scale_axis", "a quantisation scale runs along the wrong axis", "linear", _scale_axis),
    Candidate("group_wrong", "groups of weights have another group's scale", "linear", _group_wrong),
    Candidate("int4_order", "packed int4 weights are unpacked wrongly", "linear", _order),
    Candidate("quant_clamped", "quantised weights are clamped too early", "linear", _clamped),
    Candidate("act_scale", "activations enter a quantised layer another way", "linear", _activations),
    *(candidate for candidate in LINEAR if candidate.name not in _REPLACED),
]
