"""Trace any model that transformers can build from a config, on the meta device: no weights, no memory, no device.

Decoders are traced with their cache (prefill, then one token), encoder-decoders likewise; encoders have no decode.
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import torch

from surefoot.analyze.registry import Registry
from surefoot.analyze.trace import Tracer
from surefoot.core.errors import ModelError, first_line
from surefoot.weights.hf_config import read_config

# In the order in which they are tried.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForSeq2SeqLM", "AutoModel")
CACHES = ("past_key_values", "cache_params", "state")


class ReadsValues(ModelError):
    """The model's code looks at the values of tensors, so the trace ends there."""


def trace_folder(
    folder: Path, registry: Registry, *, dtype: str = "auto", batch: int = 8, prompt: int = 512
) -> tuple[Tracer, Tracer, str | None]:
    """(prefill, decode, None or why the trace is incomplete) of the model in a folder with a config.json."""
    return trace_config(read_config(folder), registry, dtype=dtype, batch=batch, prompt=prompt)


def trace_config(
    config: Any, registry: Registry, *, dtype: str = "auto", batch: int = 8, prompt: int = 512
) -> tuple[Tracer, Tracer, str | None]:
    model = build(config, dtype)
    tracers = Tracer(registry), Tracer(registry)
    longest = int(getattr(config.get_text_config(), "max_position_embeddings", None) or prompt + 2)
    length = max(2, min(prompt, longest - 2))
    try:
        run_workload(model, tracers, batch, length)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return *tracers, f"the model's own code stopped the trace: {first_line(error)}"
    return *tracers, None


def build(config: Any, dtype: str = "auto", device: str = "meta") -> Any:
    """The model by the first auto class that knows this config, in evaluation mode."""
    import transformers

    kind = _dtype(config) if dtype == "auto" else getattr(torch, dtype)
    for name in AUTO_CLASSES:
        auto = getattr(transformers, name)
        if type(config) not in auto._model_mapping:
            continue
        try:
            with torch.device(device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return auto.from_config(config, dtype=kind).eval()
        except Exception as error:  # a config that its own architecture cannot take
            raise ModelError(f"transformers cannot build this {config.model_type}: {first_line(error)}") from None
    raise ModelError(f"transformers has no language model for model_type {config.model_type!r}")


def _dtype(config: Any) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@torch.inference_mode()
def run_workload(model: Any, tracers: tuple[Tracer, Tracer], batch: int, length: int, device: str = "meta") -> None:
    """Prefill and one decode step, for one sequence and for `batch` shorter ones."""
    prefill, decode = tracers
    for rows, columns in ((1, length), (batch, max(2, length // 4))):
        prefill.passes += 1
        with prefill:
            ids = torch.zeros(rows, columns, dtype=torch.long, device=device)
            first = model(**inputs(model, ids))
        cache = next((c for c in CACHES if getattr(first, c, None) is not None), None)
        if cache is None:
            continue
        decode.passes += 1
        with decode:
            ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
            model(**inputs(model, ids, first), **{cache: getattr(first, cache)})


def inputs(model: Any, ids: torch.Tensor, first: Any = None) -> dict[str, Any]:
    """Keyword arguments of one call; `first` is the prefill's output when this is a decode step."""
    takes = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {"use_cache": True} if "use_cache" in takes else {}
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = 1
    if not getattr(model.config, "is_encoder_decoder", False):
        return given | {"input_ids": ids}
    if first is None:
        return given | {"input_ids": ids, "decoder_input_ids": ids[:, :1]}
    return given | {"encoder_outputs": (first.encoder_last_hidden_state,), "decoder_input_ids": ids}
