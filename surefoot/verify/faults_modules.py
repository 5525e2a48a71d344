"""Faults in rope, norms, attention and its heads, and in the sums between devices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from surefoot import ops
from surefoot.backends.native import NativeBackend
from surefoot.layers.attention import attend
from surefoot.layers.rotary import inverse_frequencies
from surefoot.ops.attention import gather_pages
from surefoot.verify import inject
from surefoot.verify.faults import ATTENTION, LLAMA, QWEN, Fault

CPU = torch.device("cpu")


# ---- rope


def _table(change):
    """Another table of frequencies: change(rope config, right table, scale) -> table."""

    def apply(target: NativeBackend, scale: float):
        rotary = target.engine.model.rotary
        return inject.attribute(rotary, "inv_freq", change(rotary.config, rotary.inv_freq, scale))

    return apply


def _no_scaling(rope, table, scale):
    plain = inverse_frequencies(replace(rope, rope_type="default"), CPU)
    return table + scale * (plain - table)


def _theta(rope, table, scale):
    return inverse_frequencies(replace(rope, theta=1e4 if rope.theta > 2e4 else 1e6), CPU)


def _theta_factor(rope, table, scale):
    return inverse_frequencies(replace(rope, theta=rope.theta * (1 + scale)), CPU)


def _full_head(rope, table, scale):
    return inverse_frequencies(replace(rope, partial_rotary_factor=1.0), CPU)


def _low_table(rope, table, scale):
    return table.to(torch.bfloat16).float()


def _all_rotary(fn):
    return lambda target, scale: inject.ops(_attentions(target), "rotary", fn)


def _attentions(target: NativeBackend) -> list[Any]:
    return [layer.self_attn for layer in target.engine.model.decoder_layers if hasattr(layer, "self_attn")]


def _interleaved(right, q, k, cos, sin):
    def turned(x):
        width = 2 * cos.shape[-1]
        a, b = x[..., 0:width:2].float(), x[..., 1:width:2].float()
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)
        pairs = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2).to(x.dtype)
        return torch.cat((pairs, x[..., width:]), dim=-1)

    return turned(q), turned(k)


# ---- norms


def _eps(target: NativeBackend, scale: float):
    norm = inject.layer_with(target, "input_layernorm", 1)
    return inject.attribute(norm, "eps", norm.eps * (1 + 9 * scale))


def _plain_norm(target: NativeBackend, scale: float):
    norm = inject.layer_with(target, "post_attention_layernorm", 1)
    return inject.attribute(norm, "scale", norm.scale - scale)


def _bf16_statistics(right, x, weight, eps):
    low = x.to(torch.bfloat16)
    inverse = torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + eps).float()
    return (x.float() * inverse * weight.float()).to(x.dtype)


def _norm_statistics(target: NativeBackend, scale: float):
    return inject.op(inject.layer_with(target, "input_layernorm", 1), "rms_norm", _bf16_statistics)


def _lost_residual(target: NativeBackend, scale: float):
    def forget(right, x, residual, weight, eps):
        return right(x, residual * (1 - scale), weight, eps)[0], x + residual

    return inject.op(inject.layer_with(target, "post_attention_layernorm", 1), "add_rms_norm", forget)


# ---- attention


def dense_attention(q, k_cache, v_cache, table, query_lens, seq_lens, scale, allow, weigh, share):
    """Paged attention with every step open to mistakes; `allow(i, j)` for positions, [n, 1] and [1, length]."""
    out, row = torch.empty_like(q), 0
    for r, (n, length) in enumerate(zip(query_lens, seq_lens)):
        keys = share(gather_pages(k_cache, table[r], length).float(), q.shape[1])
        values = share(gather_pages(v_cache, table[r], length).float(), q.shape[1])
        scores = torch.einsum("qhd,khd->hqk", q[row : row + n].float(), keys) * scale
        i, j = torch.arange(length - n, length).unsqueeze(1), torch.arange(length).unsqueeze(0)
        weights = weigh(scores.masked_fill(~allow(i, j), float("-inf")))
        out[row : row + n] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
        row += n
    return out


def causal(i, j):
    return j <= i


def softmax(scores):
    return scores.softmax(-1)


def spread(x, heads):
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _attention(index: int = 0, allow=causal, weigh=softmax, share=spread, factor=None):
    def wrong(right, q, k_cache, v_cache, table, starts, lens, query_lens, seq_lens, scale):
        scale = scale if factor is None else factor(scale, q.shape[-1])
        return dense_attention(q, k_cache, v_cache, table, query_lens, seq_lens, scale, allow, weigh, share)

    return lambda target, scale: inject.op(inject.layer_with(target, "self_attn", index), "paged_attention", wrong)


def _raw(scores):
    return torch.where(scores.isinf(), torch.zeros_like(scores), scores)


def _leak(target: NativeBackend, scale: float):
    """A future token gets a share of the attention: exp(-x) as much as it would without a mask."""
    penalty = -30.0 * (1 - scale)

    def wrong(right, q, k_cache, v_cache, table, starts, lens, query_lens, seq_lens, factor):
        def weigh(scores):
            n, length = scores.shape[1:]
            i, j = torch.arange(length - n, length).unsqueeze(1), torch.arange(length).unsqueeze(0)
            return (scores + (j > i) * penalty).softmax(-1)

        return dense_attention(
            q, k_cache, v_cache, table, query_lens, seq_lens, factor, lambda i, j: j >= 0 * i, weigh, spread
        )

    return inject.op(inject.layer_with(target, "self_attn", 0), "paged_attention", wrong)


def _gate(target: NativeBackend, scale: float):
    part = inject.layer_with(target, "self_attn", -1)
    return inject.op(part, "sigmoid_mul", lambda right, x, gate: right(x, gate) + scale * (x - right(x, gate)))


def _packing(target: NativeBackend, scale: float):
    """All queries, then all gates: the projection is right and its halves are taken in the wrong order."""
    m = inject.layer_with(target, "self_attn", -1)

    def run(x, cos, sin, batch):
        q, gate = m.q_proj(x).unflatten(-1, (2, -1, m.head_dim)).unbind(-3)
        k, v = m.k_proj(x).unflatten(-1, (-1, m.head_dim)), m.v_proj(x).unflatten(-1, (-1, m.head_dim))
        q, k = ops.rotary(m.q_norm(q), m.k_norm(k), cos, sin)
        out = attend(q, k, v, batch, m.layer_idx, m.scale)
        return m.o_proj(ops.sigmoid_mul(out, gate.flatten(1)))

    return inject.attribute(m, "forward", run)


def _double_sum(target: NativeBackend, scale: float):
    return inject.output(
        inject.layer_with(target, "self_attn", 1 % len(_attentions(target))).o_proj, lambda y: y * (1 + scale)
    )


def _half_sum(target: NativeBackend, scale: float):
    projection = inject.layer_with(target, "mlp", 1).down_proj
    value = projection.weight.clone()
    value[:, value.shape[1] // 2 :] *= 1 - scale
    return inject.weight(projection.weight, value)


def _scaled(config: Any) -> bool:
    return config.rope_parameters.get("rope_type") == "llama3"


NORM = r"model\.layers\.1\.input_layernorm"
ROPE = r"model\.rotary_emb"
FAULTS = [
    Fault(
        "rope_scaling_ignored",
        2,
        r"model\.rotary_emb",
        ("rope_scaling_ignored",),
        _table(_no_scaling),
        LLAMA,
        needs=_scaled,
    ),
    Fault("rope_theta", 2, r"model\.rotary_emb", ("rope_theta",), _table(_theta)),
    Fault("rope_low_precision", 2, r"model\.rotary_emb", ("rope_low_precision",), _table(_low_table)),
    Fault("rope_partial_ignored", 2, r"model\.rotary_emb", ("rope_partial_ignored",), _table(_full_head), QWEN),
    Fault("rope_layout", 2, ATTENTION, ("rope_layout",), _all_rotary(_interleaved)),
    Fault("rope_backwards", 2, ATTENTION, ("rope_backwards",), _all_rotary(lambda r, q, k, c, s: r(q, k, c, -s))),
    Fault("norm_eps", 3, NORM, ("norm_eps",), _eps, scales=True),
    Fault("norm_plus_one", 3, r"model\.layers\.1\.post_attention_layernorm", ("norm_plus_one",), _plain_norm, QWEN),
    Fault(
        "norm_low_precision",
        3,
        r"model\.layers\.1\.input_layernorm",
        ("norm_low_precision",),
        _norm_statistics,
        subtle=True,
    ),
    Fault("residual_dropped", 3, r"model\.layers\.1\.post_attention_layernorm", ("residual_dropped",), _lost_residual),
    Fault("mask_dropped", 4, ATTENTION, ("mask_dropped",), _attention(allow=lambda i, j: j >= 0 * i)),
    Fault("mask_off_by_one", 4, ATTENTION, ("mask_off_by_one",), _attention(allow=lambda i, j: j <= i + 1)),
    Fault(
        "mask_ignored_past", 4, ATTENTION, ("mask_ignored_past",), _attention(allow=lambda i, j: (j <= i) | (i >= 32))
    ),
    Fault("window", 4, ATTENTION, ("window",), _attention(allow=lambda i, j: (j <= i) & (j > i - 16))),
    Fault("softmax_missing", 4, ATTENTION, ("softmax_missing",), _attention(weigh=_raw)),
    Fault("score_scale", 4, ATTENTION, ("score_scale",), _attention(factor=lambda scale, dim: 1 / dim)),
    Fault(
        "gqa_mapping",
        7,
        ATTENTION,
        ("gqa_mapping",),
        _attention(share=lambda x, h: x.repeat(1, h // x.shape[1], 1)),
        LLAMA,
        needs=lambda c: 1 < c.num_key_value_heads < c.num_attention_heads,
    ),
    Fault("all_reduce_double", 7, ATTENTION + r"\.o_proj", ("all_reduce",), _double_sum),
    Fault("all_reduce_missing", 7, r"model\.layers\.1\.mlp\.down_proj", ("all_reduce",), _half_sum),
    Fault("gate_dropped", 13, ATTENTION, ("gate_dropped",), _gate, QWEN, scales=True),
    Fault("gate_packing", 13, ATTENTION + r"(\.q_proj)?", ("gate_packing",), _packing, QWEN),
]
