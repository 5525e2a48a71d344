"""Where a target goes wrong: the first module whose own error exceeds what its dtype explains, and the op inside it.

Own error: the reference's module (fp32) is given what the target's module was given, and the outputs are compared; so
an error that was inherited does not count. It is judged token by token: one wrong row in 2048 is as visible as 2048.
Budget: `noise_factor` times the error that right arithmetic makes there (see `Replay.expected`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from surefoot.backends.base import Backend, Capture
from surefoot.verify import opreplay
from surefoot.verify.pathcapture import PathCapture, captures
from surefoot.verify.quantised import QuantisedLinear
from surefoot.verify.replay import LAYER, MIXERS, Replay, floored, input_of, row_norm, second_of, unit_roundoff
from surefoot.verify.shapes import Localisation, VerifySettings

# Positions times frequencies: an fp32 angle of several thousand radians is off by this many of its own roundings.
ANGLE_ROUNDINGS = 2.0
NOT_FINITE = 1e30  # stands for infinity in tables


@dataclass
class Suspect:
    """A module on one path with everything that a cause is sought from. Tensors are fp32 rows [T, ...].

    given: what the target's module was given.  got: what it gave.  right: what the reference gives for `given`.
    noise: [T] error expected of right arithmetic.  own: [T] error found.
    """

    path: str
    given: torch.Tensor | None
    got: torch.Tensor
    right: torch.Tensor
    noise: torch.Tensor
    second: torch.Tensor | None = None
    on: PathCapture = field(default_factory=lambda: PathCapture("whole", Capture(torch.empty(0))))

    @property
    def own(self) -> torch.Tensor:
        return row_norm(self.got.float() - self.right)

    @property
    def excess(self) -> float:
        """Largest own error of a token in units of the noise; infinite if something is not finite that should be."""
        return distance(self.got, self.right, self.noise)


def distance(got: torch.Tensor, wanted: torch.Tensor, noise: torch.Tensor) -> float:
    """Largest per-token difference of two outputs in units of the noise; infinite if only one of them is finite.

    A token whose right output is not finite has inherited that: it counts only where the target's is finite.
    """
    got, wanted = got.float().reshape(len(noise), -1), wanted.float().reshape(len(noise), -1)
    if not torch.equal(torch.isfinite(got), torch.isfinite(wanted)):
        return math.inf
    sound = torch.isfinite(wanted).all(-1)
    ratio = (got[sound] - wanted[sound]).norm(dim=-1) / noise[sound]
    return float(ratio.max()) if len(ratio) else 0.0


def dtype_of(target: Backend) -> torch.dtype:
    return getattr(torch, str(target.info().get("dtype", "float32")).removeprefix("torch."))


def suspects(replay: Replay, on: PathCapture, dtype: torch.dtype) -> list[Suspect]:
    """Every module that both sides have, in the order in which they complete."""
    found = []
    for path in replay.calls:
        judged = judge(replay, path, on, dtype)
        if judged is not None:
            found.append(judged)
    return found


def judge(replay: Replay, path: str, on: PathCapture, dtype: torch.dtype) -> Suspect | None:
    """One module on one path; None if one side does not have it."""
    found = _compare(replay, path, on, dtype)
    if found is not None:
        found.on = on
    return found


def _compare(replay: Replay, path: str, on: PathCapture, dtype: torch.dtype) -> Suspect | None:
    capture = on.capture
    got = capture.logits if path == "lm_head" and len(capture.logits) else capture.outputs.get(path)
    if got is None:
        return None
    if path.endswith("rotary_emb"):
        return _rotary(replay, path, got, dtype)
    if LAYER.fullmatch(path):
        return _residual(path, capture, got, dtype)
    given = input_of(path, capture, on.token_ids)
    if given is None:
        return None
    second = second_of(path, capture)
    right = replay.run(path, given, second=second).float()
    if right.numel() != got.numel():
        return None
    noise = replay.expected(path, given, dtype, right, second)
    return Suspect(path, given, got.float().reshape(right.shape), right, noise, second)


def _rotary(replay: Replay, path: str, got: torch.Tensor, dtype: torch.dtype) -> Suspect:
    """Cosines of the rotary table, [T, R / 2]: they depend on positions alone."""
    nothing = torch.zeros(replay.calls[path].shape)
    right, table = (replay.run(path, nothing, t).float() for t in (torch.float32, dtype))
    half = right.shape[-1] // 2  # transformers stores each angle twice
    right, table = right[:, :half], table[:, :half]
    if got.shape[-1] == 2 * half and torch.equal(got[:, :half], got[:, half:]):
        got = got[:, :half]
    positions = torch.arange(replay.num_tokens).float() + 1
    angle = positions * unit_roundoff(torch.float32) * ANGLE_ROUNDINGS * math.sqrt(half)
    noise = torch.maximum(row_norm(table - right), angle) + unit_roundoff(dtype) * row_norm(right)
    wider = max(half, got.shape[-1])  # a table of another width is wrong, and comparable
    right, got = (torch.nn.functional.pad(t, (0, wider - t.shape[-1])) for t in (right, got.float()))
    return Suspect(path, None, got, right, noise)


def _residual(path: str, capture: Capture, got: torch.Tensor, dtype: torch.dtype) -> Suspect | None:
    """A decoder layer's own arithmetic is two additions: x + mixed + fed. Its parts are judged on their own."""
    x = capture.inputs.get(path)
    names = [f"{path}.{name}" for name in (*MIXERS, "mlp")]
    parts = [capture.outputs[n].float() for n in names if n in capture.outputs]
    if x is None or len(parts) != 2:
        return None
    right = x.float() + parts[0] + parts[1]
    size = row_norm(x) + row_norm(parts[0]) + row_norm(parts[1])
    noise = floored(torch.zeros_like(size), size, 2 * unit_roundoff(dtype))
    return Suspect(path, x, got.float(), right, noise)


