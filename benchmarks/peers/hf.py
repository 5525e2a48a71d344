"""transformers with SDPA and its dynamic cache, batches of equal length (its best case), same checkpoint."""

from __future__ import annotations

import statistics
import time

import torch

from peers.worker import PROMPT, STEPS, prompt
from surefoot.backends.transformers import TransformersBackend
from surefoot.core.config import EngineConfig


class Transformers:
    def __init__(self, model: str, dtype: str, threads: int):
        torch.set_num_threads(threads)
        backend = TransformersBackend(model, EngineConfig(dtype=dtype))
        self.model, self.vocab, self.info = backend.model, backend.vocab_size, backend.info()

    def about(self) -> dict:
        return {k: self.info[k] for k in ("dtype", "attention", "versions")}

    @torch.inference_mode()
    def decode(self, batch: int) -> float:
        ids = torch.tensor([prompt(PROMPT, i, self.vocab) for i in range(batch)])
        result = self.model(ids, use_cache=True, logits_to_keep=1)
        times = []
        for _ in range(STEPS):
            token = result.logits[:, -1].argmax(-1)
            started = time.perf_counter()
            result = self.model(
                token[:, None], past_key_values=result.past_key_values, use_cache=True, logits_to_keep=1
            )
            result.logits[:, -1].argmax(-1).tolist()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    @torch.inference_mode()
    def prefill(self, tokens: int, seed: int) -> float:
        ids = torch.tensor([prompt(tokens, seed, self.vocab)])
        started = time.perf_counter()
        self.model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
        return time.perf_counter() - started
