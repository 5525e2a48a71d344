"""From token ids to what the caller sees: text, stop conditions, finish reasons. Torch-free.

Text streams out as soon as it is final. Two things hold it back: bytes of an unfinished character (the decode stream's
business) and an ending that a stop string could still continue.

The stop string that is complete first wins; of two that end at the same character, the one that began first. That is
what a reader of single characters would do, so the way the text is cut into tokens cannot change the result.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from surefoot.core.outputs import Completion, RequestOutput, TokenLogprob
from surefoot.core.request import Request

StopReason = int | str | None


class DecodeStream(Protocol):
    """Incremental detokenizer: concatenating all results gives the decoded text."""

    def push(self, token_id: int, /) -> str: ...

    def flush(self) -> str: ...


class StopStrings:
    """Searches stop strings in text that arrives in pieces."""

    def __init__(self, stop: Sequence[str], include_in_output: bool = False) -> None:
        self.stop = tuple(stop)
        self.include_in_output = include_in_output
        self.held = ""

    def push(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """Take new text; give (text that is final now, stop string if one is complete).

        With may_stop=False a stop string that is complete now is passed over, one that has only begun still counts.
        """
        if not self.stop:
            return text, None
        known, buffer = len(self.held), self.held + text
        if may_stop and (match := self._first_match(buffer, known)) is not None:
            start, stop = match
            self.held = ""
            return buffer[: start + (len(stop) if self.include_in_output else 0)], stop
        final = len(buffer) - self._undecided(buffer)
        self.held = buffer[final:]
        return buffer[:final], None

    def flush(self) -> str:
        """Text that was held back, when nothing will follow."""
        held, self.held = self.held, ""
        return held

    def _first_match(self, buffer: str, known: int) -> tuple[int, str] | None:
        """(start, stop string) of the match that ends first among those that end after the first `known` characters."""
        matches = []
        for stop in self.stop:
            start = buffer.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _undecided(self, buffer: str) -> int:
        """Length of the longest ending of the buffer that some stop string begins with."""
        for n in range(min(len(buffer), max(map(len, self.stop)) - 1), 0, -1):
            ending = buffer[-n:]
            if any(len(stop) > n and stop.startswith(ending) for stop in self.stop):
                return n
        return 0


class OutputProcessor:
    """Turns the new tokens of one request into `RequestOutput`s and decides when it is finished.

    It does not change the request: the engine appends the tokens, and copies `finish_reason` and `stop_reason`.
    Without a decode stream there is no text, hence no stop string either.

    The first min_tokens tokens never stop a request. A token that stops it (eos or one of stop_token_ids) is among the
    token ids but not in the text, unless `include_stop_str_in_output` is set and the stream does not skip it.
    """

    def __init__(self, request: Request, stream: DecodeStream | None, max_model_len: int) -> None:
        params = request.params
        self.request, self.params, self.stream = request, params, stream
        self.max_output_tokens = min(params.max_tokens, max_model_len - request.num_prompt_tokens)
        self.eos_token_ids = frozenset() if params.ignore_eos else request.eos_token_ids
        self.stops = StopStrings(params.stop, params.include_stop_str_in_output)
        self.num_output_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: StopReason = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def process(self, token_id: int, logprob: TokenLogprob | None = None) -> RequestOutput:
        """Take the next token. Token id -1 (there were no valid logits) finishes the request with "error"."""
        if self.finished:
            raise RuntimeError(f"request {self.request.request_id} got a token after it had finished")
        if token_id < 0:
            return self._end("error")
        self.num_output_tokens += 1
        may_stop = self.num_output_tokens > self.params.min_tokens
        if may_stop and token_id in self.eos_token_ids:
            self.finish_reason = "stop"
        elif may_stop and token_id in self.params.stop_token_ids:
            self.finish_reason, self.stop_reason = "stop", token_id
        elif self.num_output_tokens >= self.max_output_tokens:
            self.finish_reason = "length"
        output = self._output(self._advance(token_id, may_stop))
        output.token_ids = [token_id]
        if self.params.logprobs is not None and logprob is not None:
            output.logprobs = [replace(logprob, top=logprob.top[: self.params.logprobs])]
        return output

    def abort(self) -> RequestOutput:
        """The caller does not want more."""
        return self._end("abort")

    def scored(self) -> RequestOutput:
        """A request that was only to be scored is through."""
        return self._end("stop")

    def _end(self, reason: str) -> RequestOutput:
        """Finish without a new token; text that was held back is given out."""
        self.finish_reason = reason
        text, _ = self.stops.push(self.stream.flush() if self.stream else "", may_stop=False)
        return self._output(text + self.stops.flush())

    def _advance(self, token_id: int, may_stop: bool) -> str:
        """Decode one token; returns the text that is final now. A complete stop string overrides every other end."""
        if self.stream is None:
            return ""
        is_stop_token = self.finish_reason == "stop"
        text = self.stream.push(token_id) if not is_stop_token or self.params.include_stop_str_in_output else ""
        if self.finished:
            text += self.stream.flush()
        text, stop = self.stops.push(text, may_stop)
        if stop is not None:
            self.finish_reason, self.stop_reason = "stop", stop
        elif self.finished:
            text += self.stops.flush()
        return text

    def _output(self, text: str) -> RequestOutput:
        request = self.request
        return RequestOutput(
            request_id=request.request_id,
            text=text,
            finished=self.finished,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_cached_tokens=request.num_cached_tokens,
        )


class Accumulator:
    """Collects the `RequestOutput`s of one request into a `Completion`. Times count from `started` (monotonic)."""

    def __init__(self, request_id: str, prompt_token_ids: list[int], started: float | None = None) -> None:
        self.started = time.monotonic() if started is None else started
        self.finished = False
        self._texts: list[str] = []
        self._completion = Completion(request_id, prompt_token_ids, token_ids=[], text="", finish_reason=None)

    def add(self, output: RequestOutput) -> None:
        so_far = self._completion
        if so_far.ttft_s is None and output.token_ids:
            so_far.ttft_s = time.monotonic() - self.started
        self._texts.append(output.text)
        so_far.token_ids += output.token_ids
        if output.logprobs is not None:
            so_far.logprobs = so_far.logprobs or []
            so_far.logprobs += output.logprobs
        if output.prompt_logprobs is not None:
            so_far.prompt_logprobs = output.prompt_logprobs
        so_far.num_cached_tokens = output.num_cached_tokens
        if output.finished:
            self.finished = True
            so_far.finish_reason, so_far.stop_reason = output.finish_reason, output.stop_reason
            so_far.latency_s = time.monotonic() - self.started

    def completion(self) -> Completion:
        """What has come so far; complete once `finished`."""
        self._completion.text = "".join(self._texts)
        return self._completion
