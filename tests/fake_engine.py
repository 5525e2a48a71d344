"""An engine without a model: same API, deterministic tokens from a byte tokenizer, failures on demand.

Greedy requests are answered with "You said: <prompt>. 你好🙂" and an end-of-sequence token; sampled ones with letters
that depend on (seed, index) only.
"""

from __future__ import annotations

import codecs
import itertools
import random
import re
import time
from dataclasses import dataclass, field

from surefoot.core.config import EngineInfo
from surefoot.core.errors import CapacityError, InputError, StepError
from surefoot.core.outputs import RequestOutput, TokenLogprob
from surefoot.core.sampling import SamplingParams
from surefoot.engine.postponed import Postponed

SPECIALS = ("<bos>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>")
BOS, EOS = 256, 257
BLOCK = 16


class ByteTokenizer:
    """Token id = byte; special tokens above."""

    has_chat_template = True
    vocab_size = 256 + len(SPECIALS)
    eos_token_ids = frozenset({EOS})

    def __init__(self, generation_defaults: dict | None = None):
        self.generation_defaults = generation_defaults or {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids = [BOS] if add_special_tokens else []
        for part in re.split("(" + "|".join(map(re.escape, SPECIALS)) + ")", text):
            ids += [256 + SPECIALS.index(part)] if part in SPECIALS else list(part.encode())
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else SPECIALS[token_id - 256].encode()

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        shown = [t for t in ids if t < 256 or not skip_special_tokens]
        return b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = True, **kwargs: object) -> str:
        if messages[0]["role"] == "assistant":
            raise InputError("conversations must start with a user")
        text = "".join(f"<|{m['role']}|>{_flat(m.get('content'))}" for m in messages)
        return "<bos>" + str(kwargs.get("preamble", "")) + text + ("<|assistant|>" if add_generation_prompt else "")


def _flat(content: object) -> str:
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else str(content or "")


@dataclass
class _Running:
    request_id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    num_cached: int
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    sent_chars: int = 0
    sent_tokens: int = 0


