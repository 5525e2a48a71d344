"""Is a run's error the noise of its dtype, or a fault? Pure numpy over per-token numbers, so that it can be repeated.

Noise is what the null runs (right by construction, see calibrate.py) show at the very same token. All tests must pass;
none is averaged away by another:

outlier   the largest error of a single token, as RMS over its entries (`err`), as largest entry (`worst`) and for
          logits as KL. Limit: the larger of twice the largest null value, each null run judged by the others, and the
          null's generalised-Pareto tail at probability ALPHA for all tokens together (Pickands 1975; moments of Hosking
          & Wallis 1987, xi in [0, 0.5]). One wrong token among thousands stands out here; a mean would hide it.
flip      another first choice than the reference's, where the reference's preference exceeds the limit of `worst`: what
          noise can do at that position.
gain      mean slope of the error over the reference, e.g. logits 1 % too large. Noise has none: the limit is 8 standard
          errors (batch means), 5 times the null runs' own gain, and a quarter of the noise, whichever is largest.
position  typical error (geometric mean, which a few wild tokens do not carry away) of a range of positions over the
          null's there: at most 1.75, and 1.5 times the largest of a single null run.
size      typical error over the null's: up to 3 passes, above 6 fails, between is undecided. A right device
          with another order of accumulation has other noise: max |delta logprob| of Qwen3-8B on an Ascend against an
          H20 was 2.2 times (RL-Align/RL-Kernel #406). If the device's own repeat runs spread more than the null's, the
          limits rise with them, at most 2.5-fold, so that a fault cannot excuse itself by being noisy.
odd       NaN, +inf or -inf where the reference has something else: never noise.

The other limits are multiplied by the run's typical ratio (its lower quartile of `err` over the null's, within 1 and
the passing size), so that noise that is larger everywhere is judged once, by `size`. The quartile, because a fault in
half of all tokens shall not pass for noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from surefoot.verify.summary import batch_means_se

ALPHA = 1e-5
SAFETY = 2.0
GAIN_SE, GAIN_NULL, GAIN_NOISE = 8.0, 5.0, 0.25
BIN_SAFETY, BIN_LEAST, BIN_TOKENS = 1.5, 1.75, 8
SIZE_PASS, SIZE_FAIL, DEVICE_MOST = 3.0, 6.0, 2.5
FLOOR = 0.1  # the noise of a token is at least this many units in the last place of the spread of its numbers

RULES = {
    "alpha": ALPHA,
    "safety": SAFETY,
    "gain": [GAIN_SE, GAIN_NULL, GAIN_NOISE],
    "position": [BIN_SAFETY, BIN_LEAST, BIN_TOKENS],
    "size": [SIZE_PASS, SIZE_FAIL, DEVICE_MOST],
    "floor": FLOOR,
}

Rows = dict[str, np.ndarray]


@dataclass
class Series:
    """One quantity of one run: a module's output, or the logits. Arrays are [N] over the tokens of all sequences.

    run: err, worst, gain, odd in units of the noise (gain: plain), for logits also kl, flip.  nulls: the same per null
    run, each in units of the noise that the other null runs show.  noise: typical noise relative to the numbers.
    """

    name: str
    run: Rows
    nulls: list[Rows]
    sequence: np.ndarray
    position: np.ndarray
    noise: float
    device: float = 1.0


@dataclass
class Complaint:
    """A test that was not passed. `serious` False: it only makes the verdict undecided."""

    test: str
    value: float
    limit: float
    text: str
    sequence: int | None = None
    position: int | None = None
    serious: bool = True


@dataclass
class Judgement:
    name: str
    ratio: float
    complaints: list[Complaint] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)

    @property
    def status(self) -> str:
        if any(c.serious for c in self.complaints):
            return "fail"
        return "undecided" if self.complaints else "pass"

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.status,
            "ratio": self.ratio,
            "limits": self.limits,
            "values": self.values,
            "complaints": [vars(c) for c in self.complaints],
        }


def judge(series: Series) -> Judgement:
    """All tests over one series."""
    run = {k: np.nan_to_num(v, nan=np.inf) for k, v in series.run.items()}
    ratio = _typical([run]) / _typical(series.nulls)
    device = min(max(series.device, 1.0), DEVICE_MOST)
    typical = min(max(_quarter([run]) / _quarter(series.nulls), 1.0), SIZE_PASS * device)
    verdict = Judgement(series.name, ratio)
    _odd(series, verdict)
    for name in ("err", "worst", "kl"):
        if name in run:
            _outlier(series, name, run[name], typical, verdict)
    if "flip" in run:
        _flip(series, run["flip"], verdict)
    _gain(series, typical, verdict)
    _positions(series, run["err"], typical, verdict)
    _size(ratio, device, verdict)
    return verdict


def _quarter(rows: list[Rows]) -> float:
    pool = np.concatenate([r["err"] for r in rows])
    return max(float(np.quantile(pool, 0.25)), 1e-300)


def _typical(rows: list[Rows], inside: np.ndarray | slice = slice(None)) -> float:
    """Geometric mean of `err`; what is (nearly) exact counts as a thousandth of the noise."""
    pool = np.concatenate([np.nan_to_num(r["err"], nan=np.inf)[inside] for r in rows])
    return float(np.exp(np.mean(np.log(np.clip(pool, 1e-3, 1e12)))))


def _odd(series: Series, verdict: Judgement) -> None:
    count = series.run["odd"]
    if count.any():
        text = f"{int(count.sum())} NaN or infinite entries that the reference does not have, or the other way round"
        verdict.complaints.append(_at(series, "odd", count, 0.0, text))


def _outlier(series: Series, name: str, values: np.ndarray, typical: float, verdict: Judgement) -> None:
    limit = typical * tail_limit(np.stack([n[name] for n in series.nulls]))
    verdict.limits[name], verdict.values[name] = limit, float(values.max())
    if values.max() > limit:
        what = {"err": "its RMS error", "worst": "its largest error", "kl": "its KL divergence (as amplitude)"}[name]
        count = int((values > limit).sum())
        where = "a token" if count == 1 else f"{count} tokens"
        text = f"{where} beyond the noise: {what} is {values.max():.3g} times the noise, allowed {limit:.3g}"
        verdict.complaints.append(_at(series, f"outlier {name}", values, limit, text))


def _flip(series: Series, values: np.ndarray, verdict: Judgement) -> None:
    limit = verdict.limits["worst"]
    verdict.values["flip"] = float(values.max())
    if values.max() > limit:
        count = int((values > limit).sum())
        text = f"{count} tokens with another first choice where noise cannot change it"
        verdict.complaints.append(_at(series, "flip", values, limit, text))


def _gain(series: Series, typical: float, verdict: Judgement) -> None:
    gain = series.run["gain"]
    mean = float(gain.mean())
    of_nulls = _rms(np.array([n["gain"].mean() for n in series.nulls]))
    error = batch_means_se(gain, series.sequence)
    limit = max(GAIN_SE * error, typical * GAIN_NULL * of_nulls, typical * GAIN_NOISE * series.noise)
    verdict.limits["gain"], verdict.values["gain"] = limit, mean
    if abs(mean) > limit:
        text = f"systematically {mean:+.2%} in size, allowed {limit:.2%}"
        verdict.complaints.append(Complaint("gain", mean, limit, text))


def _positions(series: Series, err: np.ndarray, typical: float, verdict: Judgement) -> None:
    bins = np.floor(np.log2(np.maximum(series.position, 8))).astype(int)
    for b in np.unique(bins):
        inside = bins == b
        if inside.sum() < BIN_TOKENS:
            continue
        usual = _typical(series.nulls, inside)
        worst_null = max(_typical([n], inside) for n in series.nulls) / usual
        limit = typical * max(BIN_LEAST, BIN_SAFETY * worst_null)
        value = _typical([{"err": err}], inside) / usual
        if value > limit:
            low, high = (0 if b == 3 else 2**b), 2 ** (b + 1) - 1
            text = f"positions {low}-{high} are {value:.3g} times as far off as noise, allowed {limit:.3g}"
            verdict.complaints.append(Complaint("position", value, limit, text, position=low))
            return


def _size(ratio: float, device: float, verdict: Judgement) -> None:
    verdict.limits["size"] = SIZE_PASS * device
    if ratio > SIZE_PASS * device:
        serious = ratio > SIZE_FAIL * device
        text = f"the error is {ratio:.3g} times what the dtype costs, allowed {SIZE_PASS * device:.3g}"
        verdict.complaints.append(Complaint("size", ratio, SIZE_PASS * device, text, serious=serious))


def _at(series: Series, test: str, values: np.ndarray, limit: float, text: str) -> Complaint:
    i = int(np.argmax(values))
    sequence, position = int(series.sequence[i]), int(series.position[i])
    text += f" (worst: sequence {sequence}, position {position})"
    return Complaint(test, float(values[i]), limit, text, sequence, position)


def tail_limit(nulls: np.ndarray, alpha: float = ALPHA) -> float:
    """Value that the largest of N right tokens exceeds with probability alpha. nulls: [K runs, N tokens]."""
    pool = nulls[np.isfinite(nulls)]
    if not len(pool) or not pool.max() > 0:
        return 1.0
    largest = SAFETY * float(pool.max())
    threshold = float(np.quantile(pool, 0.95))
    beyond = pool[pool > threshold] - threshold
    if len(beyond) < 10:
        return largest
    mean, variance = float(beyond.mean()), float(beyond.var(ddof=1))
    xi = min(max(0.5 * (1 - mean * mean / variance), 0.0), 0.5) if variance > 0 else 0.0
    sigma = mean * (1 - xi)  # the mean of a generalised Pareto variable is sigma / (1 - xi)
    odds = len(beyond) / len(pool) * nulls.shape[1] / alpha
    reach = sigma * np.log(odds) if xi < 1e-6 else sigma / xi * (odds**xi - 1)
    return max(largest, threshold + float(reach))


def logit_series(
    run: Rows,
    nulls: list[Rows],
    reference: Rows,
    sequence: np.ndarray,
    position: np.ndarray,
    *,
    eps: float,
    device: float = 1.0,
    name: str = "logits",
) -> Series:
    """Raw rows of logits (metrics.logit_rows) in units of the noise at each token."""
    floor = FLOOR * eps * reference["spread"]
    scale = _noise(nulls, floor)
    units = [_in_units(n, _noise(nulls[:i] + nulls[i + 1 :] or nulls, floor), reference) for i, n in enumerate(nulls)]
    noise = float(np.median(scale / np.maximum(reference["spread"], 1e-300)))
    return Series(name, _in_units(run, scale, reference), units, sequence, position, noise, device)


def _noise(nulls: list[Rows], floor: np.ndarray) -> np.ndarray:
    """Noise at each token: RMS over the null runs, at least `floor` and a tenth of the median token's."""
    squares = np.mean([np.nan_to_num(n["err"], nan=0.0, posinf=0.0) ** 2 for n in nulls], axis=0)
    scale = np.sqrt(squares)
    return np.maximum(np.maximum(scale, floor), max(0.1 * float(np.median(scale)), 1e-300))


def _in_units(rows: Rows, scale: np.ndarray, reference: Rows) -> Rows:
    """KL becomes the amplitude sqrt(2 KL / (sigma^2 (1 - sum p^2))), about 1 for independent logit errors of sigma."""
    doubt = np.maximum(reference["doubt"], 1e-9)
    return {
        "err": rows["err"] / scale,
        "worst": rows["worst"] / scale,
        "kl": np.sqrt(2 * rows["kl"] / doubt) / scale,
        "flip": rows["flip"] / scale,
        "gain": rows["gain"],
        "odd": rows["odd"],
    }


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
