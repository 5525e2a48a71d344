"""What every model offers to the engine, the loader and the proof."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from surefoot.cache.plan import LinearStateSpec, PagedKVSpec
from surefoot.core.batch import Batch
from surefoot.core.errors import ModelError
from surefoot.layers.linear import Embedding, Linear
from surefoot.layers.quant_linear import QuantLinear
from surefoot.layers.rotary import RotaryEmbedding


def require(config: dict[str, Any], *keys: str) -> list[Any]:
    """Values of the keys that a config cannot do without."""
    missing = [k for k in keys if config.get(k) is None]
    if missing:
        raise ModelError(f"config.json lacks {', '.join(missing)}")
    return [config[k] for k in keys]


def require_silu(config: dict[str, Any]) -> None:
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ModelError(f"config.json: hidden_act {act!r} is not supported, only 'silu'")


class CausalLM(nn.Module):
    """Base of the `...ForCausalLM` classes.

    forward(batch) -> hidden states [T, hidden] after the last norm; compute_logits(hidden) -> [..., vocab].
    ignored: regexes of checkpoint tensors that the model knowingly does not use.
    quant_exclude: regexes of whole module paths: linear layers that quantisation keeps as they are.
    tied: {parameter: the parameter whose tensor it shares}.
    """

    ignored: tuple[str, ...] = ()
    quant_exclude: tuple[str, ...] = (r"lm_head",)
    architecture: str = ""
    lm_head: Linear | QuantLinear

    def __init__(self, *, vocab_size: int, hidden_size: int, max_position_embeddings: int, initializer_range: float):
        super().__init__()
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.tied: dict[str, str] = {}

    def tie_lm_head(self, embedding_name: str) -> None:
        embedding = self.get_submodule(embedding_name)
        assert isinstance(embedding, Embedding)
        assert isinstance(self.lm_head, Linear)
        self.lm_head.weight = embedding.weight
        self.tied = {"lm_head.weight": f"{embedding_name}.weight"}

    @property
    def decoder_layers(self) -> nn.ModuleList:
        raise NotImplementedError

    @property
    def rotary(self) -> RotaryEmbedding:
        raise NotImplementedError

    def forward(self, batch: Batch) -> torch.Tensor:
        raise NotImplementedError

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.lm_head(hidden)

    def state_specs(self) -> list[PagedKVSpec | LinearStateSpec]:
        """What each decoder layer must remember, in layer order."""
        layers: Iterable[Any] = self.decoder_layers
        return [layer.state_spec() for layer in layers]

    @property
    def has_linear_state(self) -> bool:
        return any(isinstance(s, LinearStateSpec) for s in self.state_specs())

    def param_dtype(self, name: str, default: torch.dtype) -> torch.dtype:
        return default

    def finalize(self) -> None:
        """Compute what derives from the weights; called once, when all parameters are real."""
        device = next(self.parameters()).device
        for module in self.modules():
            if isinstance(module, RotaryEmbedding):
                module.finalize(device)
            elif module is not self and callable(finalize := getattr(module, "finalize", None)):
                finalize()

    def init_weight(self, name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
        """Random weights as transformers would initialise them (`initializer_range`), for runs without a checkpoint."""
        if name.endswith("norm.weight"):
            tensor.fill_(1.0)
        elif name.endswith(".bias"):
            tensor.zero_()
        elif name.endswith("A_log"):
            tensor.uniform_(0.01, 16, generator=generator).log_()
        elif name.endswith("dt_bias"):
            tensor.fill_(1.0)
        elif name.endswith("conv1d.weight"):
            bound = 1 / math.sqrt(tensor.shape[-1])
            tensor.uniform_(-bound, bound, generator=generator)
        else:
            tensor.normal_(0.0, self.initializer_range, generator=generator)
