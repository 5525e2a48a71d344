"""`/v1/completions`: prompts → continuations. With `echo` and `logprobs` it scores prompts, as evaluation tools do."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from surefoot.core.outputs import Completion, RequestOutput, TokenLogprob
from surefoot.serve.errors import ApiError
from surefoot.serve.frontend import Frontend, Prompt
from surefoot.serve.logprobs import Offsets, completion_logprobs, vllm_prompt_logprobs
from surefoot.serve.protocol import CompletionRequest
from surefoot.serve.reply import Reply, respond
from surefoot.serve.sampling import scores_only


class CompletionReply(Reply):
    id_prefix = "cmpl"
    object = "text_completion"
    chunk_object = "text_completion"
    body: CompletionRequest

    def __init__(self, front: Frontend, body: CompletionRequest, model: str, prompts: list[Prompt]):
        super().__init__(front, body, model, prompts)
        self._head["system_fingerprint"] = None
        self._skip = body.skip_special_tokens is not False
        self._offsets: dict[int, Offsets] = {}  # by choice; present once a choice has begun

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        prompt = self.prompts[index // self.n]
        choice: dict[str, Any] = {
            "index": index,
            "text": prompt.text + completion.text,
            "logprobs": self._logprobs(index, completion.token_ids, completion.logprobs),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self.body.prompt_logprobs is not None:
            entries = self.prompt_logprobs.get(index // self.n, [])
            choice["prompt_logprobs"] = vllm_prompt_logprobs(self.pieces, entries, self.body.prompt_logprobs)
        if self.body.return_token_ids:
            choice |= {"prompt_token_ids": prompt.token_ids, "token_ids": completion.token_ids}
        return choice

    def chunk_choices(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        first = index not in self._offsets
        prompt = self.prompts[index // self.n]
        text = prompt.text + output.text if first else output.text
        wanted = self.body.logprobs is not None or self.body.return_token_ids
        logprobs = self._logprobs(index, output.token_ids, output.logprobs)
        if not (text or output.finished or (wanted and (first or output.token_ids))):
            return []
        choice: dict[str, Any] = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = output.token_ids
            if first:
                choice["prompt_token_ids"] = prompt.token_ids
        return [choice]

    def _logprobs(self, index: int, token_ids: list[int], entries: list[TokenLogprob] | None) -> dict[str, Any] | None:
        """Log-probabilities of what this answer or chunk shows; an echoed prompt comes with the choice's first call."""
        first = index not in self._offsets
        offsets = self._offsets.setdefault(index, Offsets(self.pieces, self._skip))
        if self.body.logprobs is None:
            return None
        ids: list[int] = []
        shown: list[TokenLogprob | None] = []
        starts: list[int] = []
        if first and self.body.echo:
            prompt = self.prompts[index // self.n]
            ids += prompt.token_ids
            shown += self.prompt_logprobs.get(index // self.n, [])
            starts += [offsets.next(t, prompt.text) for t in prompt.token_ids]
            offsets.position = len(prompt.text)
        ids += token_ids
        shown += entries or []
        starts += [offsets.next(t) for t in token_ids]
        return completion_logprobs(self.pieces, ids, shown, starts, self.body.logprobs, self.as_ids)


async def completion(front: Frontend, body: CompletionRequest, request: Request) -> Response:
    model = front.check_model(body.model)
    if body.max_tokens == 0 and not scores_only(body):
        raise ApiError("max_tokens 0 needs echo or prompt_logprobs: else nothing was asked for", param="max_tokens")
    prompts = await front.in_pool(_encode, front, body)
    return await respond(front, CompletionReply(front, body, model, prompts), request)


def _encode(front: Frontend, body: CompletionRequest) -> list[Prompt]:
    skip = body.skip_special_tokens is not False
    prompts = []
    for prompt in body.prompt:
        ids = front.encode_prompt(prompt, body.add_special_tokens is not False)
        prompts.append(Prompt(ids, front.prompt_text(prompt, skip) if body.echo else ""))
    return prompts
