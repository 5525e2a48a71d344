"""Why a target goes wrong: the mistake that, made in the reference, gives the target's output down to the noise.

`name_cause` works inside one module, on what `localise` found there. `name_prompt_cause` compares token ids,
`name_sampler_cause` log-probabilities. None of them guesses: without a match within the noise there is no name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from surefoot.backends.base import Backend
from surefoot.backends.native import NativeBackend
from surefoot.layers.quant_linear import QuantLinear
from surefoot.verify import (
    cacheprobe,
    candidates,
    candidates_attention,
    candidates_delta,
    candidates_quant,
    candidates_rope,
)
from surefoot.verify.candidates import Candidate, Case
from surefoot.verify.exact_causes import exact_cause
from surefoot.verify.localise import Search, distance, judge, search
from surefoot.verify.pathcapture import captures, plain
from surefoot.verify.quantised import QuantisedLinear, dequantised
from surefoot.verify.replay import LAYER, perturbed, roundings, row_norm, unit_roundoff
from surefoot.verify.shapes import Cause, Finding, Localisation, VerifySettings

# What was read from a cache must explain the error at least but for this part of it.
EXPLAINED = 0.05


def kind(path: str, module: nn.Module) -> str:
    """What sort of module a path is, as the catalogue of candidates has it."""
    last = path.rpartition(".")[-1]
    if LAYER.fullmatch(path):
        return "residual"
    if last in ("self_attn", "linear_attn", "mlp", "rotary_emb"):
        return last
    if isinstance(module, nn.Linear):
        return "quantised" if isinstance(module, QuantisedLinear) else "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if last.endswith("norm") else "other"


CANDIDATES: dict[str, list[Candidate]] = {
    "norm": candidates.NORM,
    "linear": candidates.LINEAR,
    "quantised": candidates_quant.QUANTISED,
    "embedding": candidates.EMBEDDING,
    "mlp": candidates.MLP,
    "residual": candidates.RESIDUAL,
    "rotary_emb": candidates_rope.ROTARY,
    "self_attn": candidates_attention.ARITHMETIC,
    "linear_attn": candidates_delta.ARITHMETIC,
}


def find(
    reference: Backend,
    target: Backend,
    token_ids: Sequence[int],
    settings: VerifySettings,
    finding: Finding | None = None,
) -> tuple[Localisation | None, Cause | None]:
    """`localise` and `name_cause` in one search.

    finding: the check that failed. What an exact check has seen holds even where its effect drowns in the noise.
    """
    found = search(reference, target, token_ids, settings)
    place, cause = (found.localisation, explain(found, target, settings)) if found else (None, None)
    exact = exact_cause(finding, reference) if finding is not None else None
    if exact is not None and (place is None or cause is None or place.module != exact[0]):
        return Localisation(exact[0], None, 0.0, 0.0, place.table if place else []), exact[1]
    return place, cause


def name_cause(
    reference: Backend,
    target: Backend,
    token_ids: Sequence[int],
    localisation: Localisation | None,
    settings: VerifySettings,
) -> Cause | None:
    """The cause at the place that `localise` named, or None if no candidate gives the target's output."""
    paths = None if localisation is None else sorted({row["on"] for row in localisation.table if "on" in row})
    found = search(reference, target, token_ids, settings, paths or None)
    if found is None:
        return None
    cause = explain(found, target, settings)
    if localisation is not None and localisation.op is None:
        localisation.op = found.localisation.op
    return cause


@torch.inference_mode()
def explain(found: Search, target: Backend, settings: VerifySettings) -> Cause | None:
    """The best explanation of one search; sets the localisation's op where the cause knows it."""
    case = Case(found.suspect, found.replay, parameters(target), found.dtype)
    what, limit = kind(found.suspect.path, case.module), settings.noise_factor
    overflow = _overflow(found)
    if overflow is not None:
        return _from_cache(case, found, target, what, limit) or overflow
    ranked = _rank(case, CANDIDATES.get(what, ()))
    if ranked and ranked[0][0] <= limit:
        cause, op = _cause(ranked)
        found.localisation.op = found.localisation.op or op
        return cause
    return (
        _from_cache(case, found, target, what, limit)
        or _from_weights(case, limit)
        or _unsteady(found, target)
        or _kernel(found)
    )


