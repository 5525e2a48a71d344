"""`/v1/chat/completions`: messages → prompt tokens → answer."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from surefoot.core.outputs import Completion, RequestOutput, TokenLogprob
from surefoot.serve.frontend import Frontend, Prompt
from surefoot.serve.logprobs import chat_logprobs, vllm_prompt_logprobs
from surefoot.serve.protocol import ChatCompletionRequest
from surefoot.serve.reply import Reply, respond


class ChatReply(Reply):
    id_prefix = "chatcmpl"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    body: ChatCompletionRequest

    def __init__(self, front: Frontend, body: ChatCompletionRequest, model: str, prompts: list[Prompt]):
        super().__init__(front, body, model, prompts)
        self._head["system_fingerprint"] = None
        self._begun: set[int] = set()

    def whole(self, completions: list[Completion]) -> dict[str, Any]:
        answer = super().whole(completions)
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = self.prompts[0].token_ids
        if self.body.prompt_logprobs is not None:
            entries = self.prompt_logprobs.get(0, [])
            answer["prompt_logprobs"] = vllm_prompt_logprobs(self.pieces, entries, self.body.prompt_logprobs)
        return answer

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def chunk_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The role first, then text, then the reason why it ended."""
        choices: list[dict[str, Any]] = []
        ids = self.body.return_token_ids
        if index not in self._begun:
            self._begun.add(index)
            choices.append(_delta(index, {"role": "assistant", "content": ""}))
            if ids:
                choices[0]["prompt_token_ids"] = self.prompts[0].token_ids
        if output.text or (output.token_ids and (ids or self.body.logprobs)):
            choices.append(_delta(index, {"content": output.text}, self._logprobs(output.logprobs)))
            if ids:
                choices[-1]["token_ids"] = output.token_ids
        if output.finished:
            choices.append(_delta(index, {}) | {"finish_reason": output.finish_reason})
            choices[-1]["stop_reason"] = output.stop_reason
        return choices

    def _logprobs(self, entries: list[TokenLogprob] | None) -> dict[str, Any] | None:
        if self.body.requested_logprobs is None:
            return None
        return chat_logprobs(self.pieces, entries or [], self.body.requested_logprobs, self.as_ids)


def _delta(index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


async def chat_completion(front: Frontend, body: ChatCompletionRequest, request: Request) -> Response:
    model = front.check_model(body.model)
    token_ids = await front.in_pool(front.encode_chat, body, body.add_special_tokens)
    return await respond(front, ChatReply(front, body, model, [Prompt(token_ids)]), request)
