"""Evidence of the measured checks: layers, head and logits, each three-way: reference, expected in its dtype, target.

Logits are reduced to a few numbers a token as soon as a group of sequences has been scored; activations module by
module, in groups of layers that fit into MEMORY.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from surefoot.backends.base import Backend
from surefoot.verify import metrics
from surefoot.verify.calibrate import DITHER, VARIANTS, Variant, model_of
from surefoot.verify.judge import FLOOR
from surefoot.verify.pack import pack_index, pack_rows
from surefoot.verify.pathcapture import plain
from surefoot.verify.quantised import QuantisedLinear

Evidence = dict[str, Any]
LOGITS_BYTES = 512 << 20  # of one side's logits at a time
MEMORY = 2 << 30  # of all captured activations at a time
HEAD_TOKENS = 48
HEAD_SLICE = 8192  # vocabulary rows multiplied at a time in fp64
SUBMODULES = "self_attn|linear_attn|mlp|input_layernorm|post_attention_layernorm"


@dataclass
class Measurer:
    """The three sides of a comparison. expected: the reference in the target's dtype, the reference itself for fp32.

    tick(what, share): progress within the measurement.  device: how much more the target's own repeat runs spread than
    the expected runs', 1 where that cannot be measured.
    """

    reference: Backend
    expected: Backend
    target: Backend
    dtype: torch.dtype
    tick: Callable[[str], None] = lambda what: None
    variants: Sequence[Variant] = VARIANTS
    device: float = 1.0
    notes: list[str] = field(default_factory=list)

    @property
    def eps(self) -> float:
        return torch.finfo(self.dtype).eps

    def nulls(self, run: Callable[[Backend], Any]) -> Iterator[tuple[str, Any]]:
        """`run(expected)` under each variant; in another dtype than the reference's the first is run as it is."""
        model = model_of(self.expected)
        for seed, variant in enumerate(self.variants):
            if variant is DITHER and self.expected is not self.reference:
                self.tick("noise of the dtype: as it is")
                yield "as it is", run(self.expected)
                continue
            self.tick(f"noise of the dtype: {variant.name}")
            if model is not None:
                with variant.apply(model, seed):
                    yield variant.name, run(self.expected)

    # ---- the device's own spread

    def calibrate(self, ids: list[int]) -> Evidence:
        """Spread of the target under dither over that of the expected run under the same dither."""
        self.tick("noise of the device")
        ours, theirs = (self._spread(b, ids) for b in (self.target, self.expected))
        facts: Evidence = {
            "variants": [v.name for v in self.variants],
            "dtype": str(self.dtype).removeprefix("torch."),
            "target_spread": ours,
            "expected_spread": theirs,
        }
        if ours is not None and theirs:
            self.device = max(1.0, ours / theirs)
        return facts | {"device": self.device, "capture": self._overhead(ids)}

    def _overhead(self, ids: list[int]) -> Evidence | None:
        """Seconds of a plain pass of the target, and of one that keeps the activations of the layers."""
        model = model_of(self.target)
        if model is None:
            return None
        pattern = next(patterns(model, len(ids), 1))
        seconds: dict[str, list[float]] = {"plain_s": [], "capturing_s": []}
        for _ in range(2):  # the better of two: the first pass warms up
            for name, work in (
                ("plain_s", lambda: self.target.score([ids])),
                ("capturing_s", lambda: self.target.capture(ids, pattern)),
            ):
                began = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - began)
        return {name: min(found) for name, found in seconds.items()} | {"tokens": len(ids)}

    def _spread(self, backend: Backend, ids: list[int]) -> float | None:
        model = model_of(backend)
        if model is None:
            return None
        (still,) = backend.score([ids])
        with DITHER.apply(model, 1000):
            (moved,) = backend.score([ids])
        return float(np.sqrt(np.mean(metrics.logit_rows(still, moved)["err"] ** 2)))

    # ---- logits

    def logits(self, sequences: list[list[int]]) -> Evidence:
        parts: dict[str, list[metrics.Rows]] = {}
        for group in groups(sequences, self.reference.vocab_size):
            self.tick("logits of the reference")
            right = self.reference.score(group)
            parts.setdefault("reference", []).extend(metrics.reference_rows(r) for r in right)
            for name, found in self.nulls(lambda b, g=group: b.score(g)):  # type: ignore[misc]
                parts.setdefault(f"null {name}", []).extend(map(metrics.logit_rows, right, found))
            self.tick("logits of the target")
            parts.setdefault("run", []).extend(map(metrics.logit_rows, right, self.target.score(group)))
        return self._evidence({k: metrics.concatenate(v) for k, v in parts.items()}, [len(s) for s in sequences])

    def _evidence(self, rows: dict[str, metrics.Rows], lengths: list[int]) -> Evidence:
        nulls = [(k.removeprefix("null "), v) for k, v in rows.items() if k.startswith("null ")]
        return {
            "eps": self.eps,
            "device": self.device,
            "reference": pack_rows(rows["reference"]),
            "run": pack_rows(rows["run"]),
            "nulls": [{"name": name, "rows": pack_rows(r)} for name, r in nulls],
            "sequence": pack_index(np.repeat(np.arange(len(lengths)), lengths)),
            "position": pack_index(np.concatenate([np.arange(n) for n in lengths])),
        }

    # ---- head

    def head(self, ids: list[int]) -> Evidence:
        """Each side's logits against those of the reference's head, in fp64, on that side's own last hidden state."""
        model = model_of(self.reference)
        weight = getattr(getattr(model, "lm_head", None), "weight", None)
        if weight is None or weight.is_meta or model_of(self.target) is None:
            return {"not_possible": "the head's input or its weight cannot be seen"}
        self.tick("head")
        ids = ids[:HEAD_TOKENS]

        def rows(backend: Backend) -> tuple[torch.Tensor, metrics.Rows]:
            seen = backend.capture(ids, r"model\.(language_model\.)?norm")
            right = _head(next(iter(seen.outputs.values())), model.lm_head)  # type: ignore[union-attr]
            return right, metrics.logit_rows(right, seen.logits)

        right, run = rows(self.target)
        found: dict[str, metrics.Rows] = {"reference": metrics.reference_rows(right), "run": run}
        found |= {f"null {name}": null for name, (_, null) in self.nulls(rows)}
        return self._evidence(found, [len(ids)])

    # ---- layers

    def layers(self, ids: list[int]) -> Evidence:
        ours, theirs = model_of(self.target), model_of(self.reference)
        if ours is None or theirs is None:
            return {"not_possible": "the modules of one side cannot be seen"}
        modules: list[Evidence] = []
        for pattern in patterns(ours, len(ids), len(self.variants) + 2):
            self.tick("layers of the reference")
            right = _outputs(self.reference, ids, pattern)
            nulls = [found for _, found in self.nulls(lambda b, p=pattern: _outputs(b, ids, p))]  # type: ignore[misc]
            self.tick("layers of the target")
            run = _outputs(self.target, ids, pattern)
            for path in (p for p in right if p in run):
                modules.append(self._module(path, right[path], [n[path] for n in nulls], run[path]))
        return {
            "device": self.device,
            "modules": modules,
            "sequence": pack_index(np.zeros(len(ids), int)),
            "position": pack_index(np.arange(len(ids))),
        }

    def _module(self, path: str, right: torch.Tensor, nulls: list[torch.Tensor], run: torch.Tensor) -> Evidence:
        size = right.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).square().mean(-1, keepdim=True).sqrt()
        floor = FLOOR * self.eps * size
        scale = metrics.noise_scale(right, nulls, floor)
        units = []
        for i, null in enumerate(nulls):
            others = nulls[:i] + nulls[i + 1 :]
            units.append(metrics.activation_rows(right, null, metrics.noise_scale(right, others, floor)))
        return {
            "path": path,
            "noise": float((scale / size.clamp(min=1e-300)).median()),
            "run": pack_rows(metrics.activation_rows(right, run, scale)),
            "nulls": [pack_rows(u) for u in units],
        }