def parameters(target: Backend) -> Mapping[str, torch.Tensor]:
    """The target's own parameters by HF name, where it shows them."""
    model = target.engine.model if isinstance(target, NativeBackend) else getattr(target, "model", None)
    named = model.named_parameters(remove_duplicate=False) if isinstance(model, nn.Module) else ()
    found = {plain(name): parameter for name, parameter in named if not parameter.is_meta}
    layers = model.named_modules() if isinstance(model, nn.Module) else ()
    return found | {f"{plain(n)}.weight": dequantised(m) for n, m in layers if isinstance(m, QuantLinear)}


def apart(case: Case, output: torch.Tensor) -> float:
    """Distance of a counterfactual output to the target's, in units of the noise of numbers of that size."""
    s = case.suspect
    larger = (row_norm(output) / row_norm(s.right).clamp(min=1e-30)).clamp(min=1.0)
    return distance(s.got, output, s.noise * larger)


Ranked = list[tuple[float, Candidate, str]]


def _rank(case: Case, tried: Iterable[Candidate]) -> Ranked:
    """Every candidate by the distance of its best variant, nearest first; of equals, the first in the catalogue."""
    ranked = []
    for candidate in tried:
        best, number, label = math.inf, 0, ""
        for i, (text, output) in enumerate(candidate.variants(case)):
            if output.shape == case.suspect.got.shape and (away := apart(case, output)) < best:
                best, number, label = away, i, text
        if best < math.inf:
            ranked.append((_unsettled(case, candidate, number, best), candidate, label))
    return sorted(ranked, key=lambda entry: entry[0])


def _unsettled(case: Case, candidate: Candidate, number: int, away: float) -> float:
    """The distance again, in units of the mistake's own noise if that is larger.

    A state that is rounded at each token magnifies the smallest difference: two right simulations of that very mistake
    differ by more than two right modules. Only for a candidate that explains at least half of the error.
    """
    if away <= 1 or away > 0.5 * case.suspect.excess or case.suspect.given is None or not case.x.is_floating_point():
        return away
    step = unit_roundoff(case.dtype) * (roundings(case.suspect.path) if case.dtype == torch.float32 else 1.0)
    moved = replace(case.suspect, given=perturbed(case.x, step, torch.Generator().manual_seed(1)))
    outputs = [o for _, o in candidate.variants(case)], [o for _, o in candidate.variants(replace(case, suspect=moved))]
    noise = row_norm(outputs[0][number] - outputs[1][number])
    # One sample of a noise may be small by luck; the rows of one output are of one kind.
    noise = torch.maximum(noise, row_norm(case.suspect.right) * (noise / row_norm(case.suspect.right)).median())
    return distance(case.suspect.got, outputs[0][number], torch.maximum(noise, case.suspect.noise))


def _cause(ranked: Ranked) -> tuple[Cause, str | None]:
    away, first, label = ranked[0]
    second = ranked[1] if len(ranked) > 1 else None
    sentence = f"{first.sentence}: {label}"
    cause = Cause(first.name, sentence, away, second[1].name if second else None, second[0] if second else None)
    return cause, first.op


def _overflow(found: Search) -> Cause | None:
    """Values that are not finite: does right arithmetic in this dtype give them too?"""
    suspect = found.suspect
    broken = ~torch.isfinite(suspect.got)
    if not bool(broken.any()):
        return None
    token = int(broken.reshape(len(broken), -1).any(-1).nonzero()[0])
    if suspect.given is not None and found.dtype != torch.float32:
        given = suspect.given if not suspect.given.is_floating_point() else torch.nan_to_num(suspect.given)
        same = found.replay.run(suspect.path, given, found.dtype, suspect.second).reshape(broken.shape)
        if bool((~torch.isfinite(same) & broken).any()):
            largest = float(suspect.right.abs().max())
            dtype = str(found.dtype).removeprefix("torch.")
            text = f"values overflow {dtype}: the right output reaches {largest:.3g}, {dtype} ends at "
            return Cause("overflow", f"{text}{torch.finfo(found.dtype).max:.4g} (first at token {token})", 0.0)
    bad = int(broken.sum())
    return Cause("not_finite", f"{bad} values are NaN or infinite, first at token {token}, and should not be", 0.0)


