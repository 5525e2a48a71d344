"""Candidate mistakes of softmax attention: rotation, head sharing, mask, scale, softmax, gate, and what the cache held.

Each exchanges one step of `recipes.attention`. Where the engine is ours, what attention really read from the cache is
looked at as well (`cacheprobe`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from surefoot.verify import recipes
from surefoot.verify.cacheprobe import CacheRead
from surefoot.verify.candidates import Candidate, Case, Variant
from surefoot.verify.candidates_rope import ROPE_SENTENCES, rope_config, rope_mistakes
from surefoot.verify.recipes import Facts, attention

WINDOWS = tuple(1 << n for n in range(2, 13))


def facts(case: Case) -> Facts:
    cos, sin = case.replay.calls[case.suspect.path].kwargs["position_embeddings"]
    half = cos.shape[-1] // 2
    return Facts(case.module, cos[0, :, :half].float(), sin[0, :, :half].float(), case.suspect.on)


def _run(case: Case, **steps: Callable[..., Any]) -> torch.Tensor:
    return case.like(attention(facts(case), case.x, **steps))


def _interleaved(f: Facts, q: torch.Tensor, k: torch.Tensor):
    """Pairs (2i, 2i + 1) turn, as in GPT-J and in Meta's own weight layout."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        width = 2 * f.cos.shape[-1]
        a, b = x[..., 0:width:2], x[..., 1:width:2]
        cos, sin = f.cos.unsqueeze(1), f.sin.unsqueeze(1)
        pairs = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        return torch.cat((pairs, x[..., width:]), dim=-1)

    return turned(q), turned(k)


def _layout(case: Case) -> Iterator[Variant]:
    yield "pairs (2i, 2i+1) instead of (i, i+R/2)", _run(case, rotate=_interleaved)


def _backwards(case: Case) -> Iterator[Variant]:
    def back(f: Facts, q, k):
        return recipes.turn(q, f.cos, -f.sin), recipes.turn(k, f.cos, -f.sin)

    yield "the angle has the wrong sign", _run(case, rotate=back)
    yield "keys do not turn", _run(case, rotate=lambda f, q, k: (recipes.turn(q, f.cos, f.sin), k))
    yield "queries do not turn", _run(case, rotate=lambda f, q, k: (q, recipes.turn(k, f.cos, f.sin)))


def _tables(name: str) -> Callable[[Case], Iterator[Variant]]:
    def variants(case: Case) -> Iterator[Variant]:
        for found, label, angle in rope_mistakes(rope_config(case.replay.model), case.replay.num_tokens):
            if found == name:
                cos, sin = angle.cos(), angle.sin()

                def turned(f: Facts, q, k, cos=cos, sin=sin):
                    return recipes.turn(q, cos, sin), recipes.turn(k, cos, sin)

                yield label, _run(case, rotate=turned)

    return variants


def _tiled(case: Case) -> Iterator[Variant]:
    def share(f: Facts, q, k, v):
        group = q.shape[1] // k.shape[1]
        return k.repeat(1, group, 1), v.repeat(1, group, 1)

    def first(f: Facts, q, k, v):
        return k[:, :1].expand(-1, q.shape[1], -1), v[:, :1].expand(-1, q.shape[1], -1)

    yield "query head h reads KV head h mod Hk", _run(case, share=share)
    yield "every query head reads the first KV head", _run(case, share=first)


def _mask(case: Case, allow: Callable[..., torch.Tensor], *more: Any) -> torch.Tensor:
    """allow(i, j, *more): whether query i sees key j; positions as [T, 1] and [1, T]."""

    def visible(f: Facts, count: int) -> torch.Tensor:
        i = torch.arange(count)
        return allow(i.unsqueeze(1), i.unsqueeze(0), *more)

    return _run(case, visible=visible)


def _no_mask(case: Case) -> Iterator[Variant]:
    yield "every token sees every token", _mask(case, lambda i, j: j >= 0 * i)


def _mask_shift(case: Case) -> Iterator[Variant]:
    yield "each token sees the one after it", _mask(case, lambda i, j: j <= i + 1)
    yield "a token does not see itself", _mask(case, lambda i, j: (j < i) | ((i == 0) & (j == 0)))


