"""Candidate mistakes of the gated delta net: convolution, gates, heads, state precision, and what the state held.

Each exchanges one step of `recipes.delta`. Where the engine is ours, states are read as well (`cacheprobe`): a state
must be zero at the start and, bit for bit, what the step before has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from surefoot.verify import recipes
from surefoot.verify.cacheprobe import CacheRead, StateCall
from surefoot.verify.candidates import Candidate, Case, Variant
from surefoot.verify.recipes import Facts, delta


def facts(case: Case) -> Facts:
    empty = torch.empty(0)
    return Facts(case.module, empty, empty, case.suspect.on)


def _run(case: Case, **steps: Callable[..., Any]) -> torch.Tensor:
    return case.like(delta(facts(case), case.x, **steps))


def _bounds(case: Case) -> list[tuple[int, int]]:
    """Pieces in which the tokens were computed for the last time."""
    last = next((i for i in reversed(range(len(case.suspect.on.chunks))) if case.suspect.on.chunks[i][0] == 0), 0)
    return case.suspect.on.chunks[last:] or [(0, case.replay.num_tokens)]


def _precision(case: Case) -> Iterator[Variant]:
    ends = {end - 1 for _, end in _bounds(case)}
    blocks = ends | {t for t in range(case.replay.num_tokens) if t % 64 == 63}
    every = set(range(case.replay.num_tokens))
    for dtype in (torch.bfloat16, torch.float16):
        for label, when in (("each token", every), ("each step", ends), ("each block of 64", blocks)):

            def rounded(f: Facts, state, token, dtype=dtype, when=when):
                return state.to(dtype).float() if token in when else state

            yield f"{str(dtype)[6:]} after {label}", _run(case, store=rounded)


def _conv_shift(case: Case) -> Iterator[Variant]:
    def late(f: Facts, mixed):
        return recipes.convolve(f, torch.cat((mixed[:1] * 0, mixed[:-1])))

    def flipped(f: Facts, mixed):
        weight = f.module.conv1d.weight.float()
        ahead = mixed.new_zeros(weight.shape[-1] - 1, mixed.shape[1])
        return F.silu(F.conv1d(torch.cat((ahead, mixed)).t()[None], weight.flip(-1), groups=len(weight))[0].t())

    yield "inputs are one token late", _run(case, convolve=late)
    yield "the kernel runs backwards", _run(case, convolve=flipped)
    if len(_bounds(case)) > 1:
        yield "the carried inputs are one token late", _run(case, convolve=_carried(case, 1))


def _carried(case: Case, late: int | None) -> Callable[[Facts, torch.Tensor], torch.Tensor]:
    """Convolution in pieces whose carried inputs are `late` tokens late; None: zeros."""

    def convolve(f: Facts, mixed: torch.Tensor) -> torch.Tensor:
        width = f.module.conv1d.weight.shape[-1] - 1
        padded = torch.cat((mixed.new_zeros(width + (late or 0), mixed.shape[1]), mixed))
        rows = []
        for start, end in _bounds(case):
            before = padded[start : start + width] if late is not None else padded[:width] * 0
            rows.append(recipes.raw_convolution(f, mixed[start:end], before))
        return F.silu(torch.cat(rows))

    return convolve


def _conv_lost(case: Case) -> Iterator[Variant]:
    if len(_bounds(case)) > 1:
        yield "each step starts with zeros", _run(case, convolve=_carried(case, None))


def _state_lost(case: Case) -> Iterator[Variant]:
    ends = {end - 1 for _, end in _bounds(case)}
    if len(ends) > 1:

        def forget(f: Facts, state, token):
            return state * 0 if token in ends else state

        yield "the recurrent state starts from zero at each step", _run(case, store=forget)
        yield "recurrent and convolution state start from zero", _run(case, store=forget, convolve=_carried(case, None))


def _conv_activation(case: Case) -> Iterator[Variant]:
    yield "no SiLU behind the convolution", _run(case, convolve=recipes.raw_convolution)
    yield "no convolution", _run(case, convolve=lambda f, mixed: F.silu(mixed))


def _decay(case: Case) -> Iterator[Variant]:
    def no_bias(f: Facts, x):
        return -f.module.A_log.float().exp() * F.softplus(f.module.in_proj_a(x))

    yield "the state does not decay", _run(case, decay=lambda f, x: recipes.decay(f, x) * 0)
    yield "dt_bias is left out", _run(case, decay=no_bias)
    yield (
        "A_log is taken as A",
        _run(
            case,
            decay=lambda f, x: -f.module.A_log.float().abs() * F.softplus(f.module.in_proj_a(x) + f.module.dt_bias),
        ),
    )
    for dtype in (torch.bfloat16, torch.float16):
        yield f"A_log in {str(dtype)[6:]}", _run(case, decay=lambda f, x, dtype=dtype: _low_a(f, x, dtype))


def _low_a(f: Facts, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    m = f.module
    return -m.A_log.to(dtype).exp().float() * F.softplus(m.in_proj_a(x) + m.dt_bias.float())


def _rate(case: Case) -> Iterator[Variant]:
    yield "beta is always one", _run(case, rate=lambda f, x: recipes.rate(f, x) * 0 + 1)
    yield "beta without its sigmoid", _run(case, rate=lambda f, x: f.module.in_proj_b(x))
    yield "beta is doubled", _run(case, rate=lambda f, x: recipes.rate(f, x) * 2)


def _unit(case: Case) -> Iterator[Variant]:
    yield "queries and keys keep their length", _run(case, unit=lambda f, q, k: (q, k))


def _query_scale(case: Case) -> Iterator[Variant]:
    yield "queries are not scaled", _run(case, scale_query=lambda f, q: q)
    yield "queries are scaled by 1 / D", _run(case, scale_query=lambda f, q: q / q.shape[-1])


def _heads(case: Case) -> Iterator[Variant]:
    group = case.module.num_v_heads // case.module.num_k_heads
    if group > 1:
        yield (
            "value head h reads key head h mod Hk",
            _run(case, spread=lambda f, q, k: (q.repeat(1, group, 1), k.repeat(1, group, 1))),
        )


def _no_delta(case: Case) -> Iterator[Variant]:
    yield "the state's own answer is not subtracted", _run(case, correction=lambda f, s, k, v: v)


def _gate(case: Case) -> Iterator[Variant]:
    def finish(f: Facts, out, x, gate: Callable[[torch.Tensor], torch.Tensor]):
        m = f.module
        rows = out.reshape(-1, m.head_v_dim)
        flat = torch.full_like(rows, 1.2784645427610738)  # SiLU of this is one
        z = m.in_proj_z(x).reshape(-1, m.head_v_dim)
        return m.out_proj((m.norm(rows, flat) * gate(z)).reshape(len(x), -1))

    yield "the output gate is left out", _run(case, finish=lambda f, o, x: finish(f, o, x, torch.ones_like))
    yield "sigmoid instead of SiLU", _run(case, finish=lambda f, o, x: finish(f, o, x, torch.sigmoid))


def _padding(case: Case) -> Iterator[Variant]:
    """After each piece, rows of zeros up to a multiple of 8, 16 or 64 pass through the recurrence as well."""
    for size in (8, 16, 64):
        counts = {end - 1: -(end - start) % size for start, end in _bounds(case)}

        def padded(f: Facts, state, token, counts=counts):
            fade = (-f.module.A_log.float().exp() * F.softplus(f.module.dt_bias.float())).exp()
            return state * fade[:, None, None] ** counts.get(token, 0)

        if len(counts) > 1:
            yield f"pieces padded to multiples of {size}", _run(case, store=padded)


ARITHMETIC = [
    Candidate("state_precision", "the recurrent state is kept in 16 bits", "gated_delta_chunk", _precision),
    Candidate("conv_shifted", "the convolution is shifted by one token", "causal_conv", _conv_shift),
    Candidate("conv_state_lost", "the convolution state is not carried", "causal_conv", _conv_lost),
    Candidate("state_lost", "the recurrent state is not carried between steps", "gated_delta_chunk", _state_lost),
    Candidate("conv_activation", "the convolution or its activation is missing", "causal_conv", _conv_activation),
    Candidate("decay_wrong", "the decay of the state is wrong", "delta_gates", _decay),
    Candidate("beta_wrong", "the write rate beta is wrong", "delta_gates", _rate),
    Candidate("l2norm_dropped", "queries and keys are not normalised", "gated_delta_chunk", _unit),
    Candidate("score_scale", "queries of the delta rule have the wrong scale", "gated_delta_chunk", _query_scale),
    Candidate("gqa_mapping", "value heads read the wrong key heads", "gated_delta_chunk", _heads),
    Candidate("delta_rule_dropped", "plain linear attention instead of the delta rule", "gated_delta_chunk", _no_delta),
    Candidate("gate_dropped", "the output gate is missing or wrong", "gated_rms_norm", _gate),
    Candidate("padding_in_recurrence", "padding goes through the recurrence", "gated_delta_chunk", _padding),
]


# ---- what the state held


def with_states(case: Case, found: CacheRead) -> torch.Tensor:
    """Right arithmetic from the states that were found at the start of each step."""
    conv = {call.start: call.before for call in _last(found.conv)}
    recurrent = {call.start: call.before for call in _last(found.recurrent)}

    def convolve(f: Facts, mixed: torch.Tensor) -> torch.Tensor:
        starts = sorted({0, *conv})
        ends = [*starts[1:], len(mixed)]
        rows = [
            recipes.raw_convolution(f, mixed[a:b], conv[a].t() if a in conv else None) for a, b in zip(starts, ends)
        ]
        return F.silu(torch.cat(rows))

    def store(f: Facts, state: torch.Tensor, token: int) -> torch.Tensor:
        return recurrent.get(token + 1, state)

    return _run(case, convolve=convolve, store=store, initial=lambda f, s: recurrent.get(0, s))


RESTORED = 0.1  # a state restored rightly differs by the rounding of the dtype only


def _last(calls: Sequence[StateCall]) -> list[StateCall]:
    """The calls of the last time that the sequence was computed from its first token."""
    first = max((i for i, call in enumerate(calls) if call.start == 0), default=0)
    return list(calls[first:])


def what_is_wrong(case: Case, found: CacheRead) -> tuple[str, str] | None:
    """Id and label of a state mistake, from the states that were found; None if they are in order."""
    if any(call.shared for call in found.recurrent):
        return "state_slot_shared", "two rows of one batch have the same slot"
    for name, calls in (("recurrent", _last(found.recurrent)), ("convolution", _last(found.conv))):
        for i, call in enumerate(calls):
            last = next((c for c in reversed(calls[:i]) if c.end == call.start), None)
            wrong = _break(last, call, name) if last or not call.start else _restored(case, call, name)
            if wrong:
                return ("prefix_hit_wrong", wrong[1]) if case.suspect.on.path == "prefix_hit" else wrong
    return None


def _restored(case: Case, call: StateCall, name: str) -> tuple[str, str] | None:
    """A state that no watched step has left: it must be what the tokens before it give."""
    f, x = facts(case), case.x[: call.start]
    if name == "recurrent":
        right = recipes.scan(f, x, recipes.DELTA)[1]
    else:
        right = f.module.in_proj_qkv(x)[-call.before.shape[-1] :].t()
    if float((call.before - right).norm()) <= RESTORED * float(right.norm()):
        return None
    return "state_overwritten", f"the {name} state that was restored before token {call.start} is another one"


def _break(last: StateCall | None, call: StateCall, name: str) -> tuple[str, str] | None:
    if last is None:
        if call.start == 0 and not bool((call.before == 0).all()):
            return "stale_state", f"the {name} state is not zero at the first token"
        return None
    if torch.equal(call.before, last.after):
        return None
    where = f"before token {call.start} the {name} state"
    if float(call.before.abs().max()) == 0:
        return ("state_lost" if name == "recurrent" else "conv_state_lost"), f"{where} is zero"
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(call.before, last.after.to(dtype).float()):
            return "state_precision", f"{where} was kept in {str(dtype)[6:]}"
    if name == "convolution":
        return "conv_shifted", f"{where} is not what the step before has left"
    ratio = (call.before * last.after).sum((-1, -2)) / last.after.pow(2).sum((-1, -2)).clamp(min=1e-30)
    rest = call.before - ratio[:, None, None] * last.after
    if float(rest.norm()) < 0.05 * float(last.after.norm()) and float(ratio.max()) <= 1:
        return "padding_in_recurrence", f"{where} has decayed further than its tokens explain"
    return "state_overwritten", f"{where} is not what the step before has left"
