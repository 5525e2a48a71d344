"""Whatever is wrong with a request, the answer has OpenAI's error body and the server goes on serving."""

from __future__ import annotations

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from serve_helpers import Served, serving

from surefoot.core.errors import InputError
from surefoot.serve.settings import ServeSettings

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served():
    with serving(FakeEngine(num_blocks=20), ServeSettings(max_body_bytes=100_000)) as s:
        yield s


def check_error(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message and "\n" not in message and "Traceback" not in message
    return body["error"]


def check_serves(served: Served) -> None:
    body = {"prompt": "hi", "max_tokens": 3, "temperature": 0}
    assert httpx.post(served.base_url + PLAIN, json=body).json()["choices"][0]["text"] == "You"


BAD_FIELDS = [
    # path, fields, param, a part of the message
    (PLAIN, {"temperature": -1}, "temperature", "must lie in"),
    (PLAIN, {"temperature": "hot"}, "temperature", "valid number"),
    (PLAIN, {"top_p": 0}, "top_p", "must lie in"),
    (PLAIN, {"top_k": -2}, "top_k", "top_k"),
    (PLAIN, {"top_k": 1.5}, "top_k", "valid integer"),
    (PLAIN, {"min_p": 2}, "min_p", "must lie in"),
    (PLAIN, {"presence_penalty": 3}, "presence_penalty", "must lie in"),
    (PLAIN, {"frequency_penalty": -3}, "frequency_penalty", "must lie in"),
    (PLAIN, {"repetition_penalty": 0}, "repetition_penalty", "must lie in"),
    (PLAIN, {"max_tokens": -1}, "max_tokens", "at least 1"),
    (PLAIN, {"max_tokens": 0}, "max_tokens", "echo"),
    (PLAIN, {"max_tokens": True}, "max_tokens", "valid integer"),
    (PLAIN, {"min_tokens": 9, "max_tokens": 3}, "min_tokens", "must lie in"),
    (PLAIN, {"n": 0}, "n", "greater than or equal to 1"),
    (PLAIN, {"n": 129}, "n", "less than or equal to 128"),
    (PLAIN, {"seed": 2**70}, "seed", "less than"),
    (PLAIN, {"seed": 10**30}, "seed", "less than"),
    (PLAIN, {"stop": ""}, None, "stop string"),
    (PLAIN, {"stop": 7}, "stop", "valid list"),
    (PLAIN, {"stop_token_ids": [10**6]}, "stop_token_ids", "does not exist"),
    (PLAIN, {"logit_bias": {"a": 1}}, "logit_bias", "token id"),
    (PLAIN, {"logit_bias": {"999999": 1}}, "logit_bias", "does not exist"),
    (PLAIN, {"logit_bias": {"1": 101}}, None, "logit_bias"),
    (PLAIN, {"logprobs": 21}, "logprobs", "must lie in"),
    (PLAIN, {"logprobs": -1}, "logprobs", "must lie in"),
    (PLAIN, {"prompt_logprobs": -1}, "prompt_logprobs", "must lie in"),
    (PLAIN, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    (PLAIN, {"stream_options": {"include_usage": True}}, "stream_options", "stream: true"),
    (PLAIN, {"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
    (PLAIN, {"suffix": "end"}, "suffix", "not supported"),
    (PLAIN, {"best_of": 2}, "best_of", "not supported"),
    (PLAIN, {"use_beam_search": True}, "use_beam_search", "not supported"),
    (PLAIN, {"temprature": 1}, "temprature", "unknown field"),
    (PLAIN, {"prompt": "", "add_special_tokens": False}, "prompt", "empty"),
    (PLAIN, {"prompt": []}, "prompt", "empty"),
    (PLAIN, {"prompt": [[]]}, "prompt", "empty"),
    (PLAIN, {"prompt": ["a", 1]}, "prompt", "must be a string"),
    (PLAIN, {"prompt": {"a": 1}}, "prompt", "must be a string"),
    (PLAIN, {"prompt": None}, "prompt", "must be a string"),
    (PLAIN, {"prompt": [1, True]}, "prompt", "must be a string"),
    (PLAIN, {"prompt": [1, 10**6]}, "prompt", "does not exist"),
    (PLAIN, {"prompt": [-1]}, "prompt", "does not exist"),
    (PLAIN, {"prompt": "x" * 600}, "prompt", "maximum context length is 512"),
    (PLAIN, {"prompt": "x" * 500, "max_tokens": 50}, "prompt", "max_tokens is 50"),
    (PLAIN, {"prompt": "x" * 400, "max_tokens": 50}, None, "KV blocks"),
    (CHAT, {"messages": []}, "messages", "at least 1"),
    (CHAT, {"messages": "hi"}, "messages", "valid list"),
    (CHAT, {"messages": [{"role": "user"}, 3]}, "messages.1", "valid dictionary"),
    (CHAT, {"messages": [{"content": "hi"}]}, "messages.0.role", "missing"),
    (CHAT, {"messages": [{"role": "", "content": "hi"}]}, "messages.0.role", "at least 1"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type", "text"),
    (CHAT, {"messages": [{"role": "assistant", "content": "hi"}]}, "messages", "start with a user"),
    (CHAT, {"messages": [{"role": "user", "content": "y" * 600}]}, "messages", "maximum context length"),
    (CHAT, {"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 50}, "top_logprobs", "must lie in"),
    (CHAT, {"logprobs": 3}, "logprobs", "boolean"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "not supported"),
    (CHAT, {"tool_choice": "required"}, "tool_choice", "not supported"),
    (CHAT, {"response_format": {"type": "json_schema"}}, "response_format", "not supported"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
    (CHAT, {"prompt": "hi"}, "prompt", "unknown field"),
    (CHAT, {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs", "chat_template"),
    ("/tokenize", {"messages": USER, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs", "self"),
    ("/tokenize", {"prompt": 5}, "prompt", "valid string"),
    ("/detokenize", {"tokens": [10**6]}, "tokens", "does not exist"),
    ("/detokenize", {"tokens": "abc"}, "tokens", "valid list"),
]


def body_for(path: str, fields: dict) -> dict:
    base = {CHAT: {"messages": USER}, PLAIN: {"prompt": "hi"}}.get(path, {})
    return base | fields


@pytest.mark.parametrize("path, fields, param, part", BAD_FIELDS, ids=lambda v: str(v)[:40])
def test_bad_field(served, path, fields, param, part):
    error = check_error(httpx.post(served.base_url + path, json=body_for(path, fields)), 400)
    assert error["param"] == param
    assert part in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_refused_streams_get_a_status_too(served, stream):
    """What only the engine can refuse comes before the first event, as a plain 400."""
    body = {"prompt": "x" * 400, "max_tokens": 50, "stream": stream}
    assert "KV blocks" in check_error(httpx.post(served.base_url + PLAIN, json=body), 400)["message"]
    check_serves(served)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"nonsense", b'"x"', b"\xff\xfe", b'{"prompt": "a"' + b"[" * 50_000, b"1" * 5000]
)
def test_broken_json(served, content):
    for path in (CHAT, PLAIN, "/tokenize", "/detokenize"):
        check_error(httpx.post(served.base_url + path, content=content), 400)
    check_serves(served)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"])
def test_numbers_that_are_none(served, field, value):
    content = f'{{"prompt": "hi", "{field}": {value}}}'
    assert check_error(httpx.post(served.base_url + PLAIN, content=content), 400)["param"] == field


@pytest.mark.parametrize(
    "path, content",
    [
        (PLAIN, '{"prompt": "\\ud800"}'),
        (PLAIN, '{"prompt": ["ok", "\\udc00"]}'),
        (PLAIN, '{"prompt": "hi", "stop": ["\\ud800"]}'),
        (CHAT, '{"messages": [{"role": "user", "content": "\\ud83d"}]}'),
        ("/tokenize", '{"prompt": "\\ud800"}'),
    ],
)
def test_half_a_surrogate_pair(served, path, content):
    assert "surrogate" in check_error(httpx.post(served.base_url + path, content=content), 400)["message"]


@pytest.mark.parametrize("name", ["nobody", "", "\u4f60\u597d"])
@pytest.mark.parametrize("path", [CHAT, PLAIN])
def test_unknown_model(served, path, name):
    error = check_error(httpx.post(served.base_url + path, json=body_for(path, {"model": name})), 404)
    assert error["code"] == "model_not_found" and "fake" in error["message"]


def test_unknown_address_and_method(served):
    check_error(httpx.get(served.base_url + "/v1/nothing"), 404)
    check_error(httpx.get(served.base_url + CHAT), 405)
    check_error(httpx.post(served.base_url + "/health"), 405)


@pytest.mark.parametrize("size", [150_000, 5_000_000])
def test_body_over_the_limit(served, size):
    error = check_error(httpx.post(served.base_url + PLAIN, json={"prompt": "x" * size}), 413)
    assert "100000 bytes" in error["message"]
    check_serves(served)


def test_a_bug_is_500_and_not_the_end(served, caplog):
    """An unexpected exception shows its type, not its details, and only its request suffers."""
    error = check_error(httpx.post(served.base_url + PLAIN, json={"prompt": "CRASH-ADD"}), 500)
    assert "ZeroDivisionError" in error["message"] and error["type"] == "server_error"
    check_serves(served)


def test_client_exceptions(served):
    with openai.OpenAI(base_url=served.base_url + "/v1", api_key="none", max_retries=0, timeout=30) as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model="fake", prompt="hi", temperature=-1)
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="hi")


def test_one_request_with_too_many_sequences():
    with serving(FakeEngine(), ServeSettings(max_inflight=4)) as served:
        error = check_error(httpx.post(served.base_url + PLAIN, json={"prompt": ["a", "b", "c"], "n": 2}), 400)
        assert "at most 4" in error["message"]
        check_serves(served)


def test_api_key():
    with serving(FakeEngine(), ServeSettings(api_keys=("secret", "schlüssel"))) as served:
        post = {"json": {"prompt": "hi", "max_tokens": 1}}
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer"},
        ):
            error = check_error(httpx.post(served.base_url + PLAIN, headers=headers, **post), 401)
            assert error["code"] == "invalid_api_key"
        assert httpx.get(served.base_url + "/v1/models").status_code == 401
        assert httpx.post(served.base_url + PLAIN, content=b"{").status_code == 401
        assert httpx.get(served.base_url + "/health").status_code == 200
        for key in ("secret", "schlüssel"):
            headers = {b"Authorization": b"Bearer " + key.encode()}
            assert httpx.post(served.base_url + PLAIN, headers=headers, **post).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=served.base_url + "/v1", api_key="no", max_retries=0, timeout=30).models.list()
        assert openai.OpenAI(base_url=served.base_url + "/v1", api_key="secret").models.list().data


def test_without_tokenizer_or_template():
    engine = FakeEngine()
    engine.tokenizer.has_chat_template = False
    with serving(engine) as served:
        assert (
            "chat template" in check_error(httpx.post(served.base_url + CHAT, json={"messages": USER}), 400)["message"]
        )
        engine.tokenizer = None
        for path, fields in ((CHAT, {}), (PLAIN, {}), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
            error = check_error(httpx.post(served.base_url + path, json=body_for(path, fields)), 400)
            assert "no tokenizer" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"port": 70000},
        {"port": -1},
        {"generation_defaults": "mine"},
        {"max_inflight": 0},
        {"max_body_bytes": 0},
        {"drain_timeout": -1},
        {"api_keys": ("",)},
        {"served_model_names": ("",)},
    ],
)
def test_bad_settings(fields):
    with pytest.raises(InputError):
        ServeSettings(**fields)
