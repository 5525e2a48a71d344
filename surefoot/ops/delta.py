"""The gated delta rule (Gated Delta Networks, arXiv 2412.06464), the linear attention of Qwen3.5.

Per head, with a state S [Dk, Dv] that decays by exp(g) and is corrected towards the new pair (k, v) with rate beta:

    S <- exp(g_t) S;   S <- S + k_t (beta_t (v_t - k_t^T S))^T;   o_t = S^T q_t

q and k are L2-normalised per head first and q is scaled by Dk^-0.5. All arithmetic and the state are fp32.
NOTE: a state in fp16 or bf16 halves accuracy of trained models; `LinearState.recurrent` is fp32 whatever the dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from surefoot.ops.samples import ELEMENTWISE, REDUCTION, nbytes, randn, starts
from surefoot.ops.spec import Cost, OpSpec, Sample, define, dispatch

L2_EPS = 1e-6


def delta_gates(a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor):
    """Decay and rate per token and value head, both fp32 [T, Hv]: g = -exp(A_log) softplus(a + dt_bias) <= 0 (the log
    of the decay) and beta = sigmoid(b). a, b: [T, Hv] projections; a_log, dt_bias: [Hv]."""
    return dispatch(DELTA_GATES, a.device.type, (a, b, a_log, dt_bias), {})


def gated_delta_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """One token for each of N requests. q, k: [N, Hk, Dk]; v: [N, Hv, Dv] (value head h uses key head h // (Hv / Hk));
    g, beta: [N, Hv] fp32; state: [num_slots, Hv, Dk, Dv] fp32, updated in place at slots [N]. Returns [N, Hv, Dv]."""
    return dispatch(GATED_DELTA_STEP, q.device.type, (q, k, v, g, beta, state, slots), {})


def gated_delta_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    query_start_loc: torch.Tensor,
    query_lens_host: list[int],
) -> torch.Tensor:
    """Several tokens for each of N requests, packed along T; otherwise as `gated_delta_step`."""
    args = (q, k, v, g, beta, state, slots, query_start_loc, query_lens_host)
    return dispatch(GATED_DELTA_CHUNK, q.device.type, args, {})


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + L2_EPS)


def prepare(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    """Normalise, scale and repeat heads: q, k to [T, Hv, Dk], v to [T, Hv, Dv], all fp32."""
    group = v.shape[1] // k.shape[1]
    q = l2_normalise(q) * q.shape[-1] ** -0.5
    k = l2_normalise(k)
    if group > 1:
        q, k = q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)
    return q, k, v.float()


def _gates(a, b, a_log, dt_bias):
    g = -a_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g, torch.sigmoid(b.float())


def _step(q, k, v, g, beta, state, slots):
    dtype = v.dtype
    q, k, v = prepare(q, k, v)
    s = state.index_select(0, slots) * g.exp()[..., None, None]
    delta = beta.unsqueeze(-1) * (v - torch.einsum("nhk,nhkv->nhv", k, s))
    s = s + k.unsqueeze(-1) * delta.unsqueeze(-2)
    state.index_copy_(0, slots, s)
    return torch.einsum("nhk,nhkv->nhv", q, s).to(dtype)


def _chunk(q, k, v, g, beta, state, slots, query_start_loc, query_lens_host):
    out = torch.empty_like(v)
    row = 0
    for i, n in enumerate(query_lens_host):
        for t in range(row, row + n):
            token = slice(t, t + 1)
            out[token] = _step(q[token], k[token], v[token], g[token], beta[token], state, slots[i : i + 1])
        row += n
    return out


def _cost(q, k, v, g, beta, state, slots, query_start_loc=None, query_lens_host=None):
    tokens, heads, dv = v.shape
    dk = q.shape[-1]
    # Decay, read, correct, query: 1 + 2 + 2 + 2 operations per state element and token.
    moved = 2 * slots.numel() * heads * dk * dv * 4
    return Cost(7.0 * tokens * heads * dk * dv, moved + nbytes(q, k, g, beta) + 2 * nbytes(v))


def _samples(*, step: bool):
    def sample(name, lens, hk, hv, dk, dv):
        def make(dtype, device, gen):
            total = sum(lens)
            call = {
                "q": randn((total, hk, dk), dtype, device, gen),
                "k": randn((total, hk, dk), dtype, device, gen),
                "v": randn((total, hv, dv), dtype, device, gen),
                "g": -randn((total, hv), torch.float32, device, gen).abs(),
                "beta": torch.rand(total, hv, generator=gen).to(device),
                "state": randn((len(lens) + 3, hv, dk, dv), torch.float32, device, gen),
                "slots": (torch.randperm(len(lens) + 2, generator=gen)[: len(lens)] + 1).to(device),
            }
            if not step:
                call["query_start_loc"] = torch.tensor(starts(lens), dtype=torch.int32, device=device)
                call["query_lens_host"] = list(lens)
            return call

        return Sample(name, make)

    if step:
        return [
            sample("qwen3.5-0.8b", [1] * 8, 16, 16, 128, 128),
            sample("grouped value heads", [1] * 3, 2, 4, 32, 64),
            sample("one row", [1], 1, 1, 8, 8),
        ]
    return [
        sample("qwen3.5-0.8b", [65], 16, 16, 128, 128),
        sample("chunk edges", [63, 64, 65, 1, 2], 2, 4, 32, 16),
        sample("long decay", [200], 1, 2, 16, 16),
    ]


def _gate_samples():
    def make(dtype, device, gen):
        return {
            "a": randn((9, 16), dtype, device, gen, 3.0),
            "b": randn((9, 16), dtype, device, gen, 3.0),
            "a_log": randn((16,), torch.float32, device, gen),
            "dt_bias": randn((16,), dtype, device, gen),
        }

    return [Sample("9x16", make)]


DELTA_GATES = define(
    OpSpec(
        "delta_gates",
        _gates,
        cost=lambda a, b, a_log, dt_bias: Cost(10.0 * a.numel(), nbytes(a, b) + 8 * a.numel()),
        samples=_gate_samples,
        tolerance=ELEMENTWISE,
    )
)
GATED_DELTA_STEP = define(
    OpSpec(
        "gated_delta_step",
        _step,
        cost=_cost,
        samples=lambda: _samples(step=True),
        tolerance=REDUCTION,
        mutates=("state",),
    )
)
GATED_DELTA_CHUNK = define(
    OpSpec(
        "gated_delta_chunk",
        _chunk,
        cost=_cost,
        samples=lambda: _samples(step=False),
        tolerance=REDUCTION,
        mutates=("state",),
    )
)
