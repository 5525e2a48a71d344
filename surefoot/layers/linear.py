"""Dense layer and token embedding. Weights keep the HF names and layout [out, in]."""

from __future__ import annotations

import torch
from torch import nn

from surefoot import ops


class Linear(nn.Module):
    """y = x @ weight.T + bias. x: [T, in] -> [T, out]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Token ids [T] -> [T, D]."""

    looked_up = True  # rows of the weight are read, never all of it: it can stay in its file

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, embedding_dim), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return ops.embedding(input_ids, self.weight)
