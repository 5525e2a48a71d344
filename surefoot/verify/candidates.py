"""Candidate mistakes of the simple modules: norms, dense layers, embedding, MLP, residual.

A candidate is a mistake made on purpose: it gives the output that the reference module would have with it. Names are
those that `faults.catalogue` expects. Rotary tables: `candidates_rope`; attention and delta net:
`candidates_attention`, `candidates_delta`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from surefoot.verify.localise import Suspect
from surefoot.verify.quantised import QuantisedLinear
from surefoot.verify.replay import MIXERS, Replay

Variant = tuple[str, torch.Tensor]  # what exactly was tried, and the output [T, ...] that it gives


@dataclass(frozen=True)
class Case:
    """What a candidate may look at. weights: the target's own parameters by name, where it shows them.  dtype: its."""

    suspect: Suspect
    replay: Replay
    weights: Mapping[str, torch.Tensor]
    dtype: torch.dtype = torch.float32

    @property
    def module(self) -> Any:
        return self.replay.module(self.suspect.path)

    @property
    def x(self) -> torch.Tensor:
        assert self.suspect.given is not None
        return self.suspect.given if not self.suspect.given.is_floating_point() else self.suspect.given.float()

    def like(self, value: torch.Tensor) -> torch.Tensor:
        return value.reshape(self.suspect.right.shape)


@dataclass(frozen=True)
class Candidate:
    """name: the mistake's id.  sentence: what it says to a person.  op: where in the module it sits."""

    name: str
    sentence: str
    op: str | None
    variants: Callable[[Case], Iterable[Variant]]


# ---- norms


def norm_scale(case: Case) -> torch.Tensor:
    """What the reference multiplies the normalised row by: its weight, plus one where it is stored minus one."""
    weight = case.module.weight.float()
    return weight + 1 if type(case.module).__name__ == "Qwen3_5RMSNorm" else weight


def norm_eps(case: Case) -> float:
    return float(getattr(case.module, "variance_epsilon", getattr(case.module, "eps", 0.0)))


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _gate(case: Case) -> torch.Tensor | float:
    return 1.0 if case.suspect.second is None else F.silu(case.suspect.second.float().reshape(case.x.shape))


def _norm(case: Case, eps: float | None = None, scale: torch.Tensor | float | None = None) -> torch.Tensor:
    y = normalised(case.x, norm_eps(case) if eps is None else eps)
    return case.like(y * (norm_scale(case) if scale is None else scale) * _gate(case))


def _eps(case: Case) -> Iterator[Variant]:
    own = norm_eps(case)
    for eps in (own * 10, own * 0.1, own * 100, 1e-3, 1e-5, 1e-6, 1e-8, 0.0):
        if eps != own:
            yield f"eps {eps:g} instead of {own:g}", _norm(case, eps)
    fitted = _fitted_eps(case)
    if fitted > own * 1.0001 or fitted < own * 0.9999:
        yield f"eps {fitted:.3g} instead of {own:g}", _norm(case, fitted)


def _fitted_eps(case: Case) -> float:
    """The eps that explains the scale of each row: (ms + eps') = (ms + eps) / s^2; rows of small rms say most."""
    right = case.suspect.right.reshape(case.x.shape)
    got = case.suspect.got.float().reshape(case.x.shape)
    s = (got * right).sum(-1) / right.pow(2).sum(-1).clamp(min=1e-30)
    ms = case.x.pow(2).mean(-1)
    weight = 1 / (ms + norm_eps(case))
    fits = (ms + norm_eps(case)) / s.pow(2) - ms
    return max(0.0, float((fits * weight).sum() / weight.sum()))


def _plus_one(case: Case) -> Iterator[Variant]:
    if type(case.module).__name__ == "Qwen3_5RMSNorm":
        yield "the one that the checkpoint leaves out of the weight is not added", _norm(case, scale=case.module.weight)
    else:
        yield "one is added to a weight that is complete", _norm(case, scale=norm_scale(case) + 1)


