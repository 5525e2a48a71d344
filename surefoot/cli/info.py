"""`surefoot info`: what would be in effect for a model on a device."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from surefoot.cli.flags import ENGINE, Model, flags
from surefoot.core.config import EngineConfig

Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")]


@flags(EngineConfig, "config", ENGINE)
def info(model: Model, as_json: Json = False, *, config: EngineConfig) -> None:
    """Load a model and show what is in effect: sizes, dtype, cache plan, limits, kernels, versions.

    \b
    Examples:
      surefoot info canary-qwen3.5
      surefoot info DIR --device cuda --max-model-len 8192 --json
      surefoot info DIR --random-weights 0             # a folder with only a config.json
    """
    from surefoot.cli.load import load_engine
    from surefoot.core.sampling import SamplingParams

    engine = load_engine(model, config)
    if engine.max_model_len >= 4:  # a prefill and a decode, so that it is known which kernels they take
        engine.generate([[0, 1]], SamplingParams(max_tokens=2))
    facts = engine.info.as_dict()
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for key, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = "; ".join(value)
        elif isinstance(value, int):
            value = f"{value:,}"
        print(f"{key.replace('_', ' '):24}{value if value != '' else '-'}")