def guilty(found: Sequence[Suspect], factor: float) -> Suspect | None:
    """The first whose own error exceeds its budget. Parts complete before the whole, so the part is named."""
    return next((s for s in found if s.excess > factor), None)


def table(found: Sequence[Suspect], replay: Replay, factor: float) -> list[dict[str, Any]]:
    """One row per module: relative own error of its worst token, the budget there, and in units of the noise."""
    rows = []
    for s in found:
        scale = row_norm(s.right).clamp(min=1e-30)
        worst = int(torch.nan_to_num(s.own / s.noise, nan=math.inf).argmax())
        rows.append(
            {
                "path": s.path,
                "own_error": _number(s.own[worst] / scale[worst]),
                "budget": _number(factor * s.noise[worst] / scale[worst]),
                "token": worst,
                "in_noise": _number(s.excess),
                "on": s.on.path,
            }
        )
    return rows


def _number(value: torch.Tensor | float) -> float:
    """JSON has no infinity."""
    number = float(value)
    return number if math.isfinite(number) else NOT_FINITE


@dataclass
class Search:
    """A localisation with what the cause search goes on from."""

    localisation: Localisation
    suspect: Suspect
    replay: Replay
    dtype: torch.dtype
    mismatch: opreplay.Mismatch | None = None


def usual_op(replay: Replay, path: str) -> str | None:
    """The one op of a module that has only one."""
    module = replay.module(path)
    if isinstance(module, QuantisedLinear):
        return "linear_w8" if module.scheme.bits == 8 else "linear_w4"
    if isinstance(module, torch.nn.Linear):
        return "linear"
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    if path.endswith("linear_attn.norm"):
        return "gated_rms_norm"
    return "rms_norm" if path.endswith("norm") else None


def search(
    reference: Backend,
    target: Backend,
    token_ids: Sequence[int],
    settings: VerifySettings,
    paths: Sequence[str] | None = None,
) -> Search | None:
    """The first guilty module on the first guilty path, or None if every module on every path keeps its budget."""
    replay = Replay(reference, token_ids)
    dtype = dtype_of(target)
    for on in captures(target, token_ids, paths):
        found = suspects(replay, on, dtype)
        suspect = guilty(found, settings.noise_factor)
        if suspect is None:
            continue
        mismatch = opreplay.guilty_op(target, suspect.path, on.path, token_ids)
        rows = table(found, replay, settings.noise_factor)
        (row,) = (r for r in rows if r["path"] == suspect.path)
        op = mismatch.op if mismatch else usual_op(replay, suspect.path)
        place = Localisation(suspect.path, op, row["own_error"], row["budget"], rows)
        return Search(place, suspect, replay, dtype, mismatch)
    return None


def localise(
    reference: Backend, target: Backend, token_ids: Sequence[int], settings: VerifySettings
) -> Localisation | None:
    """Where the target goes wrong on this sequence, or None. The path is in the table's rows under "on"."""
    found = search(reference, target, token_ids, settings)
    return found.localisation if found else None