def _skipped(case: Case) -> Iterator[Variant]:
    yield "the row passes through as it is", case.like(case.x * _gate(case))
    yield "the row is only multiplied by the weight", case.like(case.x * norm_scale(case) * _gate(case))


def _no_weight(case: Case) -> Iterator[Variant]:
    yield "the weight is left out", _norm(case, scale=1.0)


def _mean(case: Case) -> Iterator[Variant]:
    x = case.x - case.x.mean(-1, keepdim=True)
    yield "the mean is subtracted first", case.like(normalised(x, norm_eps(case)) * norm_scale(case) * _gate(case))


def _statistics(case: Case) -> Iterator[Variant]:
    for dtype in (torch.bfloat16, torch.float16):
        low = case.x.to(dtype)
        inverse = torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + norm_eps(case))
        yield f"the mean square is taken in {_name(dtype)}", case.like(case.x * inverse.float() * norm_scale(case))


def _norm_gate(case: Case) -> Iterator[Variant]:
    if case.suspect.second is not None:
        z = case.suspect.second.float().reshape(case.x.shape)
        y = normalised(case.x, norm_eps(case)) * norm_scale(case)
        yield "the gate is left out", case.like(y)
        yield "the gate goes through a sigmoid instead of SiLU", case.like(y * torch.sigmoid(z))


def _residual_missing(case: Case) -> Iterator[Variant]:
    """The fused norm saw what it was given first, without the residual, or the residual alone."""
    path = case.suspect.path
    layer = path.rpartition(".")[0]
    outputs, inputs = case.suspect.on.capture.outputs, case.suspect.on.capture.inputs
    if path.endswith("post_attention_layernorm"):
        mixed = next(outputs[p] for m in MIXERS if (p := f"{layer}.{m}") in outputs)
        for label, x in (("the residual is not added", mixed), ("only the residual arrives", inputs[layer])):
            yield label, case.like(normalised(x.float(), norm_eps(case)) * norm_scale(case))


NORM = [
    Candidate("norm_eps", "RMSNorm uses a wrong epsilon", "rms_norm", _eps),
    Candidate("norm_plus_one", "RMSNorm weight: stored minus one or not, taken the wrong way", "rms_norm", _plus_one),
    Candidate("norm_weight_ignored", "RMSNorm leaves its weight out", "rms_norm", _no_weight),
    Candidate("norm_skipped", "the norm is not applied", "rms_norm", _skipped),
    Candidate("norm_mean_subtracted", "LayerNorm instead of RMSNorm", "rms_norm", _mean),
    Candidate("norm_low_precision", "RMSNorm statistics are accumulated in 16 bits", "rms_norm", _statistics),
    Candidate("gate_dropped", "the output gate is missing or wrong", "gated_rms_norm", _norm_gate),
    Candidate("residual_dropped", "the residual is missing in front of the norm", "add_rms_norm", _residual_missing),
]


# ---- dense layers


