"""Evidence of the exact checks on an in-process target: weights, settings in effect, and what the sampler takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surefoot.core.sampling import SamplingParams
from surefoot.layers.quant_linear import QuantLinear
from surefoot.verify.pathcapture import plain
from surefoot.verify.quantised import QuantisedWeights, dequantised
from surefoot.weights.checkpoint import Checkpoint

Evidence = dict[str, Any]
PIECE = 4 << 20  # elements hashed at a time
# Tensors of a checkpoint that a text model need not use; a model of ours says more precisely which (`ignored`).
NEVER_USED = (r"mtp\.", r"model\.visual\.", r".*rotary_emb\.inv_freq$")
# What a setting is called in transformers and here.
SETTINGS = {
    "eps": ("eps", "variance_epsilon"),
    "scale": ("scale", "scaling"),
    "head_dim": ("head_dim",),
    "num_k_heads": ("num_k_heads",),
    "num_v_heads": ("num_v_heads",),
    "head_k_dim": ("head_k_dim",),
    "head_v_dim": ("head_v_dim",),
    "conv_kernel": ("conv_kernel", "conv_kernel_size"),
    "sliding_window": ("sliding_window",),
    "softcap": ("attn_logit_softcapping", "softcap"),
}
RTOL = 1e-5  # fp32 formulas for inverse frequencies differ in the last bits


# ---- weights


def weights_evidence(
    target: nn.Module,
    checkpoint: Checkpoint | None,
    reference: nn.Module | None,
    quantised: QuantisedWeights | None = None,
) -> Evidence:
    """Digest of every parameter against the same numbers from the checkpoint, or without one from the reference.

    quantised: the reference's `QuantisedWeights`, if it has them; then quantised layers are compared dequantised.
    """
    source: Any = _FromCheckpoint(checkpoint) if checkpoint is not None else _FromModule(reference)
    held = dict(target.named_parameters(remove_duplicate=False))
    alias_of = {alias: name for alias, name in _ties(target, held).items()}
    layers = _quantised_evidence(target, quantised, source) if quantised is not None else _NOTHING
    items, missing, seen = list(layers.items), list(layers.missing), set(layers.seen)
    digests: dict[int, str] = {}
    for name, parameter in held.items():
        if name in layers.inside:
            continue
        stored = source.find(name) or source.find(alias_of.get(name, name))
        if stored is None or parameter.is_meta:
            missing.append(name)
            continue
        seen.add(stored)
        ours = digests.get(id(parameter)) or _digest(_pieces(parameter))
        digests[id(parameter)] = ours
        items.append([name, _digest(p.to(parameter.dtype) for p in source.pieces(stored)), ours])
    ignored = (*getattr(target, "ignored", ()), *NEVER_USED)
    left = [n for n in source.names() if n not in seen and not any(re.match(p, n) for p in ignored)]
    left = [n for n in left if n not in alias_of]
    return {
        "source": source.what,
        "items": items,
        "missing": missing,
        "unexpected": left,
        # A head that is quantised has a weight of its own.
        "tied": [] if quantised and "lm_head" in quantised.schemes else _tie_facts(target, held, checkpoint),
        "steps": layers.steps,
    }


@dataclass
class _Quantised:
    """Of the quantised layers. inside: the target's parameters that were dealt with.  seen: tensors of the source.

    steps: [layer, how far its weights are off, how far they may be], in steps of the scheme.
    """

    items: list[list[str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    inside: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    steps: list[list[Any]] = field(default_factory=list)


_NOTHING = _Quantised()
STEPS = {8: 0.501, 4: 1.05}  # rounding to nearest; of a positive maximum at 8, int4 may cut off a step
LEAVES = ("weight", "weight_packed", "weight_scale", "weight_shape")


def _quantised_evidence(target: nn.Module, quantised: QuantisedWeights, source: Any) -> _Quantised:
    """The layers that the scheme quantises, as fp32 products of integer and scale on both sides."""
    out = _Quantised()
    modules = {plain(n): (n, m) for n, m in target.named_modules()}
    for path, how in quantised.schemes.items():
        name, layer = modules.get(plain(path), (path, None))
        wanted = quantised.read(f"{path}.weight")
        held = None if layer is None else dequantised(layer) if isinstance(layer, QuantLinear) else layer.weight
        if held is None or held.is_meta:
            out.missing.append(f"{name}.weight")
            continue
        ours = held.detach().cpu().float().contiguous()
        out.items.append([f"{name}.weight", _digest(_pieces(wanted)), _digest(_pieces(ours))])
        out.inside |= {f"{name}.{leaf}" for leaf in LEAVES}
        out.seen |= {found for leaf in LEAVES if (found := source.find(f"{name}.{leaf}")) is not None}
        if quantised.source == "on load":
            out.steps.append([f"{name}.weight", quantised.steps_off(path), STEPS[how.bits]])
    return out


class _FromCheckpoint:
    what = "checkpoint"

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.by_plain = {plain(n): n for n in checkpoint.names()}

    def names(self) -> Iterable[str]:
        return self.checkpoint.names()

    def find(self, name: str) -> str | None:
        return self.by_plain.get(plain(name))

    def pieces(self, name: str) -> Iterable[torch.Tensor]:
        return (p for _, p in self.checkpoint.chunks(name, torch.empty(PIECE * 4, dtype=torch.uint8)))


class _FromModule:
    what = "reference"

    def __init__(self, model: nn.Module | None):
        named = model.named_parameters(remove_duplicate=False) if model else ()
        self.parameters = {plain(n): p for n, p in named if not n.endswith(".scales")}

    def names(self) -> Iterable[str]:
        return self.parameters

    def find(self, name: str) -> str | None:
        return plain(name) if plain(name) in self.parameters else None

    def pieces(self, name: str) -> Iterable[torch.Tensor]:
        return _pieces(self.parameters[name])


def _pieces(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    return tensor.detach().reshape(-1).split(PIECE)


def _digest(pieces: Iterable[torch.Tensor]) -> str:
    sha = hashlib.sha256()
    for piece in pieces:
        sha.update(piece.contiguous().cpu().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return sha.hexdigest()[:32]


def _ties(model: nn.Module, held: dict[str, Any]) -> dict[str, str]:
    """Parameters that share their tensor with an earlier one."""
    first: dict[int, str] = {}
    return {n: first[id(p)] for n, p in held.items() if first.setdefault(id(p), n) != n}


def _tie_facts(model: nn.Module, held: dict[str, Any], checkpoint: Checkpoint | None) -> list[list[Any]]:
    """[alias, name, should be tied, is tied]; copies with equal numbers count as tied."""
    config = checkpoint.config if checkpoint is not None else {}
    text = config.get("text_config") or {}
    should = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    head = held.get("lm_head.weight")
    name, embedding = next(((n, p) for n, p in held.items() if n.endswith("embed_tokens.weight")), ("", None))
    if should is None or head is None or embedding is None:
        return []
    is_tied = head is embedding or (bool(should) and head.shape == embedding.shape and torch.equal(head, embedding))
    return [["lm_head", name.removesuffix(".weight"), bool(should), bool(is_tied)]]


# ---- settings in effect


@torch.inference_mode()
def config_evidence(reference: nn.Module | None, target: nn.Module | None) -> Evidence:
    """What the modules of the target compute with, against the reference's modules of the same path."""
    if reference is None or target is None:
        return {"not_possible": "the modules of one side cannot be seen"}
    theirs = {plain(name): module for name, module in reference.named_modules()}
    items: list[Evidence] = []
    for name, module in target.named_modules():
        other = theirs.get(plain(name))
        if other is None or not name:
            continue
        for key, names in SETTINGS.items():
            a, b = _first(other, names), _first(module, names)
            if a is not None and b is not None:
                items.append({"module": name, "key": key, "reference": a, "target": b, "rtol": RTOL})
        items += _heads(name, other, module) + _frequencies(name, other, module) + _norm(name, other, module)
        items += _scheme(name, other, module)
    return {"items": items + _limits(reference, target)}


