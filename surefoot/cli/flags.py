"""Flags that fill a settings dataclass, declared once and shared by the verbs.

    @flags(EngineConfig, "config", ENGINE)
    def serve(model: Model, *, config: EngineConfig) -> None: ...

Typer reads a command's signature; the decorator puts the flags of the table there in place of `config`, with the
dataclass's own defaults, and hands the verb the finished object. Impossible values raise the dataclass's InputError.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder, canary-llama, canary-qwen3.5, hf:ORG/NAME or modelscope:ORG/NAME.",
        show_default=False,
    ),
]


def _flag(kind: Any, text: str, *names: str, metavar: str | None = None) -> Any:
    return Annotated[kind, typer.Option(*names, help=text, metavar=metavar)]


def _sizes(text: str, name: str) -> Any:
    return Annotated[tuple, typer.Option(name, help=text, metavar="N,N", parser=integers)]


def integers(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4)."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers such as 1,2,4") from None


ENGINE: dict[str, Any] = {
    "device": _flag(str, "Where to compute: cpu, cuda, cuda:1, npu, npu:0, ...", metavar="DEVICE"),
    "dtype": _flag(str, "auto (the checkpoint's), float32, bfloat16 or float16.", metavar="DTYPE"),
    "max_model_len": _flag(int | None, "Longest prompt plus output, in tokens.", metavar="N"),
    "max_num_seqs": _flag(int, "Most requests in one step.", metavar="N"),
    "max_num_batched_tokens": _flag(int, "Most tokens in one step.", metavar="N"),
    "prefill_chunk_size": _flag(int | None, "Most prompt tokens of one request in one step.", metavar="N"),
    "kv_cache_tokens": _flag(int | None, "Tokens that the KV cache holds in total.", metavar="N"),
    "block_size": _flag(int | None, "Tokens per KV page.", metavar="N"),
    "enable_prefix_caching": _flag(
        bool, "Reuse the cache of equal prompt beginnings.", "--prefix-caching/--no-prefix-caching"
    ),
    "num_state_checkpoints": _flag(
        int, "Recurrent states kept for prefix caching.", "--state-checkpoints", metavar="N"
    ),
    "ops": _flag(str, "auto, or reference to force the readable op implementations.", metavar="POLICY"),
    "random_weights": _flag(int | None, "Random weights from this seed; needs only config.json.", metavar="SEED"),
    "num_threads": _flag(int | None, "CPU threads.", "--threads", metavar="N"),
    "quant": _flag(str | None, "Quantise the weights on load: w8a16, w8a8, w4a16 or w4a8.", metavar="SCHEME"),
    "quant_group_size": _flag(int | None, "Inputs per int4 scale: 32, 64 or 128; default 32.", metavar="N"),
    "quant_lm_head": _flag(bool, "Quantise the output layer too.", "--quant-lm-head"),
    "graph": _flag(str, "Captured decode steps: auto, full (or fail), off.", metavar="MODE"),
    "batch_buckets": _sizes("Pad decode steps to these batches.", "--batch-buckets"),
    "token_buckets": _sizes("Pad steps that prefill to these tokens.", "--token-buckets"),
}

SAMPLING: dict[str, Any] = {
    "max_tokens": _flag(int, "Most tokens to generate.", metavar="N"),
    "temperature": _flag(float, "0 is greedy.", metavar="X"),
    "top_k": _flag(int, "Keep the K most likely tokens; 0 keeps all.", metavar="K"),
    "top_p": _flag(float, "Keep the most likely tokens that make up this mass.", metavar="P"),
    "min_p": _flag(float, "Drop tokens less likely than this share of the most likely one.", metavar="P"),
    "repetition_penalty": _flag(float, "Over prompt and output; 1 is off.", metavar="X"),
    "presence_penalty": _flag(float, "Over the output, once per token seen; 0 is off.", metavar="X"),
    "frequency_penalty": _flag(float, "Over the output, per occurrence; 0 is off.", metavar="X"),
    "stop": _flag(list[str] | None, "Stop before this text; may be given several times.", metavar="TEXT"),
    "seed": _flag(int | None, "Seed of the draws, for temperature > 0.", metavar="SEED"),
    "logprobs": _flag(int | None, "Report log-probabilities with this many alternatives.", metavar="N"),
}

SERVE: dict[str, Any] = {
    "host": _flag(str, "Address to listen on; 0.0.0.0 for all.", metavar="ADDRESS"),
    "port": _flag(int, "Port to listen on; 0 takes a free one.", metavar="PORT"),
    "served_model_names": _flag(
        list[str] | None, "Name for clients; several allowed.", "--served-model-name", metavar="NAME"
    ),
    "api_keys": _flag(
        list[str] | None, "Let in only clients with this key; several allowed.", "--api-key", metavar="KEY"
    ),
    "generation_defaults": _flag(str, "model (its generation_config) or openai.", metavar="WHERE"),
    "max_inflight": _flag(int, "Most sequences waiting or running; above it 503.", metavar="N"),
    "drain_timeout": _flag(float, "Seconds for running requests after SIGTERM.", metavar="S"),
    "max_body_bytes": _flag(int, "Longest request body.", metavar="N"),
    "access_log": _flag(bool, "Log each HTTP request.", "--access-log/--no-access-log"),
}

VLLM: dict[str, Any] = {
    "vllm_executable": _flag(str, "vllm: the `vllm` to start, by name or file.", metavar="FILE"),
    "vllm_args": _flag(str, "vllm: further flags of `vllm serve`, in quotes.", metavar="TEXT"),
    "tensor_parallel_size": _flag(int, "vllm: devices that share each layer.", "--tensor-parallel-size", metavar="N"),
    "pipeline_parallel_size": _flag(int, "vllm: groups of layers, each on devices of its own.", metavar="N"),
    "ray": _flag(bool, "vllm: Ray places the workers, also on other nodes.", "--ray"),
    "ray_address": _flag(str | None, "vllm: HOST:PORT of the Ray cluster, or auto.", metavar="ADDRESS"),
    "quantization": _flag(str | None, "vllm: its quantisation method, such as ascend.", metavar="NAME"),
    "gpu_memory_utilization": _flag(float | None, "vllm: share of the device's memory that it takes.", metavar="X"),
    "vllm_seed": _flag(int, "vllm: its --seed.", metavar="SEED"),
    "start_timeout": _flag(float, "vllm: seconds until it must answer.", metavar="S"),
    "vllm_log": _flag(str | None, "vllm: keep its output in this file.", metavar="FILE"),
}


def flags(settings: type, name: str, table: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: replace the verb's parameter `name` by the flags of `table`, and build `settings` from them."""
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}

    def wrap(verb: Callable[..., None]) -> Callable[..., None]:
        def call(**given: Any) -> None:
            chosen = {key: given.pop(key) for key in table}
            chosen = {key: tuple(v) if isinstance(v, list) else v for key, v in chosen.items() if v is not None}
            verb(**given, **{name: settings(**chosen)})

        signature = inspect.signature(verb, eval_str=True)
        own = [p for p in signature.parameters.values() if p.name != name]
        added = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=_plain(defaults[key]))
            for key, annotation in table.items()
        ]
        call.__name__, call.__doc__ = verb.__name__, verb.__doc__
        call.__annotations__ = {p.name: p.annotation for p in [*own, *added]} | {"return": None}
        call.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return call

    return wrap


def _plain(default: Any) -> Any:
    """An empty tuple means "not given" to the dataclass; Typer wants None for that."""
    return None if default == () else default
