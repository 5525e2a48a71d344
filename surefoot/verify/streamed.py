"""The streamed reference: transformers' own modules with one decoder layer in memory at a time.

    reference = StreamedReference("hf:Qwen/Qwen3.5-9B")
    for logits in reference.score_each(sequences): ...      # [T, vocab] fp32, one sequence at a time

A model whose fp32 weights exceed the memory can still be proven: the model is built on the meta device, the first
decoder layer is read from the checkpoint, all sequences go through it, it is dropped, the next one is read. Embedding
rows are looked up in the mapped file, the head is worked off in slices of the vocabulary. What remains in memory is one
layer, one slice of the head, and the hidden states of all sequences ([sum of T, hidden]).

Masks, positions and rotary tables come from transformers' own forward: it is run once per sequence with each decoder
layer replaced by a recorder of its arguments.

NOTE: the checkpoint is read once per call, so give all sequences at once; `generate` reads it once per token.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from surefoot.backends.base import Capture, recording
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError, ModelError, first_line
from surefoot.core.outputs import Completion
from surefoot.core.request import Request
from surefoot.core.sampling import SamplingParams
from surefoot.engine import sampler
from surefoot.engine.outputs import Accumulator, OutputProcessor
from surefoot.verify.layerweights import LayerWeights, open_weights
from surefoot.verify.quantised import QuantisedWeights, quant_info, quantise
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.hf_config import read_config
from surefoot.weights.hub import resolve
from surefoot.weights.tokenizer import Tokenizer


class StreamedReference:
    """A backend over transformers' decoder layers, read from the checkpoint when their turn comes."""

    name = "streamed"

    def __init__(
        self,
        model_ref: str,
        dtype: torch.dtype = torch.float32,
        *,
        config: EngineConfig | None = None,
        drawn: torch.dtype = torch.float32,
    ):
        """config: random weights, quantisation and the longest sequence.  drawn: see `quantised.quantise`."""
        config = config or EngineConfig()
        folder = resolve(model_ref)
        self.model_ref, self.dtype = model_ref, dtype
        self.model = skeleton(str(folder), dtype)
        plain = open_weights(folder, self.model, dtype, config.random_weights)
        self.weights = quantise(plain, Checkpoint(folder), config, drawn)
        if isinstance(self.weights, QuantisedWeights):
            if "lm_head" in self.weights.schemes:
                raise InputError("a quantised output layer cannot be streamed: leave --streamed-reference out")
            self.weights.adopt(self.model)
        self.text: Any = getattr(self.model.model, "language_model", self.model.model)
        self._prefix = next(name for name, module in self.model.named_modules() if module is self.text)
        self._make_ends_real()
        text = self.model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        self.max_model_len: int = config.max_model_len or text.max_position_embeddings
        self.tokenizer = Tokenizer.try_load(folder)
        eos = text.eos_token_id
        self.eos_token_ids: frozenset[int] = (
            self.tokenizer.eos_token_ids
            if self.tokenizer
            else frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        )

    def info(self) -> dict[str, Any]:
        from surefoot.engine.load import versions

        return {
            "backend": self.name,
            "model": self.model_ref,
            "architecture": type(self.model).__name__,
            "device": "cpu",
            "dtype": str(self.dtype).removeprefix("torch."),
            "attention": self.model.config._attn_implementation,
            "max_model_len": self.max_model_len,
            "quant": quant_info(self.weights),
            "resident": f"1 of {len(self.text.layers)} decoder layers",
            "versions": versions(),
        }

    # ---- the protocol

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return list(self.score_each(sequences))

    @torch.inference_mode()
    def score_each(self, sequences: Sequence[Sequence[int]]) -> Iterator[torch.Tensor]:
        """As `score`, but only one sequence's logits exist at a time."""
        hidden = self._sweep([torch.tensor([list(ids)]) for ids in sequences])
        while hidden:
            yield self.model.lm_head(hidden.pop(0))[0].float()

    @torch.inference_mode()
    def capture(self, token_ids: Sequence[int], modules: str = ".*", with_inputs: bool = False) -> Capture:
        capture = Capture(torch.empty(0))
        ids = torch.tensor([list(token_ids)])
        with recording(self.model, modules, len(token_ids), capture, with_inputs):
            (hidden,) = self._sweep([ids])
            capture.logits = self.model.lm_head(hidden)[0].float()
        if with_inputs and re.fullmatch(modules, self._prefix):
            capture.inputs[self._prefix] = ids[0]  # its own call took embedded tokens
        return capture

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """All prompts side by side, so that the weights are read once per token and not once per token and prompt."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        answers = [self._answer(f"req-{i}", list(p), q) for i, (p, q) in enumerate(zip(prompts, each))]
        while active := [a for a in answers if not a.outputs.finished]:
            hidden = self._sweep([a.feed for a in active], [a.cache for a in active])
            for answer, rows in zip(active, hidden):
                answer.take(self.model.lm_head(rows[:, -1]), self.vocab_size)
        return [a.collect.completion() for a in answers]

    def _answer(self, request_id: str, prompt: list[int], params: SamplingParams) -> _Answer:
        import transformers

        if len(prompt) >= self.max_model_len:
            raise InputError(f"the prompt has {len(prompt)} tokens, the model takes {self.max_model_len}")
        request = Request(request_id, prompt, replace(params, prompt_logprobs=None), self.eos_token_ids)
        stream = self.tokenizer.stream(params.skip_special_tokens) if self.tokenizer else None
        return _Answer(
            request,
            OutputProcessor(request, stream, self.max_model_len),
            Accumulator(request_id, prompt, started=time.monotonic()),
            torch.tensor([prompt]),
            transformers.DynamicCache(config=self.text.config),
        )

    # ---- layer by layer

    def _sweep(self, feeds: list[torch.Tensor], caches: list[Any] | None = None) -> list[torch.Tensor]:
        """Hidden states [1, t, hidden] after the last norm, for token ids [1, t] (behind what the caches hold)."""
        hidden = [self.text.embed_tokens(ids) for ids in feeds]
        calls = [self._arguments(rows, cache) for rows, cache in zip(hidden, caches or [None] * len(feeds))]
        for index, layer in enumerate(self.text.layers):
            with self.weights.resident(layer, f"{self._prefix}.layers.{index}."):
                for i, arguments in enumerate(calls):
                    out = layer(hidden[i], **arguments[index])
                    hidden[i] = out[0] if isinstance(out, tuple) else out
        return [self.text.norm(rows) for rows in hidden]

    def _arguments(self, embedded: torch.Tensor, cache: Any) -> list[dict[str, Any]]:
        """What transformers' forward gives each decoder layer besides the hidden states."""
        text, recorder = self.text, _Recorder()
        kept = text.layers, text.norm
        text.layers, text.norm = nn.ModuleList([recorder] * len(kept[0])), nn.Identity()
        try:
            text(inputs_embeds=embedded, past_key_values=cache, use_cache=cache is not None)
        finally:
            text.layers, text.norm = kept
        return recorder.calls

    def _make_ends_real(self) -> None:
        """Embedding and head read the file when they are called; the last norm is small; rotary tables are computed."""
        text, weights, path = self.text, self.weights, self._prefix
        if type(text.embed_tokens) is not nn.Embedding or self.model.lm_head.bias is not None:
            raise ModelError(f"{type(self.model).__name__} cannot be streamed: use the transformers backend")
        text.embed_tokens = _MappedEmbedding(weights, f"{path}.embed_tokens.weight")
        self.model.lm_head = _SlicedHead(weights, "lm_head.weight")
        weights.fill(text.norm, f"{path}.norm.")
        text.rotary_emb = type(text.rotary_emb)(config=text.config)


