"""Causes that an exact check has already shown: a setting in effect, a weight that is not the checkpoint's.

Such a fault may be smaller than the noise of the target's dtype (an epsilon, a slightly wrong frequency table); it is a
fault all the same, and the module is known.
"""

from __future__ import annotations

from typing import Any

import torch

from surefoot.backends.base import Backend
from surefoot.verify.candidates_rope import ROPE_SENTENCES, rope_config, rope_mistakes
from surefoot.verify.pathcapture import plain
from surefoot.verify.shapes import Cause, Finding

SAID = {
    "eps": ("norm_eps", "a norm uses another epsilon"),
    "scale": ("score_scale", "attention scores have another scale"),
    "num_kv_heads": ("gqa_mapping", "another number of KV heads"),
    "sliding_window": ("window", "another sliding window"),
    "quantisation": ("scheme", "a layer is quantised another way"),
    "attention_scaling": ("rope_scaling_type", "another attention factor of rope"),
}


def exact_cause(finding: Finding, reference: Backend) -> tuple[str, Cause] | None:
    """(module, cause) of a failed "config" or "weights" check."""
    wrong = finding.details.get("wrong") or []
    if finding.check == "weights" and wrong:
        module = plain(str(wrong[0])).rpartition(".")[0]
        return module, Cause("weight_changed", f"weights in memory are not the checkpoint's: {wrong[0]}", 0.0)
    if finding.check != "config" or not wrong:
        return None
    first: dict[str, Any] = wrong[0]
    module, key = plain(first["module"]), first["key"]
    if key == "inv_freq":
        return module, _table(first, reference)
    if key.startswith("weight in effect"):
        return module, Cause("norm_plus_one", "the weight that a norm multiplies by is not the checkpoint's", 0.0)
    name, text = SAID.get(key, ("setting", f"another {key}"))
    return module, Cause(name, f"{text}: {shown(first['target'])} instead of {shown(first['reference'])}", 0.0)


def _table(item: dict[str, Any], reference: Backend) -> Cause:
    """Which mistake gives this table of frequencies: the angles at position 1."""
    got = torch.tensor(item["target"])
    for name, label, angle in rope_mistakes(rope_config_of(reference), 2):
        if angle.shape[-1] == len(got) and torch.allclose(angle[1], got, rtol=1e-5, atol=0):
            return Cause(name, f"{ROPE_SENTENCES[name]}: {label}", 0.0)
    return Cause("rope_theta", "the table of rope frequencies is another one", 0.0)


def rope_config_of(reference: Backend) -> Any:
    return rope_config(getattr(reference, "model"))  # noqa: B009


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