def _mask_limit(case: Case) -> Iterator[Variant]:
    for n in WINDOWS:
        if n < case.replay.num_tokens:
            yield f"no mask from position {n} on", _mask(case, lambda i, j, n: (j <= i) | (i >= n), n)


def _window(case: Case) -> Iterator[Variant]:
    for n in WINDOWS:
        if n < case.replay.num_tokens:
            yield f"only the last {n} tokens are seen", _mask(case, lambda i, j, n: (j <= i) & (j > i - n), n)
            yield (
                f"only the first {n} tokens are seen",
                _mask(case, lambda i, j, n: (j <= i) & (j < n) | (j == i) & (j == 0), n),
            )


def _pieces(case: Case) -> Iterator[Variant]:
    """What was computed in an earlier step is not seen."""
    start_of = torch.zeros(case.replay.num_tokens, dtype=torch.long)
    for start, end in case.suspect.on.chunks:
        start_of[start:end] = start
    if len(case.suspect.on.chunks) > 1:
        yield "a piece sees only itself", _mask(case, lambda i, j: (j <= i) & (j >= start_of[i]))


def _score_scale(case: Case) -> Iterator[Variant]:
    dim = case.module.head_dim
    for label, factor in (("1 / D", 1 / dim), ("1", 1.0), ("1 / sqrt(hidden)", case.x.shape[-1] ** -0.5)):
        yield f"scores are scaled by {label}", _run(case, scale=lambda f, s, factor=factor: s * factor)
    yield "scores are scaled twice", _run(case, scale=lambda f, s: s * f.module.scaling**2)


def _softmax(case: Case) -> Iterator[Variant]:
    yield "raw scores weigh the values", _run(case, weigh=lambda f, s: torch.where(s.isinf(), torch.zeros_like(s), s))
    yield "exp without division", _run(case, weigh=lambda f, s: s.exp())


def _gate(case: Case) -> Iterator[Variant]:
    if not hasattr(case.module, "q_norm"):
        return
    yield "the output gate is left out", _run(case, gate_output=lambda f, o, g: o)
    yield "SiLU instead of sigmoid", _run(case, gate_output=lambda f, o, g: o * torch.nn.functional.silu(g))


def _packing(case: Case) -> Iterator[Variant]:
    if not hasattr(case.module, "q_norm"):
        return

    def halves(f: Facts, x):
        q, gate = f.module.q_proj(x).unflatten(-1, (2, -1, f.module.head_dim)).unbind(-3)
        return q, *recipes.project(f, x)[1:3], gate

    def swapped(f: Facts, x):
        q, k, v, gate = recipes.project(f, x)
        return gate, k, v, q

    yield "all queries, then all gates", _run(case, project=halves)
    yield "gate first, query second", _run(case, project=swapped)


def _qk_norm(case: Case) -> Iterator[Variant]:
    if hasattr(case.module, "q_norm"):
        yield "query and key norms are left out", _run(case, normalise=lambda f, q, k: (q, k))


