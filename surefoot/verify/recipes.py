"""The two token mixers as chains of named steps over a transformers module's own weights, in fp32.

With every step as it stands here, a recipe gives what the reference module gives (a test holds it to that). A mistake
is one step exchanged for another: `attention(facts, x, rotate=interleaved)`. That is how a cause is tried.

Shapes: x [T, hidden]; q [T, H, D]; k, v [T, Hk, D]; cos, sin [T, R / 2]; scores and weights [H, T, T].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from surefoot.ops.delta import l2_normalise
from surefoot.verify.pathcapture import PathCapture

Steps = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class Facts:
    """What the steps may look at. chunks and block_size: how the path cut the sequence."""

    module: Any
    cos: torch.Tensor
    sin: torch.Tensor
    on: PathCapture


# ---- softmax attention


def project(f: Facts, x: torch.Tensor):
    """q, k, v and the output gate (None without one)."""
    m, dim = f.module, f.module.head_dim
    q, gate = m.q_proj(x).float(), None
    if hasattr(m, "q_norm"):  # Qwen3.5 packs query and gate head by head
        q, gate = q.unflatten(-1, (-1, 2, dim)).unbind(-2)
    else:
        q = q.unflatten(-1, (-1, dim))
    return q, m.k_proj(x).unflatten(-1, (-1, dim)), m.v_proj(x).unflatten(-1, (-1, dim)), gate


def normalise(f: Facts, q: torch.Tensor, k: torch.Tensor):
    return (f.module.q_norm(q), f.module.k_norm(k)) if hasattr(f.module, "q_norm") else (q, k)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + R / 2) of the first R dimensions."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, x[..., 2 * half :]), dim=-1)


def rotate(f: Facts, q: torch.Tensor, k: torch.Tensor):
    return turn(q, f.cos, f.sin), turn(k, f.cos, f.sin)


def cache(f: Facts, k: torch.Tensor, v: torch.Tensor):
    """What is read back after writing; the right cache gives what it was given."""
    return k, v


def share(f: Facts, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
    group = q.shape[1] // k.shape[1]
    return k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)


def scale(f: Facts, scores: torch.Tensor) -> torch.Tensor:
    return scores * f.module.scaling


def visible(f: Facts, count: int) -> torch.Tensor:
    """[T, T] bool: query i sees key j."""
    return torch.ones(count, count, dtype=torch.bool).tril()


def weigh(f: Facts, scores: torch.Tensor) -> torch.Tensor:
    return scores.softmax(-1)


def gate_output(f: Facts, out: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return out if gate is None else out * torch.sigmoid(gate)


def close(f: Facts, out: torch.Tensor) -> torch.Tensor:
    return f.module.o_proj(out.flatten(1))


ATTENTION: Steps = {
    "project": project,
    "normalise": normalise,
    "rotate": rotate,
    "cache": cache,
    "share": share,
    "scale": scale,
    "visible": visible,
    "weigh": weigh,
    "gate_output": gate_output,
    "close": close,
}


@torch.inference_mode()
def attention(f: Facts, x: torch.Tensor, **changed: Callable[..., Any]) -> torch.Tensor:
    """Softmax attention of a whole sequence: [T, hidden] -> [T, hidden]."""
    step = ATTENTION | changed
    q, k, v, gate = step["project"](f, x.float())
    q, k = step["rotate"](f, *step["normalise"](f, q, k))
    k, v = step["cache"](f, k, v)
    k, v = step["share"](f, q, k, v)
    scores = step["scale"](f, torch.einsum("qhd,khd->hqk", q, k))
    hidden = ~step["visible"](f, len(x))
    weights = step["weigh"](f, scores.masked_fill(hidden, float("-inf")))
    out = torch.einsum("hqk,khd->qhd", weights, v)
    return step["close"](f, step["gate_output"](f, out, gate))


# ---- gated delta rule


def convolve(f: Facts, mixed: torch.Tensor) -> torch.Tensor:
    """Causal depthwise convolution, then SiLU: [T, C] -> [T, C]."""
    return F.silu(raw_convolution(f, mixed))


def raw_convolution(f: Facts, mixed: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """`before`: the inputs ahead of the first, [K - 1, C]; zeros unless given."""
    weight = f.module.conv1d.weight.float()
    width = weight.shape[-1] - 1
    ahead = mixed.new_zeros(width, mixed.shape[1]) if before is None else before
    return F.conv1d(torch.cat((ahead, mixed)).t()[None], weight, groups=len(weight))[0].t()


def split(f: Facts, mixed: torch.Tensor):
    m = f.module
    q, k, v = mixed.split([m.key_dim, m.key_dim, m.value_dim], dim=-1)
    heads = (m.num_k_heads, m.head_k_dim)
    return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, (m.num_v_heads, m.head_v_dim))


def unit(f: Facts, q: torch.Tensor, k: torch.Tensor):
    return l2_normalise(q), l2_normalise(k)


def scale_query(f: Facts, q: torch.Tensor) -> torch.Tensor:
    return q * q.shape[-1] ** -0.5


def spread(f: Facts, q: torch.Tensor, k: torch.Tensor):
    """Key heads to value heads: value head h reads key head h // group."""
    group = f.module.num_v_heads // f.module.num_k_heads
    return q.repeat_interleave(group, dim=1), k.repeat_interleave(group, dim=1)


