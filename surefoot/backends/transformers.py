"""transformers as a backend, and as the reference: plain forward passes, fp32 on the CPU unless told otherwise.

NOTE: never `generate_batch`, which refuses linear attention (transformers #48305); and one sequence at a time, because
padding reaches the recurrent state of hybrid models.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from surefoot.backends.base import Capture, recording
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError, ModelError, first_line
from surefoot.core.outputs import Completion
from surefoot.core.request import Request
from surefoot.core.sampling import SamplingParams
from surefoot.device import get_device
from surefoot.engine import sampler
from surefoot.engine.outputs import Accumulator, OutputProcessor
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.fingerprint import fingerprint
from surefoot.weights.hf_config import read_config
from surefoot.weights.hub import resolve
from surefoot.weights.tokenizer import Tokenizer


class TransformersBackend:
    name = "transformers"

    def __init__(self, model_ref: str, config: EngineConfig, model: Any = None):
        """model: transformers' model, built already, in place of the one that is read from the folder."""
        device = get_device(config.device)
        self.device, self.model_ref = device.torch_device, model_ref
        dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
        folder = resolve(model_ref)
        loaded = _load(str(folder), dtype, config.random_weights) if model is None else model
        self.model = loaded.to(self.device).eval()
        self.dtype = dtype
        checkpoint = Checkpoint(folder)
        stored = config.random_weights is None and checkpoint.has_weights
        self.weights_digest = fingerprint(checkpoint) if stored else None
        text = self.model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.max_model_len: int = config.max_model_len or text.max_position_embeddings
        self.tokenizer = Tokenizer.try_load(folder)
        self.eos_token_ids = self.tokenizer.eos_token_ids if self.tokenizer else _eos(text.eos_token_id)

    def info(self) -> dict[str, Any]:
        from surefoot.engine.load import versions

        return {
            "backend": self.name,
            "model": self.model_ref,
            "architecture": type(self.model).__name__,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "max_model_len": self.max_model_len,
            "weights_digest": self.weights_digest,
            "versions": versions(),
        }

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return [self._forward(ids).logits[0].float().cpu() for ids in sequences]

    @torch.inference_mode()
    def capture(self, token_ids: Sequence[int], modules: str = ".*", with_inputs: bool = False) -> Capture:
        capture = Capture(torch.empty(0))
        with recording(self.model, modules, len(token_ids), capture, with_inputs):
            capture.logits = self._forward(token_ids).logits[0].float().cpu()
        return capture

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        return [self._generate(f"req-{i}", list(p), q) for i, (p, q) in enumerate(zip(prompts, each))]

    def _forward(self, token_ids: Sequence[int]):
        return self.model(torch.tensor([list(token_ids)], device=self.device), use_cache=False)

    def _generate(self, request_id: str, prompt: list[int], params: SamplingParams) -> Completion:
        """One request to its end: the model and its cache are transformers', choosing and stopping are ours."""
        if len(prompt) >= self.max_model_len:
            raise InputError(f"the prompt has {len(prompt)} tokens, the model takes {self.max_model_len}")
        request = Request(request_id, prompt, replace(params, prompt_logprobs=None), self.eos_token_ids)
        stream = self.tokenizer.stream(params.skip_special_tokens) if self.tokenizer else None
        outputs = OutputProcessor(request, stream, self.max_model_len)
        collect = Accumulator(request_id, prompt, started=time.monotonic())
        feed, cache = torch.tensor([prompt], device=self.device), None
        while not outputs.finished:
            result = self.model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            settings = sampler.build([request], self.vocab_size, self.device)
            packed = sampler.sample(result.logits[:, -1], settings).pack().cpu().numpy()
            ((token, logprob),) = sampler.unpack(packed, [params.logprobs])
            request.output_token_ids.append(token)
            collect.add(outputs.process(token, logprob))
            feed = torch.tensor([[token]], device=self.device)
        return collect.completion()


def _eos(value: int | list[int] | None) -> frozenset[int]:
    return frozenset() if value is None else frozenset([value] if isinstance(value, int) else value)


def _load(folder: str, dtype: torch.dtype, seed: int | None):
    import transformers

    with _quiet():
        try:
            config = read_config(folder)
            if seed is None:
                auto = transformers.AutoModelForCausalLM
                return auto.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
            return _random(transformers.AutoModelForCausalLM.from_config(config, dtype=dtype), folder, seed, dtype)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"transformers cannot load {folder}: {first_line(error)}") from error


def _random(model, folder: str, seed: int, dtype: torch.dtype):
    """Give transformers' model the very weights that Surefoot's `--random-weights SEED` draws."""
    from pathlib import Path

    from surefoot.models.registry import build
    from surefoot.weights.checkpoint import Checkpoint
    from surefoot.weights.load import random_weights

    ours = build(Checkpoint(Path(folder)).config)
    random_weights(ours, seed, "cpu", dtype)
    values = dict(ours.named_parameters(remove_duplicate=False))
    missing = [name for name in model.state_dict() if name not in values and "visual" not in name]
    if missing:
        raise ModelError(f"transformers' model has parameters that ours lacks: {', '.join(missing[:5])}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.data = values[name].data
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and advice about optional kernels."""
    from transformers.utils import logging as hf_logging

    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
