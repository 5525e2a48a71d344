"""Synthetic logits and activations with known truth, and the verdict of the gate on them."""

from __future__ import annotations

import numpy as np
import torch

from surefoot.verify import gate, metrics
from surefoot.verify.measure import Measurer
from surefoot.verify.pack import pack_index, pack_rows
from surefoot.verify.shapes import Finding

BF16 = 2.0**-7
NOISE = 0.02

# Evidence of all checks but the logits, all good.
GOOD = {
    "template": {"items": [{"name": "a", "reference": "x", "target": "x"}]},
    "tokens": {"items": [{"name": "a", "reference": "x", "target": "x"}]},
    "weights": {"source": "checkpoint", "items": [["w", "1", "1"]], "missing": [], "unexpected": [], "tied": []},
    "config": {"items": [{"module": "m", "key": "eps", "reference": 1e-6, "target": 1e-6, "rtol": 1e-5}]},
    "sampler": {"items": [{"prompt": 0, "step": 0, "token": 1, "rank": 1}], "eos": [[2], [2, 3]]},
    "parity": {"findings": [{"check": "parity", "status": "pass", "summary": "", "details": {}}]},
    "head": {"not_possible": "no"},
    "layers": {"not_possible": "no"},
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(tokens: int, vocab: int = 500, seed: int = 0) -> torch.Tensor:
    return 2.5 * torch.randn(tokens, vocab, generator=generator(seed))


def noisy(right: torch.Tensor, seed: int, size: float = NOISE) -> torch.Tensor:
    return right + size * torch.randn(right.shape, generator=generator(seed))


def logit_evidence(
    right: torch.Tensor, run: torch.Tensor, nulls: list[torch.Tensor], eps: float = BF16, device: float = 1.0
) -> dict:
    tokens = len(right)
    return {
        "eps": eps,
        "device": device,
        "reference": pack_rows(metrics.reference_rows(right)),
        "run": pack_rows(metrics.logit_rows(right, run)),
        "nulls": [{"name": str(i), "rows": pack_rows(metrics.logit_rows(right, n))} for i, n in enumerate(nulls)],
        "sequence": pack_index(np.zeros(tokens, int)),
        "position": pack_index(np.arange(tokens)),
    }


def null_runs(right: torch.Tensor, seed: int = 100, count: int = 4, size: float = NOISE) -> list[torch.Tensor]:
    return [noisy(right, seed + i, size) for i in range(count)]


def judge_logits(right: torch.Tensor, run: torch.Tensor, device: float = 1.0, seed: int = 100) -> Finding:
    evidence = {"logits": logit_evidence(right, run, null_runs(right, seed), device=device)}
    (finding,) = gate.examine("logits", evidence)
    return finding


def judge_activation(
    right: torch.Tensor, run: torch.Tensor, nulls: list[torch.Tensor], dtype: torch.dtype = torch.bfloat16
) -> Finding:
    side: list = [None, None, None]
    module = Measurer(*side, dtype)._module("model.layers.0", right, nulls, run)
    index = {"sequence": pack_index(np.zeros(len(right), int)), "position": pack_index(np.arange(len(right)))}
    (finding,) = gate.examine("layers", {"layers": {"device": 1.0, "modules": [module], **index}})
    return finding


def failed_tests(finding: Finding) -> list[str]:
    if "table" in finding.details:
        return [row["test"] for row in finding.details["table"] if "test" in row]
    return [c["test"] for c in finding.details["complaints"]]


def msprobe_accepts(right: torch.Tensor, run: torch.Tensor) -> bool:
    """Its "Accuracy Reached" rule (const.py 901-905), non-finite entries zeroed as it does."""
    a, b = (torch.nan_to_num(t.double(), nan=0.0, posinf=0.0, neginf=0.0).flatten() for t in (right, run))
    cosine = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
    largest = float((a - b).abs().max())
    return not ((cosine < 0.99 and largest > 0.001) or cosine < 0.9 or largest > 1)


def bhattacharyya(right: torch.Tensor, expected: torch.Tensor, run: torch.Tensor, bins: int = 200) -> float:
    """Overlap of the histograms of the errors of `run` and of `expected`, as in the vLLM-Neuron gate."""
    a, b = ((x - right).double().flatten().numpy() for x in (expected, run))
    edges = np.linspace(min(a.min(), b.min()), max(a.max(), b.max()), bins + 1)
    p, q = (np.histogram(x, edges)[0] / len(x) for x in (a, b))
    return float(np.sqrt(p * q).sum())