class FakeEngine:
    def __init__(
        self,
        step_delay: float = 0.0,
        fail_at_step: int | None = None,
        max_model_len: int = 512,
        num_blocks: int = 1024,
        max_num_seqs: int = 64,
        generation_config: dict | None = None,
    ):
        self.tokenizer: ByteTokenizer | None = ByteTokenizer(generation_config)
        self.vocab_size = ByteTokenizer.vocab_size
        self.max_model_len = max_model_len
        self.step_delay = step_delay
        self.fail_at_step = fail_at_step
        self.num_blocks = num_blocks
        self.max_num_seqs = max_num_seqs
        self.steps = 0
        self.cancelled: list[str] = []
        self.added: list[tuple[str, SamplingParams]] = []
        self.running: dict[str, _Running] = {}
        self._ended: list[RequestOutput] = []
        self._prefixes: set[tuple[int, ...]] = set()
        self.info = EngineInfo(
            model="fake",
            architecture="FakeForCausalLM",
            device="cpu",
            device_name="none",
            dtype="float32",
            num_parameters=0,
            weight_bytes=0,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            block_size=BLOCK,
            num_blocks=num_blocks,
            kv_cache_bytes=0,
            state_bytes=0,
            prefix_caching="on",
        )

    @property
    def free_blocks(self) -> int:
        return self.num_blocks - sum(-(-(len(r.prompt) + len(r.output)) // BLOCK) for r in self.running.values())

    def stats(self) -> dict:
        return {"running": len(self.running), "free_blocks": self.free_blocks}

    def add_request(
        self, prompt_token_ids: list[int], params: SamplingParams, request_id: str | None = None, score: bool = False
    ) -> str:
        if not prompt_token_ids:
            raise InputError("the prompt is empty: give at least one token")
        if bytes(t for t in prompt_token_ids if t < 256).endswith(b"CRASH-ADD"):
            raise ZeroDivisionError("a bug")
        needed = -(-(len(prompt_token_ids) + params.max_tokens) // BLOCK)
        if needed > self.num_blocks:
            raise CapacityError(f"the request needs {needed} KV blocks and there are {self.num_blocks}")
        assert request_id is not None and request_id not in self.running
        seed = random.getrandbits(31) if params.seed is None else params.seed
        cached = 0
        if params.prompt_logprobs is None:
            ends = range(BLOCK, len(prompt_token_ids), BLOCK)
            cached = max((e for e in ends if tuple(prompt_token_ids[:e]) in self._prefixes), default=0)
        self.running[request_id] = _Running(request_id, list(prompt_token_ids), params, seed, cached)
        self.added.append((request_id, params))
        return request_id

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        del self.running[request_id]
        self._ended.append(RequestOutput(request_id, finished=True, finish_reason="abort"))

    postponed = Postponed()

    def has_unfinished(self) -> bool:
        return bool(self.running or self._ended)

    def step(self) -> list[RequestOutput]:
        self.steps += 1
        if self.fail_at_step is not None and self.steps >= self.fail_at_step:
            raise RuntimeError("the device fell over")
        crash = [r for r in self.running.values() if bytes(t for t in r.prompt if t < 256).endswith(b"CRASH-STEP")]
        if crash:
            cause = ZeroDivisionError("a bug")
            for request in crash:
                del self.running[request.request_id]
            raise StepError([r.request_id for r in crash], cause) from cause
        if self.step_delay:
            time.sleep(self.step_delay)
        ended, self._ended = self._ended, []
        return ended + [self._advance(r) for r in itertools.islice(list(self.running.values()), self.max_num_seqs)]

    def _next_token(self, r: _Running) -> int:
        i = len(r.output)
        if not r.params.greedy:
            return random.Random(f"{r.seed}/{i}").choice(range(ord("a"), ord("z") + 1))
        said = bytes(t for t in r.prompt if t < 256)
        reply = b"You said: " + said + ". 你好🙂".encode()
        if i < len(reply) or r.params.ignore_eos or i < r.params.min_tokens:
            return reply[i % len(reply)]
        return EOS

    def _advance(self, r: _Running) -> RequestOutput:
        params, first = r.params, not r.output
        token = self._next_token(r)
        r.output.append(token)
        if first:
            self._prefixes |= {tuple(r.prompt[:e]) for e in range(BLOCK, len(r.prompt), BLOCK)}
        reason, stop_reason, text = self._finish(r, token)
        held = 0 if reason else max((len(s) - 1 for s in params.stop), default=0)
        shown = text[r.sent_chars : max(len(text) - held, r.sent_chars)]
        r.sent_chars += len(shown)
        output = RequestOutput(
            request_id=r.request_id,
            token_ids=[token],
            text=shown,
            logprobs=None if params.logprobs is None else [_logprob(token, params.logprobs)],
            finished=reason is not None,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_prompt_tokens=len(r.prompt),
            num_output_tokens=len(r.output),
            num_cached_tokens=r.num_cached,
        )
        if first and params.prompt_logprobs is not None:
            rest = [_logprob(t, params.prompt_logprobs) for t in r.prompt[1:]]
            output.prompt_logprobs = [None, *rest]
        if reason:
            del self.running[r.request_id]
        return output

    def _finish(self, r: _Running, token: int) -> tuple[str | None, int | str | None, str]:
        """(finish reason, stop reason, text so far: whole characters, cut at a stop string)."""
        data = b"".join(self.tokenizer.token_bytes(t) for t in r.output if t < 256 or not r.params.skip_special_tokens)
        text = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
        if len(r.output) >= r.params.min_tokens:
            for stop in r.params.stop:
                if stop in text:
                    return "stop", stop, text[: text.index(stop)]
            if token in r.params.stop_token_ids:
                return "stop", token, text
            if token == EOS and not r.params.ignore_eos:
                return "stop", None, text
        if len(r.output) >= r.params.max_tokens:
            return "length", None, text
        return None, None, text


def _logprob(token: int, k: int) -> TokenLogprob:
    """Token t has log-probability -(t % 7 + 1) / 10 and is always the most likely one."""
    value = -(token % 7 + 1) / 10
    top = tuple(((token + i) % ByteTokenizer.vocab_size, value - i) for i in range(k))
    return TokenLogprob(token, value, rank=1, top=top)
