"""Surefoot through its engine: scheduler, cache, sampler and all; and the limits of the machine it runs on."""

from __future__ import annotations

import statistics
import time

import torch

from peers.worker import PROMPT, STEPS, prompt
from surefoot.core.batch import LinearState
from surefoot.core.config import EngineConfig
from surefoot.core.sampling import SamplingParams
from surefoot.device import hugepages
from surefoot.engine.engine import Engine
from surefoot.layers.linear import Linear
from surefoot.layers.quant_linear import QuantLinear
from surefoot.ops.cpu import kernels

READ_BYTES = 512 << 20
PEAKS = {"int8": 0, "fp32": 1, "bf16": 2, "int16": 3}  # as Peak in surefoot/ops/cpu/csrc/kernels.h


class Native:
    def __init__(self, model: str, dtype: str, threads: int, graph: str = "auto", lazy: bool = False):
        config = EngineConfig(
            dtype=dtype,
            num_threads=threads,
            graph=graph,
            max_num_seqs=8,
            max_model_len=1024,
            kv_cache_tokens=8192,
            enable_prefix_caching=False,
        )
        self.engine = Engine.load(model, config, lazy=lazy)
        self.buffer: torch.Tensor | None = None

    def about(self) -> dict:
        info = self.engine.info
        return {
            "dtype": info.dtype,
            "quant": info.quant,
            "graph": info.graph,
            "ops": info.ops,
            "isa": kernels.isa() if kernels else None,
            "versions": info.versions,
            "work": self.work(),
        }

    def work(self) -> dict:
        """What one forward pass cannot avoid: bytes of the linear layers' weights, multiply-adds of a token, and the
        recurrent states of a request, read and written.

        "head" is the output layer, which computes only the rows whose logits are wanted.
        """
        parts = {"bytes": 0, "macs": 0, "head_bytes": 0, "head_macs": 0, "state_bytes": 0}
        for layer in self.engine.runner.layers:
            if isinstance(layer, LinearState):
                parts["state_bytes"] += 2 * (layer.conv[0].nbytes + layer.recurrent[0].nbytes)
        for name, module in self.engine.model.named_modules():
            if isinstance(module, (Linear, QuantLinear)):
                prefix = "head_" if name.endswith("lm_head") else ""
                parts[prefix + "bytes"] += sum(p.nbytes for p in module.parameters())
                parts[prefix + "macs"] += module.in_features * module.out_features
        return parts

    def limits(self) -> dict:
        """Bytes/s of reading memory and multiply-adds/s in registers, by the same compiler and threads."""
        if kernels is None:
            raise SystemExit("the C++ kernels are not built: reinstall surefoot with a C++17 compiler")
        if self.buffer is None:
            self.buffer = hugepages.empty((READ_BYTES,), torch.uint8).fill_(1)
        rates = []
        for _ in range(5):
            started = time.perf_counter()
            kernels.read(self.buffer.data_ptr(), READ_BYTES)
            rates.append(READ_BYTES / (time.perf_counter() - started))
        found = {"read": statistics.median(rates)}
        for name, what in PEAKS.items():
            rates = []
            for _ in range(3):
                started = time.perf_counter()
                done = kernels.peak(what, 500_000)
                rates.append(done / (time.perf_counter() - started))
            found[name] = statistics.median(rates)
        return found

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
