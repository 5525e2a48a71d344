"""From logits to token ids, on the device, without a copy to the host.

Order: repetition penalty, presence and frequency penalties, logit_bias, min_tokens; then argmax for a greedy row, or
temperature, min_p, top_k, top_p and one draw. Reported log-probabilities are those of the untouched logits.

A filter is a threshold on the token's weight, exp((logit - max) / temperature): tokens as likely as the last one kept
are kept too, so neither the order in which a device sorts equal logits nor the batch around a row changes its result.
The draw walks the cumulated weights in the order of token ids. All but a plain argmax is fp32: NPUs have no fp64.

A row with a NaN, or without any logit above -inf, gets token id -1; the engine ends that request with "error".
A logit of +inf counts as the largest fp32 number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from surefoot.core.outputs import TokenLogprob
from surefoot.engine.sampling_batch import Draw, Edits, SamplingBatch, build, check_token_ids
from surefoot.ops import cpu

__all__ = ["SampledTokens", "SamplingBatch", "build", "check_token_ids", "sample", "token_logprobs", "unpack"]

LARGEST = torch.finfo(torch.float32).max
SLICE_BYTES = 64 << 20
BYTES_PER_LOGIT = 32  # fp32 copy, exponentials, and the integer keys of `_top`, while one slice is worked on


class TokenLogprobs(NamedTuple):
    """logprobs [L] fp32, ranks [L] int64 (1 = most likely), top_ids [L, K] int64, top_logprobs [L, K] fp32."""

    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


@dataclass(frozen=True)
class SampledTokens:
    """token_ids [N] int64 and, if a row asked for it, what `TokenLogprobs` holds (rows that did not ask: zeros)."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def pack(self) -> torch.Tensor:
        """All of it in one tensor for a single copy to the host: [N, 1] int64, or [N, 3 + 2K] int32; see `unpack`."""
        if self.logprobs is None or self.ranks is None or self.top_ids is None or self.top_logprobs is None:
            return self.token_ids.unsqueeze(-1)
        ids = self.token_ids.to(torch.int32).unsqueeze(-1)
        floats = torch.cat([self.logprobs.unsqueeze(-1), self.top_logprobs], dim=-1).view(torch.int32)
        ranks = self.ranks.to(torch.int32).unsqueeze(-1)
        return torch.cat([ids, ranks, floats, self.top_ids.to(torch.int32)], dim=-1)


def unpack(packed: np.ndarray, num_logprobs: Sequence[int | None]) -> list[tuple[int, TokenLogprob | None]]:
    """(token id, log-probability) of each row of a packed tensor on the host; entry i wants num_logprobs[i] of them."""
    if packed.shape[1] == 1:
        return [(token, None) for token in packed[:, 0].tolist()]
    k = (packed.shape[1] - 3) // 2
    ids, ranks, tops = packed[:, 0].tolist(), packed[:, 1].tolist(), packed[:, 3 + k :].tolist()
    floats = np.ascontiguousarray(packed[:, 2 : 3 + k]).view(np.float32).tolist()
    rows: list[tuple[int, TokenLogprob | None]] = []
    for token, rank, (logprob, *values), top, n in zip(ids, ranks, floats, tops, num_logprobs):
        pairs = tuple(zip(top, values))
        rows.append((token, None if n is None else TokenLogprob(token, logprob, rank, pairs[:n])))
    return rows


def sample(logits: torch.Tensor, batch: SamplingBatch) -> SampledTokens:
    """Choose the next token of each row of logits [N, V] (any float dtype, left untouched)."""
    edited = logits if batch.edits is None else _edit(logits, batch.edits)
    best, token_ids = _argmax(edited)
    for draw in batch.draws:
        if draw.rows is None:
            token_ids = _draw(edited, best, draw)
        else:
            token_ids[draw.rows] = _draw(edited.index_select(0, draw.rows), best[draw.rows], draw)
    if batch.draws:
        token_ids = torch.where(best > -torch.inf, token_ids, -1)
    if batch.num_logprobs is None:
        return SampledTokens(token_ids)
    rows, k = batch.logprob_rows, batch.num_logprobs
    targets = token_ids.clamp(min=0)
    if rows is None:
        return SampledTokens(token_ids, *token_logprobs(logits, targets, k))
    found = token_logprobs(logits.index_select(0, rows), targets[rows], k)
    return SampledTokens(token_ids, *(t.new_zeros(len(logits), *t.shape[1:]).index_copy(0, rows, t) for t in found))


