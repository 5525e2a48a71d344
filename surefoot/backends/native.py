"""Surefoot's own engine as a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from surefoot.backends.base import Capture, recording
from surefoot.core.config import EngineConfig
from surefoot.core.outputs import Completion
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine


class NativeBackend:
    name = "native"

    def __init__(self, model_ref: str, config: EngineConfig, engine: Engine | None = None):
        self.engine = engine or Engine.load(model_ref, config)
        self.vocab_size, self.eos_token_ids = self.engine.vocab_size, self.engine.eos_token_ids

    def info(self) -> dict[str, Any]:
        return {"backend": self.name} | self.engine.info.as_dict()

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return self.engine.score(sequences)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        return self.engine.generate(prompts, params)

    def capture(self, token_ids: Sequence[int], modules: str = ".*", with_inputs: bool = False) -> Capture:
        capture = Capture(torch.empty(0))
        # NOTE: logits are computed for the rows that are scored, so `lm_head` is recorded once per slice of rows.
        with recording(self.engine.model, modules, len(token_ids), capture, with_inputs):
            (capture.logits,) = self.engine.score([token_ids])
        return capture
