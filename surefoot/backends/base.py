"""The protocol that every backend keeps: score, generate, capture. Token ids in, so that templates cannot differ."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from surefoot.core.outputs import Completion
from surefoot.core.sampling import SamplingParams


@dataclass
class Capture:
    """Teacher-forced pass over one sequence of T tokens.

    logits: [T, vocab] fp32 on the host.  outputs, inputs: by HF module path, [T, ...] on the host, dtype of the module;
    inputs holds the first tensor argument. A module that returns several tensors is represented by the first.
    """

    logits: torch.Tensor
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


class Backend(Protocol):
    """A loaded model. `info` says what is in effect: dtype, device, versions, kernels."""

    name: str
    vocab_size: int
    eos_token_ids: frozenset[int]

    def info(self) -> dict[str, Any]: ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Teacher-forced logits of each sequence: [T, vocab] fp32 on the host; row t predicts token t + 1."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]: ...

    def capture(self, token_ids: Sequence[int], modules: str = ".*", with_inputs: bool = False) -> Capture:
        """Score one sequence and keep what the modules whose path matches the regex `modules` (re.fullmatch) gave."""
        ...


@contextlib.contextmanager
def recording(model: nn.Module, pattern: str, num_tokens: int, capture: Capture, with_inputs: bool) -> Iterator[None]:
    """Within the block, forward hooks append each matching module's packed rows to `capture`, chunk after chunk.

    HF's modules see [1, T, ...], ours [T, ...]: a leading batch of one is dropped, so both sides store the same shape.
    """
    wanted = re.compile(pattern)
    handles = []

    def hook(name: str):
        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            _append(capture.outputs, name, output, num_tokens)
            if with_inputs:
                given = args[0] if args else kwargs.get("hidden_states", kwargs.get("input_ids"))
                _append(capture.inputs, name, given, num_tokens)

        return record

    for name, module in model.named_modules():
        if name and wanted.fullmatch(name):
            handles.append(module.register_forward_hook(hook(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _append(store: dict[str, torch.Tensor], name: str, value: Any, num_tokens: int) -> None:
    if isinstance(value, (tuple, list)):
        value = value[0] if value else None
    if not isinstance(value, torch.Tensor):
        return
    value = value.detach()
    if value.ndim > 1 and value.shape[0] == 1 and num_tokens > 1:
        value = value[0]
    value = value.to("cpu", copy=True)
    store[name] = torch.cat([store[name], value]) if name in store else value
