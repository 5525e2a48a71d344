"""Linear layers with quantised weights, in the tensors that the `compressed-tensors` format stores.

w8: one symmetric int8 scale per output channel. w4: symmetric int4 in groups along the input, eight to an int32;
element 8 i + j of a row is in bits 4 j ... 4 j + 3 of word i, stored plus 8. Activations are quantised token by token
or not at all, so a token's result never depends on the rest of its batch.

`layout` says how weights lie: in "rows", as stored, or in "panels" of 16 output channels for the CPU kernels. A panel
holds 32-bit words [in, 16] where the rows held them [16, in], in the same memory: the tensor keeps its shape, and
`rows_of` gives the rows back. Group scales go with their weights; scales per channel stay.
"""

from __future__ import annotations

import torch

from surefoot.ops.samples import BF16, F16, F32, nbytes, randn
from surefoot.ops.spec import Cost, OpSpec, Sample, Tolerance, define, dispatch

PANEL = 16

# A kernel may keep "float" activations as 16-bit integers with a scale per block; that error is within the fp32 entry.
QUANTISED = {F32: Tolerance(1e-3, 1e-3), BF16: Tolerance(3e-2, 3e-2), F16: Tolerance(5e-3, 5e-3)}


def linear_w8(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    act: str = "float",
    layout: str = "rows",
) -> torch.Tensor:
    """x @ (qweight * scale).T + bias. x: [T, in]; qweight: [out, in] int8; scale: [out] fp32.

    act "float" (W8A16) keeps x; "int8" (W8A8) rounds each token to 127 steps of its largest magnitude and multiplies
    integers. A token that holds a NaN or infinity gives NaN.
    """
    return dispatch(LINEAR_W8, x.device.type, (x, qweight, scale, bias, act, layout), {})


def linear_w4(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scale: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None = None,
    act: str = "float",
    layout: str = "rows",
) -> torch.Tensor:
    """x @ dequantise_int4(qweight, scale).T + bias. x: [T, in]; qweight: [out, in / 8] int32;
    scale: [out, in / group_size], any float dtype. act: "float" (W4A16) or "int8" (W4A8), as in `linear_w8`."""
    return dispatch(LINEAR_W4, x.device.type, (x, qweight, scale, group_size, bias, act, layout), {})


def quantise_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per token: (integers as fp32 [T, in], scale [T, 1]). NaN and infinity make the scale NaN."""
    x = x.float()
    top = x.abs().amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.nan)
    # NOTE: 127.0 / top would be 127 times a rounded reciprocal, which decides ties of 16-bit numbers the other way.
    q = torch.round(x * torch.full_like(top, 127.0).div_(top))
    return torch.where(top > 0, q, 0.0), top / 127.0


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """[out, in] integers in [-8, 7] -> [out, in / 8] int32."""
    q = (q.to(torch.int32) + 8).unflatten(-1, (-1, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=q.device)
    return (q << shifts).sum(-1, dtype=torch.int32)


def unpack_int4(qweight: torch.Tensor) -> torch.Tensor:
    """[out, in / 8] int32 -> [out, in] int8 in [-8, 7]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=qweight.device)
    return (((qweight.unsqueeze(-1) >> shifts) & 15) - 8).to(torch.int8).flatten(-2)


