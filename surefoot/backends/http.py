"""Any OpenAI-compatible server as a backend. A black box: it has no logits and no activations, but most give some
log-probabilities, of the prompt (vLLM's `prompt_logprobs`, OpenAI's `echo` with `logprobs`) or of what they generate.

    backend = HttpBackend("http://host:8000", api_key="...")
    backend.abilities                                    # what the server was found to support, by asking it
    backend.score_logprobs([[1, 2, 3]])                  # per position: token, log-probability, rank, alternatives

Greedy decoding is asked for by temperature 0 and nothing else, so that a server's own defaults show.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NoReturn

from surefoot.backends.base import Capture
from surefoot.backends.http_logprobs import TokenNames, output_entries, prompt_entries
from surefoot.core.errors import InputError, SurefootError
from surefoot.core.outputs import Completion, TokenLogprob
from surefoot.core.sampling import SamplingParams

TRIES = 4  # of a request that the server is too busy for, or whose connection it drops
PAUSE = 0.25  # seconds before the second try, doubled each time
# Ways to ask for log-probabilities, richest first. A server refuses what it does not know, or leaves it out silently.
AS_IDS = {"return_tokens_as_token_ids": True}
PROMPT_DIALECTS: tuple[dict[str, Any], ...] = (
    {"prompt_logprobs": 20},
    {"prompt_logprobs": 5},
    {"echo": True, "logprobs": 20} | AS_IDS,
    {"echo": True, "logprobs": 5} | AS_IDS,
    {"echo": True, "logprobs": 5},
)
OUTPUT_DIALECTS: tuple[dict[str, Any], ...] = (
    {"logprobs": 20} | AS_IDS,
    {"logprobs": 5} | AS_IDS,
    {"logprobs": 5},
    {"logprobs": True, "top_logprobs": 10},
    {"logprobs": True},
)
CHAT_DIALECTS: tuple[dict[str, Any], ...] = (
    {"logprobs": True, "top_logprobs": 20},
    {"logprobs": True, "top_logprobs": 5},
)
# Fields of SamplingParams that are sent when they are not at their default.
SENT = ("seed", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos")


class EndpointError(SurefootError):
    """The server cannot be reached, refuses, or stopped answering. `findings`: what had been found before."""

    http_status = 502

    def __init__(self, message: str, findings: Sequence[Any] = ()):
        super().__init__(message)
        self.findings = list(findings)


class UnreachableError(EndpointError):
    """Nobody answers at all."""


class RefusedError(EndpointError):
    """A 4xx: the server is alive and does not want this request."""


@dataclass
class PromptScores:
    """entries[t]: token t given the tokens before it; entries[0] is None. rank 0 means that the server does not say."""

    token_ids: list[int]
    entries: list[TokenLogprob | None]


@dataclass(frozen=True)
class Abilities:
    """What the server was found to support.

    token_ids, text, messages: what a prompt may be; messages go to /v1/chat/completions.
    prompt, output, chat: the fields that give log-probabilities of the prompt, of the output of /v1/completions, of
    the output of /v1/chat/completions; None: there is no way.
    return_token_ids: it names the ids of prompt and output.  tokenize, tokenize_chat: /tokenize takes text, messages.
    """

    token_ids: bool = False
    text: bool = False
    messages: bool = False
    prompt: dict[str, Any] | None = None
    output: dict[str, Any] | None = None
    chat: dict[str, Any] | None = None
    return_token_ids: bool = False
    tokenize: bool = False
    tokenize_chat: bool = False


@dataclass
class Answer:
    """One answer of the server. prompt_tokens: as the server counts them; prompt_token_ids: if it names them."""

    text: str
    token_ids: list[int] | None
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None
    prompt_tokens: int | None
    prompt_token_ids: list[int] | None = None
    raw: dict[str, Any] = field(default_factory=dict, repr=False)


class HttpBackend:
    """One model of one server. `names` maps token strings to ids, for servers that report strings."""

    name = "http"

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        *,
        vocab_size: int = 0,
        names: TokenNames | None = None,
        timeout: float = 300.0,
        concurrency: int = 1,
    ):
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise InputError(f"--url {url!r} is no URL: give something like http://localhost:8000")
        self.vocab_size, self.names = vocab_size, names or TokenNames(None)
        self.eos_token_ids: frozenset[int] = frozenset()
        self.concurrency, self.refusal, self._reached = concurrency, "", False
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        near = self.url.split("://", 1)[1].startswith(("127.", "localhost", "[::1]"))  # never through a proxy
        self._client = httpx.Client(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=10.0),
            limits=limits,
            trust_env=not near,
        )
        self.card = self._card(model)
        self.model: str = self.card["id"]

    def close(self) -> None:
        self._client.close()

    def info(self) -> dict[str, Any]:
        known = {k: self.card[k] for k in ("root", "owned_by", "dtype", "device", "max_model_len") if k in self.card}
        facts = {"backend": self.name, "url": self.url, "model": self.model} | known
        return facts | {"abilities": asdict(self.abilities)}

    @property
    def max_model_len(self) -> int | None:
        return self.card.get("max_model_len")

    # ---- the protocol, as far as it goes

    def score(self, sequences: Sequence[Sequence[int]]) -> NoReturn:
        raise InputError("a server over HTTP gives no logits: use score_logprobs, or verify with --url")

    def capture(self, token_ids: Sequence[int], modules: str = ".*", with_inputs: bool = False) -> Capture:
        raise InputError("a server over HTTP shows no activations: run the model with --backend to localise a fault")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        concurrency: int | None = None,
    ) -> list[Completion]:
        """Token ids in; `concurrency` requests in flight at a time."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        jobs = [(i, list(prompt), p) for i, (prompt, p) in enumerate(zip(prompts, each))]
        return list(self.map(lambda job: self._completion(*job), jobs, concurrency))

    def score_logprobs(self, sequences: Sequence[Sequence[int]]) -> Iterator[PromptScores]:
        """Teacher-forced log-probabilities, sequence by sequence, so that what came before a failure is kept."""
        if self.abilities.prompt is None or not self.abilities.token_ids:
            raise EndpointError(f"{self.url} gives no log-probabilities of a prompt (prompt_logprobs, or echo)")
        return self.map(self._scores, [list(s) for s in sequences])

    # ---- plain requests

    def ask(self, prompt: str | Sequence[int], max_tokens: int, fields: dict[str, Any] | None = None) -> Answer:
        """One /v1/completions request."""
        given = prompt if isinstance(prompt, str) else list(prompt)
        body = {"model": self.model, "prompt": given, "max_tokens": max_tokens, "temperature": 0}
        return self._answer(self._post("/v1/completions", body | (fields or {})))

    def chat(self, messages: list[dict[str, Any]], max_tokens: int, fields: dict[str, Any] | None = None) -> Answer:
        body = {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        return self._answer(self._post("/v1/chat/completions", body | (fields or {})))

    def tokenize(self, prompt: str | list[dict[str, Any]]) -> list[int]:
        """The server's own token ids of a text or of a chat."""
        what = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt, "add_generation_prompt": True}
        tokens = self._post("/tokenize", {"model": self.model} | what).get("tokens")
        if not isinstance(tokens, list) or not all(type(t) is int for t in tokens):
            raise RefusedError(f"{self.url}/tokenize answers without token ids")
        return tokens

    @cached_property
    def abilities(self) -> Abilities:
        """Found out by asking for a token or two in each way."""
        ids, text = [3, 4, 5, 6], "The"
        hello = [{"role": "user", "content": "Hi"}]
        takes_ids = (answer := self._try(self.ask, ids, 1)) is not None and answer.prompt_tokens in (None, len(ids))
        takes_text = self._try(self.ask, text, 1) is not None
        prompt: Any = ids if takes_ids else text

        def first(dialects: Sequence[dict[str, Any]], works) -> dict[str, Any] | None:
            return next((d for d in dialects if works(d)), None)

        def gives(d: dict[str, Any]) -> bool:
            answer = self._try(self.ask, prompt, 2, d)
            return answer is not None and bool(answer.logprobs)

        def scores(d: dict[str, Any]) -> bool:
            answer = self._try(self.ask, ids, 1, d)
            return answer is not None and prompt_entries(answer.raw, ids, self.names) is not None

        def chats(d: dict[str, Any]) -> bool:
            answer = self._try(self.chat, hello, 2, d)
            return answer is not None and bool(answer.logprobs)

        named = self._try(self.ask, prompt, 1, {"return_token_ids": True}) if takes_ids or takes_text else None
        return Abilities(
            token_ids=takes_ids,
            text=takes_text,
            messages=self._try(self.chat, hello, 1) is not None,
            prompt=first(PROMPT_DIALECTS, scores) if takes_ids else None,
            output=first(OUTPUT_DIALECTS, gives) if takes_ids or takes_text else None,
            chat=first(CHAT_DIALECTS, chats),
            return_token_ids=named is not None and named.prompt_token_ids is not None,
            tokenize=self._try(self.tokenize, text) is not None,
            tokenize_chat=self._try(self.tokenize, hello) is not None,
        )

    # ---- inside

    def _scores(self, sequence: list[int]) -> PromptScores:
        answer = self.ask(sequence, 1, self.abilities.prompt)
        entries = prompt_entries(answer.raw, sequence, self.names)
        if entries is None:
            raise EndpointError(f"{self.url} left out the log-probabilities of a prompt of {len(sequence)} tokens")
        return PromptScores(sequence, entries)

    def _completion(self, index: int, prompt: list[int], params: SamplingParams) -> Completion:
        wanted: dict[str, Any] = {name: getattr(params, name) for name in SENT if _is_set(params, name)}
        wanted |= {"temperature": params.temperature}
        if params.logprobs is not None and self.abilities.output:
            wanted |= self.abilities.output
        if self.abilities.return_token_ids:
            wanted["return_token_ids"] = True
        answer = self.ask(prompt, params.max_tokens, wanted)
        ids = answer.token_ids if answer.token_ids is not None else self.names.ids_of(answer.text)
        return Completion(
            f"http-{index}", prompt, ids, answer.text, answer.finish_reason, logprobs=answer.logprobs or None
        )

    def _answer(self, body: dict[str, Any]) -> Answer:
        try:
            choice = body["choices"][0]
            text = choice["text"] if "text" in choice else (choice.get("message") or {}).get("content") or ""
        except (KeyError, IndexError, TypeError, AttributeError):
            raise EndpointError(f"{self.url} answers without choices: is it an OpenAI-compatible server?") from None
        logprobs = output_entries(choice.get("logprobs"), self.names, text)
        named = choice.get("token_ids")
        ids = named if isinstance(named, list) else [e.token_id for e in logprobs] if logprobs else None
        prompt_ids = choice.get("prompt_token_ids") or body.get("prompt_token_ids")
        count = (body.get("usage") or {}).get("prompt_tokens")
        return Answer(text, ids, logprobs, choice.get("finish_reason"), count, prompt_ids, body)

    def map(self, work: Callable[[Any], Any], items: Sequence[Any], concurrency: int | None = None) -> Iterator[Any]:
        """`work` on each item, `concurrency` at a time; results in order, as they come."""
        count = concurrency or self.concurrency
        if count == 1:
            yield from map(work, items)
            return
        with ThreadPoolExecutor(max_workers=count) as pool:
            yield from pool.map(work, items)

    def _try(self, request, *args: Any) -> Any:
        """The answer, or None if the server refuses."""
        try:
            return request(*args)
        except RefusedError as error:
            self.refusal = str(error)
            return None

    def _card(self, wanted: str | None) -> dict[str, Any]:
        try:
            data = self._request("GET", "/v1/models").get("data")
        except UnreachableError:
            raise
        except EndpointError:  # some servers do without this route
            data = None
        cards = [c for c in data if isinstance(c, dict) and "id" in c] if isinstance(data, list) else []
        if wanted is None and not cards:
            raise EndpointError(f"{self.url}/v1/models names no model: say which one with --url-model")
        if wanted is None:
            return cards[0]
        found = next((c for c in cards if c["id"] == wanted), None)
        if found is None and cards and cards[0].get("owned_by") in ("vllm", "surefoot"):
            raise InputError(f"{self.url} does not serve {wanted!r}: it has {', '.join(c['id'] for c in cards)}")
        return found or {"id": wanted}

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        import httpx

        for attempt in range(TRIES):
            last = attempt == TRIES - 1
            try:
                response = self._client.request(method, path, json=body)
            except httpx.ConnectError:
                if last or not self._reached:
                    raise UnreachableError(f"cannot reach {self.url}: is the server running there?") from None
            except httpx.TimeoutException:
                raise EndpointError(f"{self.url} did not answer in time ({path})") from None
            except httpx.HTTPError as error:  # servers with a short queue drop connections when many come at once
                if last:
                    raise EndpointError(f"{self.url} broke the connection ({type(error).__name__}, {path})") from None
            else:
                self._reached = True
                if last or response.status_code not in (429, 503):
                    break
            time.sleep(PAUSE * 2**attempt)
        return self._checked(response.status_code, response.content, path)

    def _checked(self, status: int, content: bytes, path: str) -> dict[str, Any]:
        if status in (401, 403):
            raise InputError(f"{self.url} wants an API key (HTTP {status}): give it with --api-key")
        if status >= 400:
            line = " ".join(content.decode("utf-8", "replace").split())[:200]
            kind = RefusedError if status < 500 else EndpointError
            raise kind(f"{self.url}{path} answers HTTP {status}: {line}")
        try:
            body = json.loads(content)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise EndpointError(f"{self.url}{path} does not answer with JSON: is it an OpenAI-compatible server?")
        return body


def _is_set(params: SamplingParams, name: str) -> bool:
    return getattr(params, name) != getattr(SamplingParams(), name)