def _from_cache(case: Case, found: Search, target: Backend, what: str, limit: float) -> Cause | None:
    """A mixer of our own engine: does right arithmetic on what it read from its cache give its output?"""
    if what not in ("self_attn", "linear_attn") or not isinstance(target, NativeBackend):
        return None
    kit = candidates_attention if what == "self_attn" else candidates_delta
    held = cacheprobe.read(target, case.suspect.path, case.suspect.on.path, found.replay.token_ids)
    again = judge(found.replay, case.suspect.path, held.on, found.dtype) if held.on else None
    if again is None:
        return None
    case = replace(case, suspect=again)
    wrong = kit.what_is_wrong(case, held)
    if wrong is None:
        return None
    compute = candidates_attention.with_cache if what == "self_attn" else candidates_delta.with_states
    away = apart(case, compute(case, held))
    seen = wrong[0] in ("state_slot_shared", "stale_state")  # no arithmetic is needed to see that
    if not seen and not (away <= limit or away <= EXPLAINED * case.suspect.excess < math.inf):
        return None
    op = "kv_write" if what == "self_attn" else "gated_delta_chunk"
    found.localisation.op = found.localisation.op or op
    return Cause(wrong[0], f"{CACHE_SENTENCES.get(wrong[0], 'the cache is wrong')}: {wrong[1]}", away)


CACHE_SENTENCES = {
    "kv_slot_off_by_one": "keys and values are written one slot off",
    "block_table": "the block table points to another page",
    "prefix_hit_wrong": "a prefix hit took what belongs to other tokens",
    "preemption_state_lost": "after a preemption a request goes on with what is not its own",
    "kv_not_written": "the KV cache does not hold what was computed",
    "stale_state": "the state of a new request is not clean",
    "state_lost": "the recurrent state is not carried between steps",
    "conv_state_lost": "the convolution state is not carried between steps",
    "conv_shifted": "the convolution state is shifted",
    "state_precision": "the recurrent state is kept in 16 bits",
    "padding_in_recurrence": "padding goes through the recurrence",
    "state_slot_shared": "a padded or foreign row writes into the recurrent state",
    "state_overwritten": "someone else writes into the recurrent state",
}


def _from_weights(case: Case, limit: float) -> Cause | None:
    """The reference module with the target's own weights: if that matches, the arithmetic is right."""
    path = case.suspect.path
    mine = {n: w for n, w in case.weights.items() if n.startswith(path + ".")}
    own = dict(case.module.named_parameters())
    if not mine or any(f"{path}.{n}" not in mine or mine[f"{path}.{n}"].shape != p.shape for n, p in own.items()):
        return None
    import copy

    twin = copy.deepcopy(case.module)
    with torch.no_grad():
        for n, p in twin.named_parameters():
            p.copy_(mine[f"{path}.{n}"].float())
    if case.suspect.given is None:
        return None
    output = case.replay.run(path, case.suspect.given, second=case.suspect.second, module=twin)
    away = apart(case, case.like(output))
    if away > limit:
        return None
    changed = [n for n, p in own.items() if not torch.equal(p.float(), mine[f"{path}.{n}"].float().to(p.device))]
    return Cause("weight_changed", f"the weights in memory are not the checkpoint's: {', '.join(changed)}", away)


def _unsteady(found: Search, target: Backend) -> Cause | None:
    """The same path twice more: right arithmetic repeats itself bit for bit, or at least within the noise."""
    suspect = found.suspect
    runs = []
    for _ in range(2):
        for on in captures(target, found.replay.token_ids, [suspect.on.path]):
            got = on.capture.outputs.get(suspect.path)
            runs.append(suspect.got if got is None else got.float().reshape(suspect.got.shape))
    if len(runs) == 2 and distance(runs[0], runs[1], suspect.noise) > 1:
        return Cause("not_repeatable", "two runs of the same path differ: a race or uninitialised memory", 0.0)
    return None


def _kernel(found: Search) -> Cause | None:
    miss = found.mismatch
    if miss is None:
        return None
    shapes = ", ".join("x".join(map(str, s)) for s in miss.shapes[:3])
    text = (
        f"op {miss.op} ({miss.implementation}) differs from its reference by {miss.excess:.3g} tolerances at {shapes}"
    )
    return Cause("kernel", text, 0.0)