def dequantise_int4(qweight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32 weight [out, in] from packed integers and group scales [out, in / group_size]."""
    q = unpack_int4(qweight).float()
    return (q.unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)).flatten(-2)


def rows_of(packed: torch.Tensor) -> torch.Tensor:
    """Weights or group scales [out, columns] that lie in panels of 16 rows, as rows; also see `panels_of`."""
    words = packed.view(torch.int32) if packed.element_size() == 1 else packed
    outer, columns = words.shape
    return words.view(-1, columns, PANEL).transpose(1, 2).reshape(outer, columns).contiguous().view(packed.dtype)


def panels_of(rows: torch.Tensor) -> torch.Tensor:
    """Weights (int8, or int4 in int32) or group scales [out, columns] in panels; out must be a multiple of 16."""
    words = rows.view(torch.int32) if rows.element_size() == 1 else rows
    return words.unflatten(0, (-1, PANEL)).transpose(1, 2).reshape(words.shape).contiguous().view(rows.dtype)


def in_rows(qweight: torch.Tensor, scale: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and scales as stored; scales per channel [out] lie so in both layouts."""
    if layout != "panels":
        return qweight, scale
    return rows_of(qweight), rows_of(scale) if scale.dim() == 2 else scale


def _finish(y, bias, dtype):
    return (y if bias is None else y + bias.float()).to(dtype)


def _linear_w8(x, qweight, scale, bias=None, act="float", layout="rows"):
    qweight, scale = in_rows(qweight, scale, layout)
    if act == "int8":
        q, token_scale = quantise_tokens(x)
        # fp64 holds every sum of integer products exactly.
        total = (q.double() @ qweight.double().t()).float()
        return _finish(total * (token_scale * scale), bias, x.dtype)
    return _finish((x.float() @ qweight.float().t()) * scale, bias, x.dtype)


def _linear_w4(x, qweight, scale, group_size, bias=None, act="float", layout="rows"):
    qweight, scale = in_rows(qweight, scale, layout)
    weight = dequantise_int4(qweight, scale)
    if act == "int8":
        q, token_scale = quantise_tokens(x)
        return _finish((q @ weight.t()) * token_scale, bias, x.dtype)
    return _finish(x.float() @ weight.t(), bias, x.dtype)


def _w8_cost(x, qweight, scale, bias=None, act="float", layout="rows"):
    rows = x.numel() // x.shape[-1]
    return Cost(
        2.0 * rows * qweight.numel(), nbytes(x, qweight, scale, bias) + rows * qweight.shape[0] * x.element_size()
    )


def _w4_cost(x, qweight, scale, group_size, bias=None, act="float", layout="rows"):
    rows = x.numel() // x.shape[-1]
    return Cost(
        16.0 * rows * qweight.numel(), nbytes(x, qweight, scale, bias) + rows * qweight.shape[0] * x.element_size()
    )


# The 1B's k, q and down projections, Qwen3.5's gate, and sizes that no block divides.
_SHAPES = [(1, 2048, 512), (8, 2048, 2048), (3, 8192, 256), (65, 1024, 3584)]


def _w8_samples():
    def sample(rows, inner, outer, act, bias=False, extreme=False):
        def make(dtype, device, gen):
            q = torch.randint(-127, 128, (outer, inner), generator=gen, dtype=torch.int8)
            x = randn((rows, inner), dtype, device, gen)
            if extreme:
                q, x = q.sign() * 127, x.sign()
            return {
                "x": x,
                "qweight": q.to(device),
                "scale": (torch.rand(outer, generator=gen) * inner**-0.5 / 64).to(device),
                "bias": randn((outer,), dtype, device, gen) if bias else None,
                "act": act,
            }

        name = f"{rows}x{inner}->{outer} {act}{' bias' if bias else ''}{' extremes' if extreme else ''}"
        return Sample(name, make)

    out = []
    for act in ("float", "int8"):
        out += [sample(*s, act) for s in [*_SHAPES, (5, 33, 17), (1, 1, 1), (7, 300, 9)]]
        out += [sample(4, 96, 40, act, bias=True), sample(2, 2048, 64, act, extreme=True)]
    return out


def _w4_samples():
    def sample(rows, inner, outer, group, act, bias=False, scale_dtype=torch.bfloat16):
        def make(dtype, device, gen):
            q = torch.randint(-8, 8, (outer, inner), generator=gen)
            scale = (torch.rand(outer, inner // group, generator=gen) * inner**-0.5 / 4).to(scale_dtype)
            return {
                "x": randn((rows, inner), dtype, device, gen),
                "qweight": pack_int4(q).to(device),
                "scale": scale.to(device),
                "group_size": group,
                "bias": randn((outer,), dtype, device, gen) if bias else None,
                "act": act,
            }

        return Sample(f"{rows}x{inner}->{outer} g{group} {act}{' bias' if bias else ''}", make)

    out = []
    for act in ("float", "int8"):
        out += [sample(*s, 32, act) for s in _SHAPES]
        out += [sample(*s, 128, act, scale_dtype=torch.float16) for s in _SHAPES]
        out += [sample(5, 96, 17, 32, act, scale_dtype=torch.float32), sample(1, 32, 1, 32, act)]
        out += [sample(4, 384, 40, 128, act, bias=True), sample(2, 192, 6, 64, act)]
    return out


LINEAR_W8 = define(OpSpec("linear_w8", _linear_w8, cost=_w8_cost, samples=_w8_samples, tolerance=QUANTISED))
LINEAR_W4 = define(OpSpec("linear_w4", _linear_w4, cost=_w4_cost, samples=_w4_samples, tolerance=QUANTISED))
