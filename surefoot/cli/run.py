"""`surefoot run`: one answer, a file of prompts, or a chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from surefoot.cli.flags import ENGINE, SAMPLING, Model, flags
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams

Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="The prompt; without it a chat, or stdin from a pipe.")
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the chat.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
Prompts = Annotated[Path | None, typer.Option(metavar="FILE", help="JSONL of prompts; see below.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Where --prompts writes; else stdout.")
]
Template = Annotated[
    str | None,
    typer.Option(metavar="JSON", help="Variables of the chat template, like '{\"enable_thinking\": false}'."),
]


@flags(EngineConfig, "config", ENGINE)
@flags(SamplingParams, "params", SAMPLING)
def run(
    model: Model,
    prompt: Prompt = None,
    system: System = None,
    raw: Raw = False,
    prompts: Prompts = None,
    output: Output = None,
    chat_template_kwargs: Template = None,
    *,
    params: SamplingParams,
    config: EngineConfig,
) -> None:
    """Answer one prompt, a file of prompts, or chat.

    \b
    Examples:
      surefoot run canary-llama "What is the capital of France?"
      surefoot run canary-qwen3.5                      # chat; /reset, /exit, Ctrl-C stops an answer
      echo "Once upon a time" | surefoot run DIR --raw --max-tokens 64
      surefoot run DIR --prompts in.jsonl -o out.jsonl --temperature 0.7 --seed 1
      surefoot run hf:Qwen/Qwen3.5-0.8B "Hello" --device cuda --dtype bfloat16

    \b
    Each line of --prompts is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} or
    {"prompt_token_ids": [...]}, with an optional "id" and sampling fields ("max_tokens": 10, ...) of its own.
    """
    from surefoot.cli.load import load_engine
    from surefoot.run import ask, batch, chat

    style = ask.Style.parse(system=system, raw=raw, chat_template_kwargs=chat_template_kwargs)
    if prompts is not None:
        if prompt is not None:
            raise InputError("give either a PROMPT or --prompts FILE, not both")
        job = batch.read(prompts, params, output)
        batch.run(load_engine(model, config), job, style)
        return
    if output is not None:
        raise InputError("-o belongs to --prompts FILE; one answer goes to stdout")
    if prompt is None and not sys.stdin.isatty():
        prompt = ask.read_stdin()
    if prompt is None:
        chat.run(load_engine(model, config, lazy=True), params, style)
    else:
        ask.check_prompt(prompt)
        ask.run(load_engine(model, config, lazy=True), prompt, params, style)
