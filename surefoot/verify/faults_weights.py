"""Faults in weights and their quantisation, in the delta net, and in kernels."""

from __future__ import annotations

from typing import Any

import torch

from surefoot.backends.native import NativeBackend
from surefoot.verify import inject
from surefoot.verify.candidates import quantised
from surefoot.verify.faults import ATTENTION, DELTA, QWEN, Fault

# ---- quantisation and weights


def _changed(part: str, leaf: str, change, index: int = 1):
    """Another weight in one dense layer: change(weight, scale) -> weight."""

    def apply(target: NativeBackend, scale: float):
        found = getattr(inject.layer_with(target, part, index), leaf)
        return inject.weight(found.weight, change(found.weight.detach().clone(), scale))

    return apply


def _scale_twice(w, scale):
    q, s = quantised(w)
    return q * s * s


def _scale_axis(w, scale):
    q, s = quantised(w)
    return q * s.t() if len(w) == w.shape[1] else q * s[:1]


def _clamped(w, scale):
    q, s = quantised(w)
    return q.clamp(-63, 63) * s


def _channel_scale(w, scale):
    return w * (1 + 0.5 * scale)


def _random(w, scale):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(w.shape, generator=generator) * w.std()


def _shards(w, scale):
    return torch.cat(w.chunk(2, 0)[::-1])


def _swap(target: NativeBackend, scale: float):
    mlp = inject.layer_with(target, "mlp", 1)
    return inject.attribute(mlp, "_modules", mlp._modules | {"gate_proj": mlp.up_proj, "up_proj": mlp.gate_proj})


def _other_layer(target: NativeBackend, scale: float):
    part = "mlp"
    here, there = inject.layer_with(target, part, 1), inject.layer_with(target, part, 2)
    return inject.weight(here.down_proj.weight, there.down_proj.weight.detach().clone())


def _untied(target: NativeBackend, scale: float):
    head = target.engine.model.lm_head
    own = torch.nn.Parameter(_random(head.weight.detach(), scale).to(head.weight.dtype), requires_grad=False)
    return inject.attribute(head, "weight", own)


def _zeroed(w, scale):
    return torch.zeros_like(w)


# ---- delta net


def _delta_op(name: str, fn, index: int = 1):
    return lambda target, scale: inject.op(inject.layer_with(target, "linear_attn", index), name, fn)


def _low_state(dtype: torch.dtype):
    """State kept in 16 bits: rounded after every token."""

    def apply(target: NativeBackend, scale: float):
        def chunk(right, q, k, v, g, beta, state, slots, starts, lens):
            out, row = torch.empty_like(v), 0
            for i, n in enumerate(lens):
                for t in range(row, row + n):
                    one = slice(t, t + 1)
                    out[one] = right(
                        q[one], k[one], v[one], g[one], beta[one], state, slots[i : i + 1], starts[:2] * 0, [1]
                    )
                    state[slots[i]] = state[slots[i]].to(dtype).float()
                row += n
            return out

        return inject.op(inject.layer_with(target, "linear_attn", 1), "gated_delta_chunk", chunk)

    return apply


def _late_inputs(right, x, weight, bias, state, slots, starts, lens):
    shifted, row = x.clone(), 0
    for n in lens:
        shifted[row] = 0
        shifted[row + 1 : row + n] = x[row : row + n - 1]
        row += n
    return right(shifted, weight, bias, state, slots, starts, lens)


def _no_dt_bias(right, a, b, a_log, dt_bias):
    return right(a, b, a_log, dt_bias * 0)


def _no_l2(right, q, k, v, g, beta, state, slots, starts, lens):
    group = v.shape[1] // k.shape[1]
    q, k = q.float() * q.shape[-1] ** -0.5, k.float()
    q, k = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)
    out, row = torch.empty_like(v), 0
    for i, n in enumerate(lens):
        s = state[slots[i]]
        for t in range(row, row + n):
            s = s * g[t].exp()[:, None, None]
            change = beta[t].unsqueeze(-1) * (v[t].float() - torch.einsum("hk,hkv->hv", k[t], s))
            s = s + k[t].unsqueeze(-1) * change.unsqueeze(-2)
            out[t] = torch.einsum("hk,hkv->hv", q[t], s).to(v.dtype)
        state[slots[i]] = s
        row += n
    return out


def _tiled_heads(right, q, k, v, *rest):
    group = v.shape[1] // k.shape[1]
    return right(q.repeat(1, group, 1), k.repeat(1, group, 1), v, *rest)


