"""Which linear layers of a model are quantised.

Only `Linear` modules are candidates, so embeddings, norms, convolutions and loose parameters (`A_log`) stay as they are
by kind. Of the candidates a model class names those to keep (`quant_exclude`): the output layer, and projections so
small that nothing is gained. What is kept is always reported, as requested is not effective there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from surefoot.core.errors import InputError
from surefoot.quant.schemes import Scheme

LM_HEAD = "lm_head"


@dataclass(frozen=True)
class Selection:
    """modules: HF paths to quantise; excluded: HF path -> why it is kept."""

    scheme: Scheme
    modules: tuple[str, ...]
    excluded: dict[str, str] = field(default_factory=dict)


def select(
    linears: Mapping[str, tuple[int, int]], scheme: Scheme, exclude: Collection[str], lm_head: bool = False
) -> Selection:
    """Choose among `linears` (HF path -> (out, in)). `exclude` are regexes of whole paths; `lm_head` overrules them."""
    modules, excluded = [], {}
    for name, (_, inner) in linears.items():
        wanted = lm_head and name.endswith(LM_HEAD)
        if not wanted and any(re.fullmatch(pattern, name) for pattern in exclude):
            excluded[name] = "excluded by the model"
        elif scheme.group_size and inner % scheme.group_size:
            excluded[name] = f"{inner} inputs are no multiple of {scheme.group_size}"
        else:
            modules.append(name)
    if not modules:
        reasons = "; ".join(sorted(set(excluded.values()))) or "it has no linear layers"
        raise InputError(f"nothing in this model can be quantised by {scheme}: {reasons}")
    return Selection(scheme, tuple(modules), excluded)


def in_effect(schemes: Collection[Scheme], excluded: Mapping[str, str], source: str) -> dict[str, Any]:
    """For a report: scheme(s), group size(s), where from, how many layers, what was kept."""
    groups = sorted({s.group_size for s in schemes if s.group_size})
    return {
        "scheme": "+".join(sorted({s.name for s in schemes})),
        "group_size": groups[0] if len(groups) == 1 else groups or None,
        "source": source,
        "layers": len(schemes),
        "excluded": summarise(excluded),
    }


def summarise(excluded: Mapping[str, str]) -> list[str]:
    """`model.layers.*.linear_attn.in_proj_a x 18 (why)`: the same path in all layers is one entry."""
    counts: dict[tuple[str, str], int] = {}
    for name, reason in excluded.items():
        key = re.sub(r"\.\d+(?=\.|$)", ".*", name), reason
        counts[key] = counts.get(key, 0) + 1
    return [
        name + (f" x {count}" if count > 1 else "") + (f" ({reason})" if reason else "")
        for (name, reason), count in counts.items()
    ]