def _all_reduce(case: Case) -> Iterator[Variant]:
    for count in (2, 4):
        yield f"the sum is taken {count} times", case.suspect.right * count
        for rank in range(count):

            def part(f: Facts, out, count=count, rank=rank):
                width = -(-out.shape[1] // count)
                mine = torch.zeros_like(out)
                mine[:, rank * width : (rank + 1) * width] = out[:, rank * width : (rank + 1) * width]
                return recipes.close(f, mine)

            yield f"only heads of part {rank + 1} of {count} are there", _run(case, close=part)


ARITHMETIC = [
    Candidate("rope_layout", "rope pairs the wrong dimensions", "rotary", _layout),
    Candidate("rope_backwards", "rope turns the wrong way or only on one side", "rotary", _backwards),
    *[Candidate(n, text, "rotary", _tables(n)) for n, text in ROPE_SENTENCES.items() if n != "rope_partial_ignored"],
    Candidate("gqa_mapping", "query heads read the wrong KV heads", "paged_attention", _tiled),
    Candidate("mask_dropped", "the causal mask is missing", "paged_attention", _no_mask),
    Candidate("mask_off_by_one", "the causal mask is off by one", "paged_attention", _mask_shift),
    Candidate("mask_ignored_past", "the causal mask is ignored beyond a length", "paged_attention", _mask_limit),
    Candidate("window", "attention is cut to a window", "paged_attention", _window),
    Candidate("kv_lost_between_steps", "keys of earlier steps are not seen", "paged_attention", _pieces),
    Candidate("score_scale", "attention scores have the wrong scale", "paged_attention", _score_scale),
    Candidate("softmax_missing", "softmax is not applied", "paged_attention", _softmax),
    Candidate("gate_dropped", "the output gate is missing or wrong", "sigmoid_mul", _gate),
    Candidate("gate_packing", "query and gate are unpacked in the wrong order", None, _packing),
    Candidate("norm_skipped", "the norm is not applied", "rms_norm", _qk_norm),
    Candidate("all_reduce", "a row-parallel sum is missing or made twice", None, _all_reduce),
]


# ---- what the cache held


def with_cache(case: Case, found: CacheRead) -> torch.Tensor:
    """Right arithmetic over the keys and values that each query read."""
    out = case.suspect.right.clone()
    for read in found.keys:

        def cache(f: Facts, k, v, read=read):
            return torch.cat((read.keys, k[read.end :])), torch.cat((read.values, v[read.end :]))

        rows = slice(read.start, read.end)
        out[rows] = _run(case, cache=cache)[rows]
    return out


def right_keys(case: Case) -> torch.Tensor:
    """[T, Hk, D]: what the cache should hold."""
    f = facts(case)
    with torch.inference_mode():
        q, k, _, _ = recipes.project(f, case.x)
        return recipes.rotate(f, *recipes.normalise(f, q, k))[1]


def what_is_wrong(case: Case, found: CacheRead) -> tuple[str, str] | None:
    """Id and label of a cache mistake, from the keys that were read; None if they are the right ones."""
    if not found.keys:
        return None
    read = max(found.keys, key=lambda r: r.end).keys.flatten(1)
    right = right_keys(case).flatten(1)[: len(read)]
    allowed = 0.05 * right.norm(dim=-1).median() + 1e-9
    apart = torch.cdist(read, right)  # [read, right]
    count = len(right)
    wrong = [i for i in range(count) if apart[i, i] > allowed]
    if not wrong:
        return None
    nearest = apart.argmin(-1)
    known = {i: int(nearest[i]) for i in wrong if apart[i, nearest[i]] <= allowed}
    if case.suspect.on.path == "prefix_hit" and wrong[0] < case.suspect.on.chunks[0][0]:
        return "prefix_hit_wrong", f"positions {wrong[0]} to {wrong[-1]}, taken from the cache, belong to other tokens"
    restarts = [start for start, _ in case.suspect.on.chunks[1:] if start == 0]
    if case.suspect.on.path == "preempted" and not restarts:
        return "preemption_state_lost", f"positions {wrong[0]} to {wrong[-1]} are not what this request had computed"
    for shift in (-1, 1):
        inner = [i for i in wrong if 0 <= i + shift < count]
        if inner and sum(known.get(i) == i + shift for i in inner) >= 0.8 * len(inner) and len(wrong) >= count / 2:
            return "kv_slot_off_by_one", f"position {wrong[-1]} holds the key of {wrong[-1] + shift}"
    size = max(1, case.suspect.on.block_size)
    pages = sorted({i // size for i in wrong})
    moved = [i for i, j in known.items() if j % size == i % size and j // size != i // size]
    if moved and len(moved) >= 0.5 * len(wrong):
        return "block_table", f"page {moved[0] // size} reads page {known[moved[0]] // size}"
    zeros = sum(float(read[i].abs().max()) == 0 for i in wrong)
    what = "were never written" if zeros == len(wrong) else "hold something else"
    where = f"{len(wrong)} positions from {wrong[0]} on (pages {pages[0]} to {pages[-1]}) {what}"
    return "kv_not_written", where
