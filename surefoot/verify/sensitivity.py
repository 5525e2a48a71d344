"""The smallest fault that a proof would have caught: faults are planted in the target and made smaller until they pass.

Only the measured checks (layers and logits) are asked; the exact ones see any change of a weight or a setting. A fault
lasts for one scored sequence; reference and null runs are taken once. On a canary: a few seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from surefoot.backends.native import NativeBackend
from surefoot.layers.rotary import inverse_frequencies
from surefoot.verify import gate, inject, metrics
from surefoot.verify.judge import FLOOR
from surefoot.verify.measure import Measurer, _outputs, patterns
from surefoot.verify.pack import pack_index, pack_rows

TOKENS = 80
STEPS = 5  # halvings of the exponent's range: from seven decades to a factor of 1.7


@dataclass(frozen=True)
class Scaled:
    """A fault of a size. text: what size means, with {}.  low, high: where it is sought."""

    id: str
    text: str
    low: float
    high: float
    apply: Callable[[NativeBackend, float], AbstractContextManager[Any]]
    part: str = "mlp"  # a target without such a module cannot have it


def _eps(target: NativeBackend, size: float):
    norm = inject.layer_with(target, "input_layernorm", 1)
    return inject.op(norm, "rms_norm", lambda right, x, weight, eps: right(x, weight, eps * size))


def _gain(target: NativeBackend, size: float):
    return inject.output(inject.layer_with(target, "mlp", 1).down_proj, lambda y: y * (1 + size))


def _theta(target: NativeBackend, size: float):
    rotary = target.engine.model.rotary
    table = inverse_frequencies(replace(rotary.config, theta=rotary.config.theta * (1 + size)), rotary.inv_freq.device)
    return inject.attribute(rotary, "inv_freq", table)


def _leak(target: NativeBackend, size: float):
    """Each token's attention takes a share of the next token's."""

    def wrong(right, q, *rest):
        out = right(q, *rest)
        late = torch.cat((out[1:], out[-1:]))
        return (out.float() + size * (late.float() - out.float())).to(out.dtype)

    return inject.op(inject.layer_with(target, "self_attn", 0), "paged_attention", wrong)


def _one_row(target: NativeBackend, size: float):
    def spoil(y):
        y = y.clone()
        y[len(y) // 2] *= 1 + size
        return y

    return inject.output(inject.layer_with(target, "mlp", 1), spoil)


def _state(target: NativeBackend, size: float):
    """The recurrent state keeps so many bits: rounding by `size`, relatively, after each token."""

    def rounded(state):
        mantissa, exponent = torch.frexp(state)
        return torch.ldexp((mantissa / size).round() * size, exponent)

    def chunk(right, q, k, v, g, beta, state, slots, starts, lens):
        out, row = torch.empty_like(v), 0
        for i, n in enumerate(lens):
            for t in range(row, row + n):
                one, slot = slice(t, t + 1), slots[i : i + 1]
                out[one] = right(q[one], k[one], v[one], g[one], beta[one], state, slot, starts[:2] * 0, [1])
                state[slot] = rounded(state[slot])
            row += n
        return out

    return inject.op(inject.layer_with(target, "linear_attn", 0), "gated_delta_chunk", chunk)


SCALED = [
    Scaled("norm_eps", "RMSNorm epsilon of one layer {} times too large", 1.01, 1e6, _eps),
    Scaled("gain", "one dense layer's output too large by {}", 1e-7, 1.0, _gain),
    Scaled("rope_theta", "rope theta too large by {}", 1e-7, 1.0, _theta, "self_attn"),
    Scaled("mask_leak", "a share {} of attention from a future token in one layer", 1e-7, 1.0, _leak, "self_attn"),
    Scaled("one_token", "one token's MLP output in one layer too large by {}", 1e-6, 1.0, _one_row),
    Scaled("state_rounding", "one layer's recurrent state rounded by {}", 1e-7, 0.25, _state, "linear_attn"),
]


class Detector:
    """Layers and logits of one sequence, judged as in a proof; reference and null runs are kept."""

    def __init__(self, measurer: Measurer, ids: list[int]):
        self.measurer, self.ids = measurer, ids
        self.pattern = next(patterns(measurer.target.engine.model, len(ids), 8))  # type: ignore[attr-defined]
        self.right = _outputs(measurer.reference, ids, self.pattern)
        (logits,) = measurer.reference.score([ids])
        self.logits, self.rows = logits, {"reference": metrics.reference_rows(logits)}
        nulls = []
        for name, (found, null) in measurer.nulls(lambda b: (_outputs(b, ids, self.pattern), b.score([ids])[0])):
            nulls.append(found)
            self.rows[f"null {name}"] = metrics.logit_rows(logits, null)
        # The evidence of every module once, with the first null run in the target's place.
        self.modules = [measurer._module(p, r, [n[p] for n in nulls], nulls[0][p]) for p, r in self.right.items()]
        self.scales = {p: self._scale(r, [n[p] for n in nulls]) for p, r in self.right.items()}

    def _scale(self, right: torch.Tensor, nulls: list[torch.Tensor]) -> torch.Tensor:
        size = right.double().square().mean(-1, keepdim=True).sqrt()
        return metrics.noise_scale(right, nulls, FLOOR * self.measurer.eps * size)

    def sees(self) -> bool:
        """Whether the target, as it is now, would be refused."""
        m = self.measurer
        run = _outputs(m.target, self.ids, self.pattern)
        modules = []
        for module in self.modules:
            path = module["path"]
            rows = metrics.activation_rows(self.right[path], run[path], self.scales[path])
            modules.append(module | {"run": pack_rows(rows)})
        count = len(self.ids)
        index = {"sequence": pack_index(np.zeros(count, int)), "position": pack_index(np.arange(count))}
        layers = {"device": m.device, "modules": modules, **index}
        if any(f.status == "fail" for f in gate.examine("layers", {"layers": layers})):
            return True
        (found,) = m.target.score([self.ids])
        logits = m._evidence(self.rows | {"run": metrics.logit_rows(self.logits, found)}, [len(self.ids)])
        return any(f.status == "fail" for f in gate.examine("logits", {"logits": logits}))


def smallest_faults(measurer: Measurer, ids: list[int]) -> list[dict[str, Any]]:
    """For each scaled fault the smallest size that is seen, and the largest tried that is not.

    Only for Surefoot's own engine, into which faults can be planted. seen is None where even the largest passes.
    """
    target = measurer.target
    if not isinstance(target, NativeBackend):
        return []
    detector = Detector(measurer, ids[:TOKENS])
    found = []
    for fault in SCALED:
        if any(hasattr(layer, fault.part) for layer in target.engine.model.decoder_layers):
            measurer.tick(f"smallest fault: {fault.id}")
            seen, passed = _search(detector, target, fault)
            text = (
                fault.text.format(f"{seen:.2g}") if seen is not None else f"not seen: {fault.text.format(fault.high)}"
            )
            found.append({"fault": fault.id, "seen": seen, "passed": passed, "text": text})
    return found


def _search(detector: Detector, target: NativeBackend, fault: Scaled) -> tuple[float | None, float | None]:
    def sees(size: float) -> bool:
        with fault.apply(target, size):
            return detector.sees()

    low, high = math.log(fault.low), math.log(fault.high)
    if not sees(fault.high):
        return None, fault.high
    for _ in range(STEPS):
        middle = (low + high) / 2
        if sees(math.exp(middle)):
            high = middle
        else:
            low = middle
    passed = math.exp(low)
    return math.exp(high), passed if passed > fault.low * 1.0001 else None