def _first(module: Any, names: tuple[str, ...]) -> float | None:
    values = [getattr(module, n, None) for n in names]
    return next((v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)), None)


def _scheme(name: str, reference: Any, target: Any) -> list[Evidence]:
    """How a layer is quantised, where one side quantises it."""
    sides = [getattr(m, "scheme", None) for m in (reference, target)]
    if sides == [None, None] or not isinstance(reference, nn.Linear):
        return []
    shown = ["none" if s is None else f"{s.name}, {s.act} activations" for s in sides]
    return [{"module": name, "key": "quantisation", "reference": shown[0], "target": shown[1]}]


def _heads(name: str, reference: Any, target: Any) -> list[Evidence]:
    def kv_heads(module: Any) -> int | None:
        if isinstance(getattr(module, "num_kv_heads", None), int):
            return module.num_kv_heads
        projection, dim = getattr(module, "k_proj", None), getattr(module, "head_dim", None)
        return projection.out_features // dim if projection is not None and dim else None

    a, b = kv_heads(reference), kv_heads(target)
    return [] if a is None or b is None else [{"module": name, "key": "num_kv_heads", "reference": a, "target": b}]


def _frequencies(name: str, reference: Any, target: Any) -> list[Evidence]:
    a, b = getattr(reference, "inv_freq", None), getattr(target, "inv_freq", None)
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return []
    scaling = [float(getattr(m, "attention_scaling", 1.0)) for m in (reference, target)]
    return [
        {"module": name, "key": "inv_freq", "reference": a.tolist(), "target": b.tolist(), "rtol": RTOL},
        {"module": name, "key": "attention_scaling", "reference": scaling[0], "target": scaling[1], "rtol": RTOL},
    ]


