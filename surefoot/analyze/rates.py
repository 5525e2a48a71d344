"""Seconds of a step as an interval: from a chip's published peaks, or from a calibration of a real device.

low    the roofline: all arithmetic at the peak or all compulsory bytes at full bandwidth, whichever takes longer.
       With a calibration, "peak" and "bandwidth" are the best rates that were ever seen while measuring. That is no
       law of nature, so low is also at most the expected time shrunk by the error of the other direction.
high   with a calibration: the expected time (each op call by the measured cost of its kind, plus the step's overhead),
       stretched by the largest error that the same prediction made on the calibration's own engine steps.
       Without one, an ASSUMPTION that is meant to be wide: see `ASSUMED`.

What is unknown stays None: no bandwidth, no high end.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from surefoot.analyze.roofline import OpCall, StepCost, chip_peak, lower_bound
from surefoot.device.chips import Chip

# For the high end of an uncalibrated chip: one op after the other, each at these shares of the peaks, each started by
# an eager framework that launches several kernels for it; and the host's part of a step.
ASSUMED = {"compute": 0.25, "bandwidth": 0.3, "launch_s": 200e-6, "step_s": 5e-3}


@dataclass(frozen=True)
class Interval:
    """Seconds (or tokens/s). None: unknown. `expected` only where something was measured."""

    low: float | None
    expected: float | None
    high: float | None

    def inverse(self, amount: float) -> Interval:
        """amount / self, ends swapped: a rate from a time."""
        low, expected, high = (amount / v if v else None for v in (self.high, self.expected, self.low))
        return Interval(low, expected, high)

    def __add__(self, other: Interval) -> Interval:
        pairs = zip((self.low, self.expected, self.high), (other.low, other.expected, other.high))
        return Interval(*(None if a is None or b is None else a + b for a, b in pairs))

    def times(self, factor: float | None) -> Interval:
        return Interval(*(None if v is None or factor is None else v * factor for v in vars(self).values()))

    def holds(self, value: float) -> bool:
        return (self.low is None or self.low <= value) and (self.high is None or value <= self.high)


class Rates(Protocol):
    """What turns op calls into seconds."""

    def interval(self, cost: StepCost, phase: str) -> Interval:
        """Seconds of a step; `phase` is "prefill" or "decode"."""
        ...


@dataclass(frozen=True)
class ChipRates:
    """By published peaks; `dtype` is that of the activations."""

    chip: Chip
    dtype: str

    def interval(self, cost: StepCost, phase: str) -> Interval:
        peak, bandwidth = chip_peak(self.chip.peak_flops, self.dtype), self.chip.memory_bandwidth
        low = lower_bound(cost, peak, bandwidth)
        if bandwidth is None or any(peak(call) is None for call in cost.calls if call.flops):
            return Interval(low, None, None)

        def serial(call: OpCall) -> float:
            compute = call.flops / ((peak(call) or 1.0) * ASSUMED["compute"])
            return compute + call.bytes / (bandwidth * ASSUMED["bandwidth"]) + ASSUMED["launch_s"]

        return Interval(low, None, cost.total(serial) + ASSUMED["step_s"])


@dataclass
class OpFit:
    """Seconds of an op that is not linear: per_call + flops * per_flop + bytes * per_byte, fitted to timed calls."""

    per_call: float
    per_flop: float
    per_byte: float

    def seconds(self, call: OpCall) -> float:
        return self.per_call + call.flops * self.per_flop + call.bytes * self.per_byte


@dataclass
class Variant:
    """What was measured for one dtype or scheme.

    linear: rows -> (median, best) seconds per weight element of a linear op with so many rows.
    linear_call: rows -> seconds of a small linear op beyond that, which no number of weights explains.
    weights: elements that the linear ops of a step of the smallest probe model go through.
    best: FLOP/s and bytes/s of the linear ops of an engine step taken together, the highest that were seen.
    overhead: seconds of a step outside the ops: per op call, per element passed between layers, per logit.
    replayed: the same of a decode step that is repeated from a record; None where none is.
    error: phase -> (least, median, largest) ratio of measured to expected seconds over the calibration's engine steps.
    """

    linear: dict[int, tuple[float, float]] = field(default_factory=dict)
    linear_call: dict[int, float] = field(default_factory=dict)
    weights: float = 0.0
    ops: dict[str, OpFit] = field(default_factory=dict)
    best: tuple[float, float] = (0.0, 0.0)
    overhead: tuple[float, float, float] = (0.0, 0.0, 0.0)
    replayed: tuple[float, float, float] | None = None
    error: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def per_weight(self, rows: int, best: bool = False) -> float:
        """Seconds per weight element at `rows`, between measured points along a power law, beyond them per row."""
        return _between({n: times[best] for n, times in self.linear.items()}, rows)

    def linear_seconds(self, call: OpCall, launch: float) -> float:
        fixed = _between(self.linear_call, call.rows) if self.linear_call else 0.0
        return max(launch, fixed + call.weights * self.per_weight(call.rows))

    def is_small(self, cost: StepCost) -> bool:
        """Whether the step goes through far fewer weights than any that was measured: they stay in the caches."""
        return cost.total(lambda call: call.weights) < self.weights / FAR_SMALLER

    def saw(self, calls: Sequence[tuple[OpCall, float]]) -> None:
        """Keep the highest rates of the linear ops of one engine step; `calls` with their seconds."""
        linear = [(call, seconds) for call, seconds in calls if call.op_class == "linear"]
        if seconds := sum(seconds for _, seconds in linear):
            flops, moved = sum(call.flops for call, _ in linear), sum(call.bytes for call, _ in linear)
            self.best = max(self.best[0], flops / seconds), max(self.best[1], moved / seconds)

    def peak(self) -> float:
        """The most FLOP/s of linear ops that was ever seen."""
        return max([self.best[0], *(2 * rows / best for rows, (_, best) in self.linear.items())])


def _between(points: Mapping[int, float], rows: int) -> float:
    """Value at `rows`: a power law between two points, in proportion beyond the last, the same before the first."""
    known = sorted(points)
    if rows >= known[-1]:
        return points[known[-1]] * rows / known[-1]
    i = bisect.bisect_right(known, rows)
    if i == 0:
        return points[known[0]]
    low, high = points[known[i - 1]], points[known[i]]
    share = math.log(rows / known[i - 1]) / math.log(known[i] / known[i - 1])
    return low ** (1 - share) * high**share if low and high else low + (high - low) * share


# Beyond the largest error that was seen, because a handful of probe steps do not show the worst one.
MARGIN, LEAST_STRETCH = 1.15, 1.25
UNMEASURED_STRETCH = 2.0  # for a phase, an op or a size of model that the calibration did not see
FAR_SMALLER = 4.0  # times fewer weights than the smallest probe model: another size


@dataclass
class Calibration:
    """One device as measured: rates in bytes/s and FLOP/s, times in seconds. Saved as JSON by `analyze.calibrate`.

    launch: from one start of a tiny op to the next.  replay: the same in a recorded step; None where none is recorded.
    """

    device: str
    device_name: str
    date: str
    threads: int
    memory: int
    bandwidth: tuple[float, float]  # median, best
    launch: float
    variants: dict[str, Variant]
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    replay: float | None = None

    def rates(self, variant: str) -> CalibratedRates | None:
        return CalibratedRates(self, self.variants[variant]) if variant in self.variants else None

    def peaks(self, variant: str) -> dict[str, Any]:
        """What MFU and MBU are shares of, in the form that a benchmark records: the best rates that were ever seen."""
        own = self.variants.get(variant)
        return {
            "flops_per_s": own.peak() if own and own.linear else None,
            "bytes_per_s": self.best_bandwidth(),
            "source": f"best seen by surefoot calibrate, {self.date}, {self.threads} threads",
        }

    def best_bandwidth(self) -> float:
        """The fastest that bytes were seen to arrive, by the read probe or by a linear op with one row."""
        per_element = {"float32": 4.0, "w8a8": 1.0, "w8a16": 1.0, "w4a16": 0.5, "w4a8": 0.5}
        found = [self.bandwidth[1]]
        for name, variant in self.variants.items():
            found.append(variant.best[1])
            if 1 in variant.linear:
                found.append(per_element.get(name, 2.0) / variant.linear[1][1])
        return max(found)

    def as_dict(self) -> dict[str, Any]:
        data = asdict(self)
        for variant in data["variants"].values():
            for name in ("linear", "linear_call"):
                variant[name] = {str(rows): times for rows, times in variant[name].items()}
        return {"format": FORMAT} | data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        given = {key: value for key, value in data.items() if key != "format"}
        given["bandwidth"] = tuple(given["bandwidth"])
        given["variants"] = {name: _variant(v) for name, v in given["variants"].items()}
        return cls(**given)


FORMAT = "surefoot-calibration-1"


def _variant(data: Mapping[str, Any]) -> Variant:
    return Variant(
        linear={int(rows): (times[0], times[1]) for rows, times in data["linear"].items()},
        linear_call={int(rows): seconds for rows, seconds in data.get("linear_call", {}).items()},
        weights=data.get("weights", 0.0),
        ops={name: OpFit(**fit) for name, fit in data["ops"].items()},
        best=tuple(data.get("best", (0.0, 0.0))),
        overhead=tuple(data["overhead"]),
        replayed=tuple(data["replayed"]) if data.get("replayed") else None,
        error={phase: tuple(ratios) for phase, ratios in data["error"].items()},
    )


@dataclass(frozen=True)
class CalibratedRates:
    """By what was measured on one device for one dtype or scheme."""

    calibration: Calibration
    variant: Variant

    def interval(self, cost: StepCost, phase: str) -> Interval:
        low = lower_bound(cost, self._peak(), self.calibration.best_bandwidth())
        raw = self.raw(cost, phase)
        if phase not in self.variant.error:
            return Interval(low, raw, raw * UNMEASURED_STRETCH)
        least, median, largest = self.variant.error[phase]
        stretch, shrink = max(LEAST_STRETCH, MARGIN * largest / median), MARGIN * median / least
        if any(call.op not in self.variant.ops for call in cost.calls if call.op_class != "linear"):
            stretch = max(stretch, UNMEASURED_STRETCH)
        if self.variant.is_small(cost):
            stretch = max(stretch, UNMEASURED_STRETCH)
        expected = max(raw * median, low or 0.0)
        return Interval(min(low or expected, expected / shrink), expected, expected * stretch)

    def raw(self, cost: StepCost, phase: str) -> float:
        """Sum over op calls, and the overhead: before the correction by what the probe steps showed."""
        replayed = self.variant.replayed if phase == "decode" else None
        per_call, per_passed, per_logit = replayed or self.variant.overhead
        overhead = per_call * cost.calls.total() + per_passed * cost.passed + per_logit * cost.logits
        return self.ops(cost, phase) + overhead

    def ops(self, cost: StepCost, phase: str) -> float:
        """Sum over op calls. Those of a recorded decode step are not looked up and started by the host one by one."""
        replay = self.calibration.replay
        if phase != "decode" or replay is None:
            return cost.total(self.seconds)
        host = max(0.0, self.calibration.launch - replay)
        return cost.total(lambda call: max(replay, self.seconds(call) - host))

    def seconds(self, call: OpCall) -> float:
        if call.op_class == "linear" and self.variant.linear:
            return self.variant.linear_seconds(call, self.calibration.launch)
        fit = self.variant.ops.get(call.op)
        return fit.seconds(call) if fit else self.calibration.launch + call.bytes / self.calibration.bandwidth[0]

    def _peak(self) -> Callable[[OpCall], float | None]:
        everywhere = [v.peak() for v in self.calibration.variants.values() if v.linear]
        best, own = max(everywhere, default=None), self.variant.peak() if self.variant.linear else None
        return lambda call: own if call.op_class == "linear" else best
