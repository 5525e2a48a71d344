"""What a quantisation scheme costs: the model as it was against what the target computes, over the same tokens.

Beside it stand the scheme by itself (quantised reference, fp32) and the dtype by itself (unquantised, in the target's
dtype), so that a number can be read for what it is. The cost is reported and never judged: whether a target computes
its scheme right is decided against the scheme's own expected result, and how much loss is too much is for the user to
say. `gate.cost_finding` turns the numbers into words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from surefoot.backends.base import Backend
from surefoot.verify import metrics
from surefoot.verify.measure import groups
from surefoot.verify.pack import pack, pack_index

Evidence = dict[str, Any]
Sides = dict[str, Backend]  # "target", "scheme" and, unless the target is fp32, "dtype"


def cost_evidence(base: Backend, sides: Sides, sequences: list[list[int]], tick: Callable[[str], None]) -> Evidence:
    """Per token and side: KL from the base, how much the base prefers its own first choice, and -log p of the next."""
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {"kl": [], "flip": [], "nll": []} for name in sides}
    base_nll: list[np.ndarray] = []
    for group in groups(sequences, base.vocab_size):
        tick("cost of the scheme")
        right = base.score(group)
        base_nll += map(_nll, right, group)
        for name, backend in sides.items():
            for ids, wanted, logits in zip(group, right, backend.score(group)):
                rows = metrics.logit_rows(wanted, logits)
                found[name]["kl"].append(rows["kl"])
                found[name]["flip"].append(rows["flip"])
                found[name]["nll"].append(_nll(logits, ids))
    lengths = [len(s) for s in sequences]
    return {
        "sequence": pack_index(np.repeat(np.arange(len(lengths)), lengths)),
        "base_nll": pack(np.concatenate(base_nll)),
        "sides": {name: {k: pack(np.concatenate(v)) for k, v in rows.items()} for name, rows in found.items()},
    }


def _nll(logits: torch.Tensor, ids: list[int]) -> np.ndarray:
    """-log p of each token's successor, [T]; 0 behind the last."""
    after = torch.tensor(ids[1:], dtype=torch.long).unsqueeze(-1)
    nll = logits[:-1].double().logsumexp(-1) - logits[:-1].double().gather(-1, after).squeeze(-1)
    return torch.cat([nll, nll.new_zeros(1)]).numpy()