def _linear(case: Case, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    x = case.module.seen(case.x) if isinstance(case.module, QuantisedLinear) else case.x
    return case.like(F.linear(x, weight.float(), bias if bias is None else bias.float()))


def _bias(case: Case) -> torch.Tensor | None:
    return getattr(case.module, "bias", None)


def _bias_dropped(case: Case) -> Iterator[Variant]:
    if _bias(case) is not None:
        yield "the bias is left out", _linear(case, case.module.weight)


def _not_loaded(case: Case) -> Iterator[Variant]:
    yield "all zeros", torch.zeros_like(case.suspect.right)
    name = case.suspect.path + ".weight"
    target = case.weights.get(name)
    if target is not None and target.shape == case.module.weight.shape:
        a, b = target.float().flatten(), case.module.weight.float().flatten()
        if float(F.cosine_similarity(a, b, dim=0).abs()) < 0.1:
            yield "the target's weight has nothing to do with the checkpoint's", _with_weight(case, target)


def _with_weight(case: Case, weight: torch.Tensor) -> torch.Tensor:
    if isinstance(case.module, nn.Embedding):
        return case.like(F.embedding(case.x, weight.float()))
    return _linear(case, weight, _bias(case))


def _transposed(case: Case) -> Iterator[Variant]:
    weight = case.module.weight
    if weight.shape[0] == weight.shape[1]:
        yield "W instead of its transpose", _linear(case, weight.t(), _bias(case))


def _other_weight(case: Case) -> Iterator[Variant]:
    """A weight of the same shape from elsewhere: a swapped neighbour, another layer, a wrong shard."""
    for path, other in case.replay.model.named_modules():
        same = isinstance(other, nn.Linear) and path != case.suspect.path
        if same and path != "lm_head" and not other.weight.is_meta and other.weight.shape == case.module.weight.shape:
            yield f"the weight of {path}", _linear(case, other.weight, other.bias)


def _shards(case: Case) -> Iterator[Variant]:
    for count in (2, 4):
        for dim, what in ((0, "output"), (1, "input")):
            if case.module.weight.shape[dim] % count == 0:
                parts = case.module.weight.chunk(count, dim)
                yield f"{count} {what} shards in reverse order", _linear(case, torch.cat(parts[::-1], dim), _bias(case))


def quantised(weight: torch.Tensor, levels: int = 127) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 per output channel: whole numbers [out, in] and scale [out, 1]."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / levels
    return (weight.float() / scale).round().clamp(-levels, levels), scale


def _scale_twice(case: Case) -> Iterator[Variant]:
    q, s = quantised(case.module.weight)
    yield "the channel scale is applied twice", _linear(case, q * s * s, _bias(case))
    yield "the channel scale is not applied", _linear(case, q, _bias(case))


def _scale_axis(case: Case) -> Iterator[Variant]:
    q, s = quantised(case.module.weight)
    if q.shape[0] == q.shape[1]:
        yield "the channel scale runs along the input axis", _linear(case, q * s.t(), _bias(case))
    yield "every channel has the scale of the first", _linear(case, q * s[:1], _bias(case))


def _clamped(case: Case) -> Iterator[Variant]:
    q, s = quantised(case.module.weight)
    for limit in (7, 15, 31, 63, 64):
        yield f"whole numbers are clamped to ±{limit}", _linear(case, q.clamp(-limit, limit) * s, _bias(case))


def _all_reduce(case: Case) -> Iterator[Variant]:
    if case.suspect.path.endswith(("o_proj", "out_proj", "down_proj")):
        for count in (2, 4, 8):
            given = _bias(case)
            bias = torch.zeros(()) if given is None else given.float()
            yield f"the sum is taken {count} times", case.suspect.right * count - (count - 1) * bias
            yield f"the sum is taken {count} times, bias included", case.suspect.right * count
            width = case.x.shape[-1] // count
            for rank in range(count if case.x.shape[-1] % count == 0 else 0):
                part = slice(rank * width, (rank + 1) * width)
                alone = F.linear(case.x[..., part], case.module.weight.float()[:, part])
                yield f"only part {rank + 1} of {count} is there", case.like(alone + bias)


def _untied(case: Case) -> Iterator[Variant]:
    if case.suspect.path == "lm_head" and case.replay.model.config.tie_word_embeddings:
        target = case.weights.get("lm_head.weight")
        if target is not None:
            yield "the head has a weight of its own", _linear(case, target)
        yield "the head's weight is zero", torch.zeros_like(case.suspect.right)


LINEAR = [
    Candidate("embedding_untied", "the head does not share the embedding's weight", "linear", _untied),
    Candidate("bias_dropped", "a dense layer leaves its bias out", "linear", _bias_dropped),
    Candidate("scale_twice", "a quantisation scale is applied twice or never", "linear", _scale_twice),
    Candidate("scale_axis", "a quantisation scale runs along the wrong axis", "linear", _scale_axis),
    Candidate("quant_clamped", "quantised weights are clamped too early", "linear", _clamped),
    Candidate("all_reduce", "a row-parallel sum is missing or made twice", "linear", _all_reduce),
    Candidate("weight_transposed", "a weight is transposed", "linear", _transposed),
    Candidate("weight_swapped", "the weight of another module is in its place", "linear", _other_weight),
    Candidate("shard_order", "weight shards are joined in the wrong order", "linear", _shards),
    Candidate("weight_not_loaded", "a weight was never loaded", "linear", _not_loaded),
]


# ---- embedding, MLP, residual


def _stale_tokens(case: Case) -> Iterator[Variant]:
    ids = case.x
    yield "each step sees the token of the step before", case.like(F.embedding(_late(ids), case.module.weight.float()))


def _late(x: torch.Tensor) -> torch.Tensor:
    """Each row that of the row before; the first as it is."""
    return torch.cat((x[:1], x[:-1]))


def _shifted_ids(case: Case) -> Iterator[Variant]:
    table = case.module.weight.float()
    for shift in (1, -1):
        ids = (case.x + shift) % len(table)
        yield f"ids are off by {shift}", case.like(F.embedding(ids, table))


def _embedding_scale(case: Case) -> Iterator[Variant]:
    yield "rows are multiplied by sqrt(hidden)", case.suspect.right * case.module.weight.shape[1] ** 0.5


EMBEDDING = [
    Candidate("stale_graph_inputs", "a replayed graph reads the inputs of the step before", "embedding", _stale_tokens),
    Candidate("token_ids_shifted", "token ids are off by one", "embedding", _shifted_ids),
    Candidate("embedding_scaled", "the embedding is scaled", "embedding", _embedding_scale),
    Candidate("weight_not_loaded", "a weight was never loaded", "embedding", _not_loaded),
]


def _mlp(case: Case, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    m: Any = case.module
    return case.like(m.down_proj(combine(m.gate_proj(case.x), m.up_proj(case.x))))


def _activation(case: Case) -> Iterator[Variant]:
    yield "GELU instead of SiLU", _mlp(case, lambda g, u: F.gelu(g) * u)
    yield "tanh GELU instead of SiLU", _mlp(case, lambda g, u: F.gelu(g, approximate="tanh") * u)
    yield "ReLU instead of SiLU", _mlp(case, lambda g, u: F.relu(g) * u)
    yield "no activation", _mlp(case, lambda g, u: g * u)


def _gate_up(case: Case) -> Iterator[Variant]:
    yield "gate and up change places", _mlp(case, lambda g, u: F.silu(u) * g)


def _mlp_gate(case: Case) -> Iterator[Variant]:
    yield "the gate is left out", _mlp(case, lambda g, u: u)


MLP = [
    Candidate("activation", "another activation function", "swiglu", _activation),
    Candidate("gate_up_swapped", "gate and up projections are swapped", "swiglu", _gate_up),
    Candidate("gate_dropped", "the gate is missing", "swiglu", _mlp_gate),
]


def _residual(case: Case) -> Iterator[Variant]:
    outputs, path = case.suspect.on.capture.outputs, case.suspect.path
    mixed = next(outputs[p] for m in MIXERS if (p := f"{path}.{m}") in outputs).float()
    fed = outputs[f"{path}.mlp"].float()
    yield "x is not added", case.like(mixed + fed)
    yield "the mixer's output is not added", case.like(case.x + fed)
    yield "the MLP's output is not added", case.like(case.x + mixed)
    yield "only the MLP's output is left", case.like(fed)
    yield "x is added twice", case.suspect.right + case.x


RESIDUAL = [Candidate("residual_dropped", "a residual is missing or added twice", None, _residual)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