def groups(sequences: list[list[int]], vocab_size: int) -> Iterator[list[list[int]]]:
    """Sequences whose logits together take at most LOGITS_BYTES, at least one at a time."""
    group: list[list[int]] = []
    for sequence in sequences:
        if group and 4 * vocab_size * sum(map(len, [*group, sequence])) > LOGITS_BYTES:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def patterns(model: nn.Module, tokens: int, copies: int) -> Iterator[str]:
    """Regexes of the modules to capture in one pass: embedding, layers with their parts, last norm, in order."""
    layers = sorted({int(m[1]) for n, _ in model.named_modules() if (m := re.search(r"\.layers\.(\d+)$", n))})
    hidden = next(m.weight.shape[1] for n, m in model.named_modules() if n.endswith("embed_tokens"))
    step = max(1, MEMORY // (4 * 5 * tokens * int(hidden) * copies))
    prefix = r"model\.(language_model\.)?"
    for i in range(0, len(layers), step):
        chosen = "|".join(map(str, layers[i : i + step]))
        ends = (["embed_tokens"] if i == 0 else []) + (["norm"] if i + step >= len(layers) else [])
        yield prefix + "(" + "|".join([*ends, rf"layers\.({chosen})(\.({SUBMODULES}))?"]) + ")"


def _outputs(backend: Backend, ids: list[int], pattern: str) -> dict[str, torch.Tensor]:
    """Captured outputs [T, D] by plain path, in the order of the computation of a layer."""
    found = backend.capture(ids, pattern).outputs
    return {plain(path): value.reshape(len(ids), -1) for path, value in found.items()}


def _head(hidden: torch.Tensor, head: Any) -> torch.Tensor:
    """hidden @ weight.T in fp64, [T, vocab]."""
    x, weight = hidden.reshape(-1, hidden.shape[-1]), head.weight
    x = (head.seen(x) if isinstance(head, QuantisedLinear) else x).double()
    return torch.cat([x @ part.detach().cpu().double().t() for part in weight.split(HEAD_SLICE)], dim=-1)
