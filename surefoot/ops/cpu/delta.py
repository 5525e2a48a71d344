"""The gated delta rule, its gates and the causal convolution in front of it by the C++ kernels."""

from __future__ import annotations

import torch

from surefoot.ops.cpu.common import CODE, KERNELS, PRIORITY, address, token_rows
from surefoot.ops.spec import register

_NAME = KERNELS.isa()
_MAX_TAPS = 8  # as MAX_TAPS in csrc/conv.h


def _gates_ok(a, b, a_log, dt_bias) -> bool:
    return (
        a.dtype in CODE
        and a.dtype == b.dtype
        and a_log.dtype in CODE
        and dt_bias.dtype in CODE
        and a.stride(-1) == b.stride(-1) == 1
        and a.numel() > 0
    )


@register("delta_gates", "cpu", _NAME, supports=_gates_ok, priority=PRIORITY)
def delta_gates(a, b, a_log, dt_bias):
    g, beta = torch.empty(a.shape, dtype=torch.float32), torch.empty(a.shape, dtype=torch.float32)
    KERNELS.delta_gates(
        a.data_ptr(),
        a.stride(0),
        b.data_ptr(),
        b.stride(0),
        CODE[a.dtype],
        a_log.data_ptr(),
        CODE[a_log.dtype],
        dt_bias.data_ptr(),
        CODE[dt_bias.dtype],
        g.data_ptr(),
        beta.data_ptr(),
        *a.shape,
    )
    return g, beta


def _delta_ok(q, k, v, g, beta, state, slots, query_start_loc=None, query_lens_host=None) -> bool:
    return (
        v.dtype in CODE
        and q.dtype == k.dtype == v.dtype
        and g.dtype == beta.dtype == state.dtype == torch.float32
        and slots.dtype == torch.int64
        and v.numel() > 0
        and token_rows(q)
        and token_rows(k)
        and token_rows(v)
        and g.is_contiguous()
        and beta.is_contiguous()
        and state.is_contiguous()
        and slots.is_contiguous()
        and _starts_ok(query_start_loc)
    )


def _starts_ok(query_start_loc) -> bool:
    return query_start_loc is None or (query_start_loc.dtype == torch.int32 and query_start_loc.is_contiguous())


@register("gated_delta_step", "cpu", _NAME, supports=_delta_ok, priority=PRIORITY)
def gated_delta_step(q, k, v, g, beta, state, slots):
    return gated_delta_chunk(q, k, v, g, beta, state, slots, None, None)


@register("gated_delta_chunk", "cpu", _NAME, supports=_delta_ok, priority=PRIORITY)
def gated_delta_chunk(q, k, v, g, beta, state, slots, query_start_loc, query_lens_host):
    out = torch.empty(v.shape, dtype=v.dtype)
    KERNELS.delta(
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        CODE[v.dtype],
        g.data_ptr(),
        beta.data_ptr(),
        state.data_ptr(),
        slots.data_ptr(),
        out.data_ptr(),
        address(query_start_loc),
        slots.shape[0],
        k.shape[1],
        v.shape[1],
        k.shape[2],
        v.shape[2],
    )
    return out


def _conv_ok(x, weight, bias, state, slots, query_start_loc=None, query_lens_host=None) -> bool:
    return (
        x.dtype in CODE
        and x.dtype == state.dtype
        and weight.dtype in CODE
        and 1 < weight.shape[1] <= _MAX_TAPS
        and (bias is None or (bias.dtype == weight.dtype and bias.is_contiguous()))
        and slots.dtype == torch.int64
        and x.numel() > 0
        and x.stride(-1) == 1
        and weight.is_contiguous()
        and state.is_contiguous()
        and slots.is_contiguous()
        and _starts_ok(query_start_loc)
    )


@register("causal_conv_step", "cpu", _NAME, supports=_conv_ok, priority=PRIORITY)
def causal_conv_step(x, weight, bias, state, slots):
    return causal_conv(x, weight, bias, state, slots, None, None)


@register("causal_conv", "cpu", _NAME, supports=_conv_ok, priority=PRIORITY)
def causal_conv(x, weight, bias, state, slots, query_start_loc, query_lens_host):
    out = torch.empty(x.shape, dtype=x.dtype)
    KERNELS.conv(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        CODE[weight.dtype],
        address(bias),
        state.data_ptr(),
        slots.data_ptr(),
        out.data_ptr(),
        CODE[x.dtype],
        address(query_start_loc),
        slots.shape[0],
        *weight.shape,
    )
    return out
