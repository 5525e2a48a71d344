"""Surefoot through its engine: scheduler, cache, sampler and all."""

from __future__ import annotations

import statistics
import time

from worker import PROMPT, STEPS, prompt

from surefoot.core.config import EngineConfig
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine


class Native:
    def __init__(self, model: str, dtype: str, threads: int, quant: str | None = None, random: bool = True):
        self.engine = Engine.load(
            model,
            EngineConfig(
                dtype=dtype,
                num_threads=threads,
                random_weights=0 if random else None,
                quant=quant,
                quant_lm_head=quant is not None,
                max_model_len=1024,
                kv_cache_tokens=8192,
                enable_prefix_caching=False,
            ),
        )

    def about(self) -> dict:
        self.decode(1)
        info = self.engine.info
        return {"dtype": info.dtype, "quant": info.quant, "ops": info.ops, "weight_bytes": info.weight_bytes}

    def decode(self, batch: int) -> float:
        """Median seconds of a step in which all of `batch` sequences decode one token."""
        params = SamplingParams(max_tokens=STEPS + 1, ignore_eos=True)
        for i in range(batch):
            self.engine.add_request(prompt(PROMPT, i, self.engine.vocab_size), params)
        times = []
        while self.engine.has_unfinished():
            started = time.perf_counter()
            outputs = self.engine.step()
            if len(outputs) == batch and all(o.num_output_tokens > 1 for o in outputs):
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    def prefill(self, tokens: int, seed: int) -> float:
        ids = prompt(tokens, seed, self.engine.vocab_size)
        self.engine.add_request(ids, SamplingParams(max_tokens=1, ignore_eos=True))
        started = time.perf_counter()
        while self.engine.has_unfinished():
            self.engine.step()
        return time.perf_counter() - started
