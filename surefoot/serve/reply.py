"""From engine outputs to an HTTP answer: whole (JSON) or streamed (server-sent events), for both APIs.

A `Reply` knows one API's shapes; `respond` does what both have in common: submit, watch for a client that leaves,
collect or stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from surefoot.core.outputs import Completion, RequestOutput, TokenLogprob
from surefoot.serve.errors import ClientGoneError, body_of, log_if_bug
from surefoot.serve.frontend import Frontend, Prompt
from surefoot.serve.protocol import GenerationBody
from surefoot.serve.sampling import for_choice, sampling_params, scores_only
from surefoot.serve.worker import Choice, Stream

DONE = b"data: [DONE]\n\n"
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # one encoder for all events


class Reply(ABC):
    """State of one answer. Choice i belongs to prompt i // n."""

    id_prefix: str
    object: str
    chunk_object: str

    def __init__(self, front: Frontend, body: GenerationBody, model: str, prompts: list[Prompt]):
        self.pieces = front.pieces
        self.body = body
        self.prompts = prompts
        self.n = body.num_choices
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.as_ids = bool(body.return_tokens_as_token_ids)
        self.scores_only = scores_only(body)
        self.prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}  # by prompt
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._output_tokens: dict[int, int] = {}  # by choice
        self._cached_tokens: dict[int, int] = {}  # by prompt

    def choices(self, front: Frontend) -> list[Choice]:
        """What to ask of the engine: n choices per prompt, the first one leads."""
        engine, choices = front.engine, []
        for p, prompt in enumerate(self.prompts):
            params = sampling_params(
                self.body, front.defaults, len(prompt.token_ids), engine.max_model_len, engine.vocab_size
            )
            for c in range(self.n):
                choices.append(Choice(prompt.token_ids, for_choice(params, c), leader=p * self.n))
        return choices

    def see(self, index: int, output: RequestOutput) -> RequestOutput:
        """Keep the books on one output; the token that a score-only request had to generate is dropped."""
        prompt = index // self.n
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[prompt] = output.prompt_logprobs
        if index % self.n == 0:
            self._cached_tokens[prompt] = output.num_cached_tokens
        if self.scores_only:
            reason = "length" if output.finished else None
            output = replace(
                output,
                token_ids=[],
                text="",
                logprobs=None,
                num_output_tokens=0,
                finish_reason=reason,
                stop_reason=None,
            )
        self._output_tokens[index] = output.num_output_tokens
        return output

    def usage(self) -> dict[str, Any]:
        prompt_tokens = sum(len(p.token_ids) for p in self.prompts)
        completion_tokens = sum(self._output_tokens.values())
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens.values())},
        }

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        """The JSON body of an answer that is not streamed."""
        choices = [self.choice(i, completion) for i, completion in enumerate(completions)]
        return {**self._head, "object": self.object, "choices": choices, "usage": self.usage()}

    @functools.cached_property
    def _chunk_head(self) -> str:
        """What every chunk of a stream begins with, up to its choices: JSON that is written once."""
        return to_json({**self._head, "object": self.chunk_object, "choices": []}).removesuffix("]}")

    def events(self, batch: Iterable[tuple[int, RequestOutput]], with_usage: bool) -> bytes:
        """The server-sent events of one batch of outputs."""
        options, lines = self.body.stream_options, []
        running = options is not None and options.continuous_usage_stats
        for index, output in batch:
            for choice in self.chunk_choices(index, self.see(index, output)):
                usage = ""
                if with_usage:
                    usage = f', "usage": {to_json(self.usage()) if running else "null"}'
                lines.append(f"data: {self._chunk_head}{to_json(choice)}]{usage}}}\n\n")
        return "".join(lines).encode()

    def usage_event(self) -> bytes:
        return f'data: {self._chunk_head}], "usage": {to_json(self.usage())}}}\n\n'.encode()

    @abstractmethod
    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """One entry of `choices` of a whole answer."""

    @abstractmethod
    def chunk_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The chunks' choices for one output: none while nothing can be shown yet."""


async def respond(front: Frontend, reply: Reply, request: Request) -> Response:
    """Run the request and answer it in the way that the client asked for."""
    choices = reply.choices(front)
    stream = front.worker.submit(reply.id, choices)
    if reply.body.stream:
        return EventStream(reply, stream)
    async with closing(stream, request.receive):
        try:
            completions = await collect(reply, stream, choices)
        except ClientGoneError as gone:
            return Response(status_code=gone.http_status)
        whole = await front.in_pool(lambda: to_json(reply.whole(completions)))
    return Response(whole.encode(), media_type=JSONResponse.media_type)


async def collect(reply: Reply, stream: Stream, choices: list[Choice]) -> list[Completion]:
    """All outputs of all choices, accumulated."""
    done = [Completion(f"{reply.id}-{i}", c.prompt_token_ids, [], "", None) for i, c in enumerate(choices)]
    texts: list[list[str]] = [[] for _ in choices]
    async for batch in stream.batches():
        for index, output in batch:
            output, completion = reply.see(index, output), done[index]
            texts[index].append(output.text)
            completion.token_ids += output.token_ids
            if output.logprobs is not None:
                completion.logprobs = (completion.logprobs or []) + output.logprobs
            completion.finish_reason, completion.stop_reason = output.finish_reason, output.stop_reason
    for completion, parts in zip(done, texts):
        completion.text = "".join(parts)
    return done


@contextlib.asynccontextmanager
async def closing(stream: Stream, receive: Receive) -> AsyncIterator[None]:
    """Close the stream at the end of the block, or as soon as the client leaves."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stream.close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        stream.close()


class EventStream(Response):
    """Server-sent events. The status line waits for the first output, so that refusals get their own status."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply, stream: Stream):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.reply = reply
        self.stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with closing(self.stream, receive):
            started = False
            try:
                async for events in self._events():
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        started = True
                    await send({"type": "http.response.body", "body": events, "more_body": True})
            except ClientGoneError:
                return
            except Exception as error:
                if not started:
                    raise
                log_if_bug(error)
                event = f"data: {json.dumps(body_of(error))}\n\n".encode() + DONE
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        options = self.reply.body.stream_options
        with_usage = options is not None and options.include_usage
        async for batch in self.stream.batches():
            if events := self.reply.events(batch, with_usage):
                yield events
        yield (self.reply.usage_event() if with_usage else b"") + DONE
