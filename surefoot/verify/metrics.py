"""Per-token measures of how far one run's numbers are from the reference's, reduced on the fly.

Logits ([T, vocab], fp32) shrink to a few numbers a token, so that a vocabulary of 248,320 never has to be kept.
Everything is computed in fp64: at fp32 noise a KL divergence is 1e-12, and the plain formula would lose it.

NaN, +inf and -inf are compared as classes of their own; -0.0 against +0.0 is counted but is no error (0 == -0).
"""

from __future__ import annotations

import numpy as np
import torch

Rows = dict[str, np.ndarray]
ROWS = 32  # rows worked off at a time: 32 x 248,320 x 8 bytes = 64 MB

# What is kept of a run per token.  kl: KL(reference || run) in nats.  err: RMS over the vocabulary of the logit error,
# after its mean (which softmax ignores) is taken off.  worst: its largest absolute value.  gain: slope of the error
# over the reference's logits, 0.01 = logits 1 % too large.  flip: how much the reference prefers its own first choice
# to the run's, 0 where they agree.  odd: entries whose class (finite, NaN, +inf, -inf) differs from the reference's.
RUN_FIELDS = ("kl", "err", "worst", "gain", "flip", "odd", "zeros")
# Of the reference: spread of its logits, first minus second, 1 - sum p^2, non-finite entries that are not -inf.
REFERENCE_FIELDS = ("spread", "margin", "doubt", "bad")


def reference_rows(logits: torch.Tensor) -> Rows:
    """REFERENCE_FIELDS of logits [T, vocab]."""
    parts = [_reference_part(part.double()) for part in logits.split(ROWS)]
    return _join(parts, REFERENCE_FIELDS)


def _reference_part(r: torch.Tensor) -> dict[str, torch.Tensor]:
    finite = torch.isfinite(r)
    p = r.softmax(-1)
    top = r.topk(2).values
    return {
        "spread": _centre(r, finite).square().sum(-1).div(finite.sum(-1).clamp(min=1)).sqrt(),
        "margin": top[:, 0] - top[:, 1],
        "doubt": 1 - p.square().sum(-1),
        "bad": (~finite & (r != float("-inf"))).sum(-1),
    }


def logit_rows(reference: torch.Tensor, run: torch.Tensor) -> Rows:
    """RUN_FIELDS of a run's logits against the reference's, both [T, vocab]."""
    parts = [_logit_part(r.double(), x.double()) for r, x in zip(reference.split(ROWS), run.split(ROWS))]
    return _join(parts, RUN_FIELDS)


def _logit_part(r: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    both = torch.isfinite(r) & torch.isfinite(x)
    clean = bool(both.all())
    count = both.sum(-1).clamp(min=1)
    error = x - r if clean else torch.where(both, x - r, 0.0)
    error, centred = _centre(error, both), _centre(r, both)
    chosen = (x if clean else x.nan_to_num(nan=float("-inf"))).argmax(-1, keepdim=True)
    return {
        "kl": _kl(r, x, error, both),
        "err": error.square().sum(-1).div(count).sqrt(),
        "worst": error.abs().amax(-1),
        "gain": (error * centred).sum(-1) / centred.square().sum(-1).clamp(min=1e-300),
        "flip": r.amax(-1) - r.gather(-1, chosen).squeeze(-1),
        "odd": torch.zeros(len(r)) if clean else _odd(r, x),
        "zeros": ((r == 0) & (x == 0) & (r.signbit() != x.signbit())).sum(-1),
    }


def _centre(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """x minus its mean over `keep`, 0 elsewhere."""
    if bool(keep.all()):
        return x - x.mean(-1, keepdim=True)
    kept = torch.where(keep, x, 0.0)
    mean = kept.sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(keep, kept - mean, 0.0)


def _kl(r: torch.Tensor, x: torch.Tensor, error: torch.Tensor, both: torch.Tensor) -> torch.Tensor:
    """log sum p exp(e - <e>_p), e = x - r but for a constant: no cancellation between nearly equal numbers."""
    p = r.masked_fill(~both, float("-inf")).softmax(-1)
    e = error - (p * error).sum(-1, keepdim=True)
    kl = torch.log1p((p * e.clamp(max=50).expm1()).sum(-1))
    far = e.abs().amax(-1) >= 1
    if bool(far.any()):
        logs = [v[far].masked_fill(~both[far], float("-inf")).log_softmax(-1) for v in (r, x)]
        kl[far] = torch.where(p[far] > 0, p[far] * (logs[0] - logs[1]), 0.0).sum(-1)
    return kl.nan_to_num(nan=float("inf")).clamp(min=0)


def _odd(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Entries that are NaN, +inf or -inf on one side and something else on the other."""
    same = (torch.isfinite(a) & torch.isfinite(b)) | (a == b) | (torch.isnan(a) & torch.isnan(b))
    return (~same).sum(-1)


# ---- activations

# Of a run's activation per token, in units of the noise.  err: RMS over the channels.  worst: largest channel.
# gain: whitened slope of the error over the reference (0.01 = 1 % too large).  odd: as above.
ACTIVATION_FIELDS = ("err", "worst", "gain", "odd")
MASSIVE = 10.0  # entries above this many times the row's RMS without them get a scale of their own


def noise_scale(reference: torch.Tensor, nulls: list[torch.Tensor], floor: torch.Tensor) -> torch.Tensor:
    """Expected size of the error of each entry [T, D], from runs that are right by construction.

    A row shares one scale (half of all entries are no outliers, so that the median serves), except that massive
    activations are allowed the relative error that massive ones have in the null runs: a bf16 residual stream holds
    3,000 to the nearest 8 while its other channels are exact to 0.004.  floor: [T, 1] least scale of a row.
    """
    errors = torch.stack([_finite(n.double() - reference.double()) for n in nulls])
    r = _finite(reference.double())
    quiet = r.abs() <= MASSIVE * r.abs().median(-1, keepdim=True).values.clamp(min=1e-300) * 1.5
    squares = errors.square().mean(0)
    count = quiet.sum(-1, keepdim=True).clamp(min=1)
    row = torch.where(quiet, squares, 0.0).sum(-1, keepdim=True) / count
    loud = ~quiet
    relative = squares[loud].sum() / r[loud].square().sum().clamp(min=1e-300) if loud.any() else 0.0
    scale = torch.where(quiet, row, torch.maximum(row, relative * r.square())).sqrt()
    return torch.maximum(scale, floor.clamp(min=1e-300))


def _finite(x: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def activation_rows(reference: torch.Tensor, run: torch.Tensor, scale: torch.Tensor) -> Rows:
    """ACTIVATION_FIELDS of a run's activation [T, D] against the reference's."""
    r, x = reference.double(), run.double()
    both = torch.isfinite(r) & torch.isfinite(x)
    z = torch.where(both, x - r, 0.0) / scale
    unit = torch.where(both, r, 0.0) / scale
    fields = {
        "err": z.square().sum(-1).div(both.sum(-1).clamp(min=1)).sqrt(),
        "worst": z.abs().amax(-1),
        "gain": (z * unit).sum(-1) / unit.square().sum(-1).clamp(min=1e-300),
        "odd": _odd(r, x),
    }
    return _join([fields], ACTIVATION_FIELDS)


def _join(parts: list[dict[str, torch.Tensor]], fields: tuple[str, ...]) -> Rows:
    return {f: torch.cat([p[f].reshape(-1).double() for p in parts]).numpy() for f in fields}


def concatenate(rows: list[Rows]) -> Rows:
    """Rows of several sequences, one after another."""
    return {key: np.concatenate([r[key] for r in rows]) for key in rows[0]} if rows else {}