def _argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit of each row and its id, -1 where there is none; see the module's first lines."""
    found = cpu.argmax(logits)
    if found is None:
        best, token_ids = logits.max(dim=-1)  # NaN counts as the largest, and of equal logits the lowest id is taken
        return best, torch.where(best > -torch.inf, token_ids, -1)
    return found


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, k: int) -> TokenLogprobs:
    """Log-probability and rank of targets [L] under logits [L, V], and the k most likely tokens of each row.

    Equal logits rank alike, and the lower id comes first among the k. Works on slices of rows, so that temporaries
    stay under 64 MB.
    """
    rows, vocab_size = logits.shape
    step = max(1, SLICE_BYTES // (BYTES_PER_LOGIT * vocab_size))
    k = min(k, vocab_size)
    parts = [_slice_logprobs(logits[i : i + step], targets[i : i + step], k) for i in range(0, max(rows, 1), step)]
    return parts[0] if len(parts) == 1 else TokenLogprobs(*(torch.cat(column) for column in zip(*parts)))


def _slice_logprobs(logits: torch.Tensor, targets: torch.Tensor, k: int) -> TokenLogprobs:
    x = logits.float().clamp(max=LARGEST)
    best = x.amax(dim=-1, keepdim=True)
    log_total = (x - best).exp_().sum(dim=-1, keepdim=True).log_()
    target = x.gather(-1, targets.unsqueeze(-1))
    ranks = x.clone().gt_(target).sum(dim=-1).to(torch.int64) + 1  # a float counts exactly up to 2^24
    top, top_ids = _top(x, k)
    return TokenLogprobs((target - best - log_total).squeeze(-1), ranks, top_ids, top - best - log_total)


def _top(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row [L, V] fp32, largest first, and among equals the lower id (torch.topk leaves it open).

    Keys order as (value, -id): the bits of a float order like an integer once those of negative numbers are flipped.
    """
    if k == 0:
        return x.new_zeros(len(x), 0), torch.zeros(len(x), 0, dtype=torch.int64, device=x.device)
    bits = (x + 0.0).view(torch.int32)  # NOTE: + 0.0 turns -0.0 into 0.0, which must order alike
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
    keys.mul_(1 << 32).sub_(torch.arange(x.shape[-1], device=x.device))
    ids = -keys.topk(k, dim=-1).values & 0xFFFFFFFF
    return x.gather(-1, ids), ids


def _edit(logits: torch.Tensor, edits: Edits) -> torch.Tensor:
    """A copy of the logits in fp32 with penalties, bias and bans applied to the entries that have any."""
    out = logits.to(torch.float32, copy=True)
    x = out[edits.rows, edits.ids].clamp_(max=LARGEST)
    x = torch.where(x > 0, x / edits.repetition, x * edits.repetition) - edits.shift
    out[edits.rows, edits.ids] = x
    return out


def _draw(logits: torch.Tensor, best: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Filter and draw: logits [n, V], their maxima [n] -> token ids [n]."""
    # NOTE: the maximum goes first, so that a tiny temperature cannot overflow; the clamp is for +inf - LARGEST.
    weights = logits.float() - best.float().clamp(max=LARGEST).unsqueeze(-1)
    weights.div_(draw.temperature).clamp_(max=0.0).exp_()
    if draw.min_p is not None:
        weights.mul_(_at_least(weights, draw.min_p))
    candidates = weights.topk(draw.num_candidates, dim=-1).values if draw.num_candidates else None
    if draw.top_k is not None:
        if candidates is not None:
            cut = candidates.gather(-1, draw.top_k - 1)
        else:
            cut = _search_cut(weights, draw.top_k, by_mass=False)
        weights.mul_(_at_least(weights, cut))
    if draw.top_p is not None:
        goal = (draw.top_p * weights.sum(dim=-1, keepdim=True)).masked_fill(draw.top_p >= 1.0, torch.inf)
        cut = _nucleus_cut(candidates, goal) if candidates is not None else _search_cut(weights, goal, by_mass=True)
        weights.mul_(_at_least(weights, cut))
    return _pick(weights, draw.uniform)


def _at_least(x: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """1.0 where x >= cut, else 0.0. Floats, because on the CPU a bool mask takes five times as long to apply."""
    return x.clone().ge_(cut)


def _nucleus_cut(candidates: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
    """Weight [n, 1] of the last of the candidates [n, K], largest first, that is needed to reach `goal`."""
    before = candidates.cumsum(dim=-1) - candidates
    return candidates.masked_fill(before >= goal, torch.inf).amin(dim=-1, keepdim=True)


def _search_cut(weights: torch.Tensor, goal: torch.Tensor, by_mass: bool) -> torch.Tensor:
    """Largest t [n, 1] such that the weights >= t sum to `goal` or more (or, with by_mass=False, are that many).

    A goal out of reach gives 0. Exact, by building the bits of t from the highest down: floats in [0, 1] order like
    their bits, which need 30. All steps together take a tenth of the time of sorting a vocabulary.
    """
    bits = goal.new_zeros(goal.shape, dtype=torch.int32)
    for bit in reversed(range(30)):
        trial = bits + (1 << bit)
        kept = _at_least(weights, trial.view(torch.float32))
        reached = (kept.mul_(weights) if by_mass else kept).sum(dim=-1, keepdim=True) >= goal
        bits = torch.where(reached, trial, bits)
    return bits.view(torch.float32)


def _pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF in the order of token ids: weights [n, V] >= 0, uniform [n, 1] in [0, 1) -> ids [n].

    Tokens of weight 0 are taken out of the running sums, so that no rounding of a parallel cumsum can select one.
    """
    reach = weights.cumsum(dim=-1).mul_(weights.sign())
    goal = uniform * reach.amax(dim=-1, keepdim=True)
    return reach.gt_(goal).max(dim=-1).indices