def decay(f: Facts, x: torch.Tensor) -> torch.Tensor:
    m = f.module
    return -m.A_log.float().exp() * F.softplus(m.in_proj_a(x) + m.dt_bias.float())


def rate(f: Facts, x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(f.module.in_proj_b(x))


def initial(f: Facts, state: torch.Tensor) -> torch.Tensor:
    return state


def store(f: Facts, state: torch.Tensor, token: int) -> torch.Tensor:
    """The state [Hv, Dk, Dv] as it is found again after token `token`."""
    return state


def correction(f: Facts, state: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The delta rule writes what the state does not know yet."""
    return v - torch.einsum("hk,hkv->hv", k, state)


def finish(f: Facts, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    m = f.module
    z = m.in_proj_z(x).reshape(-1, m.head_v_dim)
    return m.out_proj(m.norm(out.reshape(-1, m.head_v_dim), z).reshape(len(x), -1))


DELTA: Steps = {
    "convolve": convolve,
    "split": split,
    "unit": unit,
    "scale_query": scale_query,
    "spread": spread,
    "decay": decay,
    "rate": rate,
    "initial": initial,
    "store": store,
    "correction": correction,
    "finish": finish,
}


@torch.inference_mode()
def delta(f: Facts, x: torch.Tensor, **changed: Callable[..., Any]) -> torch.Tensor:
    """Gated delta net of a whole sequence, token by token: [T, hidden] -> [T, hidden]."""
    step = DELTA | changed
    out, _ = scan(f, x, step)
    return step["finish"](f, out, x.float())


def scan(f: Facts, x: torch.Tensor, step: Steps) -> tuple[torch.Tensor, torch.Tensor]:
    """What the state answers, [T, Hv, Dv], and the state after the last token, [Hv, Dk, Dv]."""
    x = x.float()
    q, k, v = step["split"](f, step["convolve"](f, f.module.in_proj_qkv(x)))
    q, k = step["unit"](f, q, k)
    q, k = step["spread"](f, step["scale_query"](f, q), k)
    fade, beta = step["decay"](f, x).exp(), step["rate"](f, x)
    m = f.module
    state = step["initial"](f, torch.zeros(m.num_v_heads, m.head_k_dim, m.head_v_dim))
    rows = []
    for t in range(len(x)):
        state = state * fade[t, :, None, None]
        change = beta[t, :, None] * step["correction"](f, state, k[t], v[t])
        state = state + k[t].unsqueeze(-1) * change.unsqueeze(-2)
        rows.append(torch.einsum("hk,hkv->hv", q[t], state))
        state = step["store"](f, state, t)
    return torch.stack(rows), state