@dataclass
class _Answer:
    """One sequence being generated."""

    request: Request
    outputs: OutputProcessor
    collect: Accumulator
    feed: torch.Tensor
    cache: Any

    def take(self, logits: torch.Tensor, vocab_size: int) -> None:
        """Choose the next token from logits [1, vocab]."""
        settings = sampler.build([self.request], vocab_size, logits.device)
        packed = sampler.sample(logits, settings).pack().numpy()
        ((token, logprob),) = sampler.unpack(packed, [self.request.params.logprobs])
        self.request.output_token_ids.append(token)
        self.collect.add(self.outputs.process(token, logprob))
        self.feed = torch.tensor([[token]])


class _Recorder(nn.Module):
    """Stands for every decoder layer and keeps the keyword arguments of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def forward(self, hidden_states: torch.Tensor, **arguments: Any) -> torch.Tensor:
        self.calls.append(arguments)
        return hidden_states


class _MappedEmbedding(nn.Module):
    def __init__(self, weights: LayerWeights, name: str) -> None:
        super().__init__()
        self._weights, self._name = weights, name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self._weights.rows(self._name, ids)


class _SlicedHead(nn.Module):
    def __init__(self, weights: LayerWeights, name: str) -> None:
        super().__init__()
        self._weights, self._name = weights, name

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = hidden.new_empty(*hidden.shape[:-1], self._weights.shape(self._name)[0])
        for begin, block in self._weights.row_blocks(self._name):
            logits[..., begin : begin + len(block)] = F.linear(hidden, block)
        return logits


def skeleton(folder: str, dtype: torch.dtype) -> Any:
    """transformers' causal language model of the folder, all of it on the meta device."""
    import transformers

    try:
        config = read_config(folder)
        for part in (config, config.get_text_config()):  # what is quantised is decoded here, not by transformers
            vars(part).pop("quantization_config", None)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"transformers cannot build {folder}: {first_line(error)}") from error
    return model.eval().requires_grad_(False)
