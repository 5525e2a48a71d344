"""What the routes share: the worker, tokenisation off the event loop, model names and sampling defaults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from surefoot.core.errors import InputError
from surefoot.serve.errors import ApiError
from surefoot.serve.logprobs import Pieces
from surefoot.serve.protocol import ChatFields
from surefoot.serve.sampling import check_ids, sampling_defaults
from surefoot.serve.settings import ServeSettings
from surefoot.serve.worker import EngineLike, EngineWorker

T = TypeVar("T")


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine takes it, and as text where the answer will repeat it."""

    token_ids: list[int]
    text: str = ""


class Frontend:
    """The HTTP side's view of the engine. It reads the engine's fixed facts and never steps it."""

    def __init__(self, worker: EngineWorker, settings: ServeSettings):
        self.worker = worker
        self.settings = settings
        self.names = settings.served_model_names or (worker.engine.info.model,)
        self.created = int(time.time())
        self.defaults = sampling_defaults(settings.generation_defaults, worker.engine.tokenizer)
        self.pieces = Pieces(worker.engine.tokenizer)
        # two, so that one long prompt does not hold up the short ones
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    @property
    def engine(self) -> EngineLike:
        return self.worker.engine

    async def in_pool(self, fn: Callable[..., T], *args: Any) -> T:
        """Run long host work (tokenising, rendering, large answers) without holding up the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, fn, *args)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check_model(self, name: str | None) -> str:
        """The name to answer with; a request without one means the only model there is."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            known = ", ".join(self.names)
            raise ApiError(f"the model {name!r} does not exist here: ask for {known}", 404, "model", "model_not_found")
        return name

    def tokenizer(self) -> Any:
        if self.engine.tokenizer is None:
            raise ApiError("the model folder has no tokenizer: send token ids to /v1/completions")
        return self.engine.tokenizer

    # ---- these run in the pool

    def encode_prompt(self, prompt: str | Sequence[int], add_special_tokens: bool) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer().encode(prompt, add_special_tokens=add_special_tokens)
        else:
            ids = check_ids(list(prompt), self.engine.vocab_size, "prompt")
        if not ids:
            raise ApiError("the prompt is empty: give at least one token", param="prompt")
        return ids

    def prompt_text(self, prompt: str | Sequence[int], skip_special_tokens: bool) -> str:
        """The prompt as `echo` repeats it: a given text unchanged."""
        if isinstance(prompt, str):
            return prompt
        if self.engine.tokenizer is None:
            return ""
        return self.engine.tokenizer.decode(list(prompt), skip_special_tokens=skip_special_tokens)

    def encode_chat(self, body: ChatFields, add_special_tokens: bool | None) -> list[int]:
        """Render the messages with the model's chat template, then encode without adding special tokens again."""
        tokenizer = self.tokenizer()
        if not tokenizer.has_chat_template:
            raise ApiError("the model has no chat template: use /v1/completions", param="messages")
        messages = [message.for_template() for message in body.messages]
        add_generation_prompt = body.add_generation_prompt is not False
        try:
            text = tokenizer.render_chat(messages, add_generation_prompt, **(body.chat_template_kwargs or {}))
        except InputError as error:
            raise ApiError(str(error), param="messages") from None
        ids = tokenizer.encode(text, add_special_tokens=bool(add_special_tokens))
        if not ids:
            raise ApiError("the prompt is empty: the chat template rendered nothing", param="messages")
        return ids
