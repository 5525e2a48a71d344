"""llama.cpp through llama-cpp-python's low-level API: one batch of B sequences a step, as its server decodes."""

from __future__ import annotations

import ctypes
import statistics
import time
from pathlib import Path

import llama_cpp

from peers.worker import PROMPT, STEPS, prompt


class LlamaCpp:
    def __init__(self, gguf: str, threads: int, flash_attention: bool = True):
        silence()
        llama_cpp.llama_backend_init()
        self.path = gguf
        self.model = llama_cpp.llama_model_load_from_file(gguf.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = 8192, 512, 512, 8
        params.n_threads = params.n_threads_batch = threads
        if hasattr(params, "kv_unified"):
            params.kv_unified = True
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = 1 if flash_attention else 0
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit(f"llama.cpp could not make a context for {gguf}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(512, 0, 1)

    def about(self) -> dict:
        return {"file": Path(self.path).name, "version": llama_cpp.__version__}

    def _forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _run(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """tokens: (id, position, sequence, wants logits)."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        if llama_cpp.llama_decode(self.context, batch) != 0:
            raise SystemExit("llama_decode failed")

    def _choose(self, row: int) -> int:
        """Greedy choice on the host, over the row's logits; numpy keeps it cheap."""
        import numpy as np

        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocab,)).argmax())

    def decode(self, batch: int) -> float:
        self._forget()
        for sequence in range(batch):
            ids = prompt(PROMPT, sequence, self.vocab)
            self._run([(t, i, sequence, i == PROMPT - 1) for i, t in enumerate(ids)])
        last, times = [1] * batch, []
        for step in range(STEPS):
            started = time.perf_counter()
            self._run([(last[s], PROMPT + step, s, True) for s in range(batch)])
            last = [self._choose(s) for s in range(batch)]
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def prefill(self, tokens: int, seed: int) -> float:
        self._forget()
        ids = prompt(tokens, seed, self.vocab)
        started = time.perf_counter()
        self._run([(t, i, 0, i == tokens - 1) for i, t in enumerate(ids)])
        self._choose(tokens - 1)
        return time.perf_counter() - started


@llama_cpp.llama_log_callback
def _ignore(level, text, user_data):
    pass


def silence() -> None:
    llama_cpp.llama_log_set(_ignore, ctypes.c_void_p(0))
