"""An engine of a few lines for tests of the terminal: token ids are code points, the answer is the prompt upside down.

The template writes `<role>content` per message and `<a>` at the end. One token per running request and step.
"""

from __future__ import annotations

from types import SimpleNamespace

from surefoot.core.errors import InputError
from surefoot.core.outputs import RequestOutput, TokenLogprob
from surefoot.engine.postponed import Postponed


class FakeTokenizer:
    def __init__(self, has_chat_template: bool = True):
        self.has_chat_template = has_chat_template

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def encode_chat(self, messages, **kwargs):
        head = "".join(f"{{{k}={v}}}" for k, v in kwargs.items())
        return self.encode(head + "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<a>")

    def token_text(self, token_id):
        return chr(token_id)


class FakeEngine:
    def __init__(self, template: bool = True, max_model_len: int = 200):
        self.tokenizer = FakeTokenizer(template)
        self.max_model_len = max_model_len
        facts = {"model": "fake", "device": "cpu", "dtype": "float32", "precision": "float32", "notes": ["a note"]}
        self.info = SimpleNamespace(**facts, as_dict=lambda: INFO)
        self.running = {}
        self.prompts = []
        self.cancelled = []
        self.steps = 0
        self.on_step = lambda: None

    def add_request(self, prompt_token_ids, params, request_id=None, score=False):
        text = "".join(map(chr, prompt_token_ids))
        if len(prompt_token_ids) > self.max_model_len:
            raise InputError(f"the prompt has {len(prompt_token_ids)} tokens, the maximum is {self.max_model_len}")
        request_id = request_id or f"r{len(self.prompts)}"
        self.prompts.append(text)
        self.running[request_id] = (list(text[::-1]), params, 0)
        return request_id

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        self.running.pop(request_id, None)

    def generate(self, prompts, params):
        return []

    postponed = Postponed()

    def has_unfinished(self):
        return bool(self.running)

    def step(self):
        self.steps += 1
        self.on_step()
        return [self._advance(request_id) for request_id in list(self.running)]

    def _advance(self, request_id):
        letters, params, n = self.running[request_id]
        letter = letters[n]
        length = n + 1 == params.max_tokens
        done = length or n + 1 == len(letters)
        if done:
            del self.running[request_id]
        else:
            self.running[request_id] = (letters, params, n + 1)
        logprobs = [TokenLogprob(ord(letter), -0.5, 1, ((ord(letter), -0.5),))] if params.logprobs is not None else None
        reason = ("length" if length else "stop") if done else None
        return RequestOutput(request_id, [ord(letter)], letter, logprobs, finished=done, finish_reason=reason)


INFO = {
    "model": "fake",
    "num_parameters": 1234567,
    "ops": {"rms_norm/cpu": "reference"},
    "notes": ["a", "b"],
    "dtype": "float32",
}


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("surefoot: "), captured.err
    return captured.err
