"""Parts of the server that need no server: sampling defaults, token pieces, offsets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fake_engine import BOS, EOS, ByteTokenizer

from surefoot.core.outputs import Completion, TokenLogprob
from surefoot.core.sampling import SamplingParams
from surefoot.serve.completions import CompletionReply
from surefoot.serve.errors import ApiError
from surefoot.serve.frontend import Prompt
from surefoot.serve.logprobs import Offsets, Pieces, chat_logprobs, completion_logprobs
from surefoot.serve.protocol import ChatCompletionRequest, CompletionRequest, validate
from surefoot.serve.sampling import for_choice, max_tokens, sampling_defaults, sampling_params

LLAMA = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096, "eos_token_id": [1]}


def test_sampling_defaults():
    openai = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert sampling_defaults("openai", ByteTokenizer(LLAMA)) == openai
    assert sampling_defaults("model", None) == sampling_defaults("model", ByteTokenizer()) == openai
    assert sampling_defaults("model", ByteTokenizer(LLAMA)) == openai | {"temperature": 0.6, "top_p": 0.9}
    greedy = {"do_sample": False, "temperature": 0.6, "top_k": 3, "repetition_penalty": 1.05}
    assert sampling_defaults("model", ByteTokenizer(greedy)) == openai | {
        "temperature": 0.0,
        "repetition_penalty": 1.05,
    }


def params_of(**fields) -> SamplingParams:
    body = validate(CompletionRequest, {"prompt": "hi", **fields})
    return sampling_params(body, sampling_defaults("model", ByteTokenizer(LLAMA)), 2, 100, 50)


def test_request_wins_over_defaults():
    assert params_of().temperature == 0.6
    assert params_of(temperature=0).greedy
    assert params_of(temperature=None).temperature == 0.6
    assert params_of(top_k=10**12).top_k == 50


def test_seeds_of_choices():
    params = params_of(seed=2**63 - 1)
    assert for_choice(params, 0).seed == 2**63 - 1
    assert for_choice(params, 1).seed == -(2**63)
    assert for_choice(params_of(), 3).seed is None


@pytest.mark.parametrize(
    "fields, prompt_len, want",
    [
        ({}, 10, 16),
        ({}, 95, 5),
        ({"min_tokens": 30}, 10, 30),
        ({"max_tokens": 90}, 10, 90),
        ({"max_tokens": 0, "echo": True}, 99, 1),
    ],
)
def test_max_tokens_of_completions(fields, prompt_len, want):
    body = validate(CompletionRequest, {"prompt": "hi", **fields})
    assert max_tokens(body, prompt_len, 100) == want


def test_max_tokens_of_chat_is_what_fits():
    body = validate(ChatCompletionRequest, {"messages": [{"role": "user", "content": "hi"}]})
    assert max_tokens(body, 10, 100) == 90
    for prompt_len in (100, 101):
        with pytest.raises(ApiError, match="maximum context length is 100"):
            max_tokens(body, prompt_len, 100)


def test_pieces():
    pieces = Pieces(ByteTokenizer())
    assert (pieces.text(104), pieces.bytes_of(104), pieces.is_special(104)) == ("h", b"h", False)
    assert (pieces.text(0xE4), pieces.bytes_of(0xE4), pieces.is_special(0xE4)) == ("bytes:\\xe4", b"\xe4", False)
    assert (pieces.text(EOS), pieces.is_special(EOS)) == ("<eos>", True)
    assert pieces.text(104, as_id=True) == "token_id:104"
    assert Pieces(None).text(5) == "token_id:5"


def test_offsets():
    ids = [BOS, *"aé🙂b".encode(), EOS]

    def starts(skip: bool, text: str | None) -> list[int]:
        offsets = Offsets(Pieces(ByteTokenizer()), skip)
        return [offsets.next(t, text) for t in ids]

    assert starts(True, None) == [0, 0, 1, 1, 2, 2, 2, 2, 3, 4]
    assert starts(False, None) == [0, 5, 6, 6, 7, 7, 7, 7, 8, 9]
    # an echoed prompt decides by itself: added special tokens are not in it, spelled-out ones are
    assert starts(True, "aé🙂b<eos>") == [0, 0, 1, 1, 2, 2, 2, 2, 3, 4]
    assert starts(True, "<bos>aé🙂b") == [0, 5, 6, 6, 7, 7, 7, 7, 8, 9]


def test_output_offsets_begin_after_the_echoed_text():
    """SentencePiece shows a space before the first word that the prompt's text does not have."""
    pieces = Pieces(ByteTokenizer())
    body = validate(CompletionRequest, {"prompt": "hi", "echo": True, "logprobs": 0})
    front = SimpleNamespace(pieces=pieces)
    reply = CompletionReply(front, body, "fake", [Prompt([ord(" "), *b"hi"], "hi")])
    reply.prompt_logprobs[0] = [None, *[TokenLogprob(t, -1.0, 1) for t in b"hi"]]
    choice = reply.choice(0, Completion("r", [], [33], "!", "length", logprobs=[TokenLogprob(33, -1.0, 1)]))
    assert choice["text"] == "hi!" and choice["logprobs"]["text_offset"][-1] == 2


def test_logprobs_stay_json():
    pieces = Pieces(ByteTokenizer())
    entry = TokenLogprob(97, float("-inf"), 9, top=((98, -0.1), (99, float("-inf"))))
    assert chat_logprobs(pieces, [entry], 1, False)["content"][0]["logprob"] == -9999.0
    table = completion_logprobs(pieces, [97], [entry], [0], 2, False)
    assert table["top_logprobs"] == [{"b": -0.1, "c": -9999.0, "a": -9999.0}]