def _beta_one(right, a, b, a_log, dt_bias):
    g, beta = right(a, b, a_log, dt_bias)
    return g, torch.ones_like(beta)


def _no_z(right, x, gate, weight, eps):
    return right(x, torch.full_like(gate, 1.2784645427610738), weight, eps)


# ---- kernels


def _tail(right, gate, up):
    """The lanes of the last block are left as they were."""
    out = right(gate, up)
    if len(out) > 32:
        out[32:, -5:] = 0
    return out


def _half_accumulate(right, x, weight, bias=None):
    parts = [torch.nn.functional.linear(a, b).half() for a, b in zip(x.split(16, -1), weight.split(16, -1))]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(x.dtype) if bias is None else (total + bias).to(x.dtype)


def _kernel(part: str, name: str, fn):
    return lambda target, scale: inject.op(inject.layer_with(target, part, 1), name, fn, "planted_kernel")


def _nan(target: NativeBackend, scale: float):
    def spoil(y):
        y = y.clone()
        y[len(y) // 2, 3] = float("nan")
        return y

    return inject.output(inject.layer_with(target, "mlp", 1), spoil)


def _grouped(config: Any) -> bool:
    return 1 < config.linear_num_key_heads < config.linear_num_value_heads


FAULTS = [
    Fault("not_finite", 5, r"model\.layers\.1\.mlp", ("not_finite",), _nan),
    Fault(
        "scale_twice", 8, r"model\.layers\.1\.mlp\.up_proj", ("scale_twice",), _changed("mlp", "up_proj", _scale_twice)
    ),
    Fault(
        "scale_axis",
        8,
        ATTENTION + r"\.k_proj|.*\.o_proj",
        ("scale_axis",),
        _changed("self_attn", "o_proj", _scale_axis, 0),
    ),
    Fault(
        "quant_clamped", 8, r"model\.layers\.1\.mlp\.up_proj", ("quant_clamped",), _changed("mlp", "up_proj", _clamped)
    ),
    Fault(
        "weight_not_loaded",
        9,
        r"model\.layers\.1\.mlp\.up_proj",
        ("weight_not_loaded",),
        _changed("mlp", "up_proj", _random),
    ),
    Fault(
        "weight_zero",
        9,
        r"model\.layers\.1\.mlp\.gate_proj",
        ("weight_not_loaded",),
        _changed("mlp", "gate_proj", _zeroed),
    ),
    Fault("shard_order", 9, r"model\.layers\.1\.mlp\.up_proj", ("shard_order",), _changed("mlp", "up_proj", _shards)),
    Fault("weight_swapped", 9, r"model\.layers\.1\.mlp\.down_proj", ("weight_swapped",), _other_layer),
    Fault("gate_up_swapped", 9, r"model\.layers\.1\.mlp.*", ("weight_swapped", "gate_up_swapped"), _swap),
    Fault("embedding_untied", 9, r"lm_head", ("embedding_untied",), _untied, needs=lambda c: c.tie_word_embeddings),
    Fault("state_bf16", 13, DELTA, ("state_precision",), _low_state(torch.bfloat16), QWEN, subtle=True),
    Fault("state_fp16", 13, DELTA, ("state_precision",), _low_state(torch.float16), QWEN, subtle=True),
    Fault("conv_shifted", 13, DELTA, ("conv_shifted",), _delta_op("causal_conv", _late_inputs), QWEN),
    Fault("decay_wrong", 13, DELTA, ("decay_wrong",), _delta_op("delta_gates", _no_dt_bias), QWEN),
    Fault("beta_wrong", 13, DELTA, ("beta_wrong",), _delta_op("delta_gates", _beta_one), QWEN),
    Fault("l2norm_dropped", 13, DELTA, ("l2norm_dropped",), _delta_op("gated_delta_chunk", _no_l2), QWEN),
    Fault(
        "delta_heads", 13, DELTA, ("gqa_mapping",), _delta_op("gated_delta_chunk", _tiled_heads), QWEN, needs=_grouped
    ),
    Fault("delta_gate_dropped", 13, DELTA + r"\.norm", ("gate_dropped",), _delta_op("gated_rms_norm", _no_z), QWEN),
    Fault("kernel_tail", 14, r"model\.layers\.1\.mlp", ("kernel",), _kernel("mlp", "swiglu", _tail)),
    Fault(
        "kernel_accumulation",
        14,
        r"model\.layers\.1\.mlp\..*_proj",
        ("kernel",),
        _kernel("mlp", "linear", _half_accumulate),
        subtle=True,
    ),
]