def _norm(name: str, reference: Any, target: Any) -> list[Evidence]:
    """The weight in effect, by feeding ones: it shows an offset (weights stored minus one) that no attribute names."""
    weight = getattr(target, "weight", None)
    is_norm = name.endswith("norm") and getattr(weight, "ndim", 0) == 1 and not name.endswith("linear_attn.norm")
    if not is_norm or not isinstance(weight, torch.Tensor) or reference.weight.is_meta:
        return []  # a streamed reference holds no weights here
    out = []
    for module in (reference, target):
        w = module.weight
        out.append(module(torch.ones(1, w.numel(), dtype=w.dtype, device=w.device)).cpu().double().flatten())
    scale = out[0].abs().max().clamp(min=1e-30)
    off = float((out[0] - out[1]).abs().max() / scale)
    allowed = 2 * torch.finfo(weight.dtype).eps
    return [{"module": name, "key": "weight in effect, off by", "reference": 0.0, "target": off, "atol": allowed}]


def _limits(reference: Any, target: Any) -> list[Evidence]:
    config: Any = getattr(reference, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    pairs = [("vocab_size", getattr(text, "vocab_size", None), getattr(target, "vocab_size", None))]
    layers = len(getattr(target, "decoder_layers", ())) or None
    pairs.append(("num_hidden_layers", getattr(text, "num_hidden_layers", None), layers))
    return [{"module": "model", "key": k, "reference": a, "target": b} for k, a, b in pairs if None not in (a, b)]


# ---- sampler


def sampler_evidence(target: Any, prompts: list[list[int]], eos: Iterable[int], steps: int = 16) -> Evidence:
    """Greedy decoding must take rank 1 of the raw distribution that it reports itself: no penalty, bias or mask.

    Each prompt is doubled, so that a repetition penalty that nobody asked for has something to act on.
    """
    params = SamplingParams(max_tokens=steps, logprobs=0, ignore_eos=True)
    items = []
    for i, done in enumerate(target.generate([p + p for p in prompts], params)):
        for step, found in enumerate(done.logprobs or []):
            items.append({"prompt": i, "step": step, "token": found.token_id, "rank": found.rank})
    if not items:
        return {"not_possible": "the target reports no log-probabilities"}
    return {"items": items, "eos": [sorted(eos), sorted(target.eos_token_ids)]}
