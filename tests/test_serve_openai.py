"""The server as OpenAI's own client sees it, over a real socket, with an engine whose answers are known."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest
from fake_engine import BOS, FakeEngine
from serve_helpers import Served, serving

from surefoot.serve.settings import ServeSettings

REPLY = "You said: hi. 你好🙂"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served():
    settings = ServeSettings(served_model_names=("org/fake", "alias"))
    with serving(FakeEngine(generation_config={"temperature": 0.5, "top_k": 7}), settings) as s:
        yield s


@pytest.fixture(scope="module")
def client(served: Served):
    with openai.OpenAI(base_url=served.base_url + "/v1", api_key="none", max_retries=0, timeout=30) as c:
        yield c


def last_params(served: Served):
    return served.engine.added[-1][1]


def test_models(client):
    cards = client.models.list().data
    assert [c.id for c in cards] == ["org/fake", "alias"]
    card = client.models.retrieve("org/fake")
    extra = card.model_extra
    assert (extra["max_model_len"], extra["dtype"], extra["device"]) == (512, "float32", "cpu")
    assert extra["generation_defaults"]["temperature"] == 0.5
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat(client):
    answer = client.chat.completions.create(model="org/fake", messages=USER, temperature=0)
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.model == "org/fake" and answer.id.startswith("chatcmpl-")
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", REPLY, "stop")
    assert choice.logprobs is None
    # <bos> <|user|> h i <|assistant|> in, the reply's bytes and <eos> out
    reply_tokens = len(REPLY.encode()) + 1
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, reply_tokens)
    assert answer.usage.total_tokens == 5 + reply_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_chat_stream_has_the_shape_clients_expect(client):
    chunks = list(
        client.chat.completions.create(
            model="alias", messages=USER, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert len({c.id for c in chunks}) == 1 and {c.object for c in chunks} == {"chat.completion.chunk"}
    assert {c.model for c in chunks} == {"alias"}
    *body, usage = chunks
    assert (body[0].choices[0].delta.role, body[0].choices[0].delta.content) == ("assistant", "")
    assert all(c.choices[0].delta.role is None for c in body[1:])
    assert "".join(c.choices[0].delta.content or "" for c in body) == REPLY
    assert [c.choices[0].finish_reason for c in body] == [None] * (len(body) - 1) + ["stop"]
    assert all(c.usage is None for c in body)
    assert usage.choices == [] and usage.usage.completion_tokens == len(REPLY.encode()) + 1


def test_a_stream_counts_as_it_goes_where_that_is_asked_for(client):
    """vLLM's field, which load generators send: usage until now in every chunk."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    *body, last = client.chat.completions.create(
        model="alias", messages=USER, temperature=0, stream=True, stream_options=options
    )
    counts = [c.usage.completion_tokens for c in body]
    assert counts == sorted(counts) and counts[-1] == last.usage.completion_tokens == len(REPLY.encode()) + 1
    assert len(set(counts)) > 2 and {c.usage.prompt_tokens for c in body} == {5}


def test_stream_ends_with_done(served):
    body = {"model": "alias", "messages": USER, "max_tokens": 2, "stream": True, "temperature": 0}
    answer = httpx.post(served.base_url + "/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(e.startswith("data: {") for e in events[:-2])


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="alias", messages=USER, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 12 == answer.usage.completion_tokens
    first = content[0]
    assert (first.token, first.bytes, first.logprob) == ("Y", [89], pytest.approx(-0.6))
    assert [(t.token, t.logprob) for t in first.top_logprobs] == [
        ("Y", pytest.approx(-0.6)),
        ("Z", pytest.approx(-1.6)),
    ]


def test_chat_stream_logprobs_cover_every_token(client):
    want = client.chat.completions.create(model="alias", messages=USER, temperature=0, logprobs=True)
    chunks = client.chat.completions.create(model="alias", messages=USER, temperature=0, logprobs=True, stream=True)
    got = [t for c in chunks for t in (c.choices[0].logprobs.content if c.choices[0].logprobs else ())]
    assert got == want.choices[0].logprobs.content
    # a byte in the middle of a character has no text of its own, but its bytes add up
    assert any(t.token.startswith("bytes:\\x") for t in got)
    assert bytes(b for t in got[:-1] for b in t.bytes).decode() == REPLY


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_is_cut_and_never_shown(client, stream):
    answer = client.completions.create(
        model="alias", prompt="hi", temperature=0, max_tokens=60, stop=["id: h", "zzz"], stream=stream
    )
    if stream:
        chunks = list(answer)
        text, last = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0]
    else:
        text, last = answer.choices[0].text, answer.choices[0]
    assert (text, last.finish_reason) == ("You sa", "stop")
    assert last.model_extra["stop_reason"] == "id: h"


def test_n_choices_with_seed(client, served):
    def texts(**kwargs):
        answer = client.completions.create(model="alias", prompt="once", max_tokens=8, temperature=1.0, **kwargs)
        return [c.text for c in sorted(answer.choices, key=lambda c: c.index)]

    three = texts(n=3, seed=11)
    assert len(set(three)) == 3
    assert texts(n=3, seed=11) == three
    assert texts(n=1, seed=12) == three[1:2]
    assert texts(n=2) != texts(n=2)


def test_n_shares_the_prompt(client, served):
    before = len(served.engine.added)
    prompt = "a prompt that is longer than two pages of sixteen"
    answer = client.completions.create(model="alias", prompt=prompt, max_tokens=3, n=3, seed=1, logprobs=0, echo=True)
    assert [p.prompt_logprobs for _, p in served.engine.added[before:]] == [0, None, None]
    assert all(c.text.startswith(prompt) and len(c.text) == len(prompt) + 3 for c in answer.choices)
    # what was asked about the prompt was computed once and stands in every choice
    heads = [c.logprobs.token_logprobs[: len(prompt) + 1] for c in answer.choices]
    assert heads[0] == heads[1] == heads[2] and heads[0][0] is None
    assert answer.usage.prompt_tokens == len(prompt) + 1
    assert answer.usage.completion_tokens == 9
    # the two that followed found the prompt in the cache; the request as a whole computed it
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_n_streams_are_told_apart(client):
    texts, reasons = {}, {}
    want = client.chat.completions.create(model="alias", messages=USER, n=3, seed=5, max_tokens=9)
    for chunk in client.chat.completions.create(model="alias", messages=USER, n=3, seed=5, max_tokens=9, stream=True):
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            reasons[choice.index] = choice.finish_reason
    assert texts == {c.index: c.message.content for c in want.choices}
    assert reasons == dict.fromkeys(range(3), "length")


def test_second_request_hits_the_prefix_cache(client):
    prompt = "the same long prompt twice, longer than a page"
    used = [client.completions.create(model="alias", prompt=prompt, max_tokens=1).usage for _ in range(2)]
    assert [u.prompt_tokens_details.cached_tokens for u in used] == [0, 32]


@pytest.mark.parametrize(
    "prompt, echoes",
    [
        ("hi", ["hi"]),
        (["hi", "你好"], ["hi", "你好"]),
        ([BOS, 104, 105], ["hi"]),
        ([[104, 105], [106]], ["hi", "j"]),
    ],
)
def test_every_prompt_shape_and_echo(client, prompt, echoes):
    answer = client.completions.create(model="alias", prompt=prompt, max_tokens=4, temperature=0, echo=True)
    assert [c.text for c in answer.choices] == [e + "You " for e in echoes]
    assert [c.index for c in answer.choices] == list(range(len(echoes)))


def test_scoring_a_prompt(client):
    """echo, logprobs and max_tokens 0: how evaluation tools read log-likelihoods."""
    answer = client.completions.create(model="alias", prompt="h你i", max_tokens=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    lp = choice.logprobs
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == ("h你i", "length", 0)
    assert lp.tokens == ["<bos>", "h", "bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0", "i"]
    assert lp.text_offset == [0, 0, 1, 1, 1, 2]
    assert lp.token_logprobs[0] is None and lp.top_logprobs[0] is None
    assert lp.token_logprobs[1:] == pytest.approx([-(t % 7 + 1) / 10 for t in (104, 0xE4, 0xBD, 0xA0, 105)])
    for token, top in zip(lp.tokens[1:], lp.top_logprobs[1:]):
        assert len(top) == 2 and max(top, key=top.get) == token


def test_scoring_as_lm_eval_does_it(client):
    """Token ids, one generated token, greedy; the continuation's log-likelihood is token_logprobs[ctxlen:-1]."""
    ids = [BOS, *b"context and more"]
    answer = client.completions.create(model="alias", prompt=ids, max_tokens=1, temperature=0, echo=True, logprobs=1)
    lp = answer.choices[0].logprobs
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.top_logprobs) == len(ids) + 1
    assert lp.token_logprobs[9:-1] == pytest.approx([-(t % 7 + 1) / 10 for t in b"and more"])


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_echo_streamed_equals_whole(client, max_tokens):
    kwargs = {
        "model": "alias",
        "prompt": "h你i",
        "max_tokens": max_tokens,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }
    whole = client.completions.create(**kwargs).choices[0]
    chunks = [c.choices[0] for c in client.completions.create(**kwargs, stream=True)]
    assert "".join(c.text for c in chunks) == whole.text
    for field in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [x for c in chunks for x in getattr(c.logprobs, field)] == getattr(whole.logprobs, field)
    assert chunks[-1].finish_reason == whole.finish_reason == "length"


def test_vllm_extensions(client, served):
    answer = client.completions.create(
        model="alias",
        prompt="hi",
        max_tokens=2,
        temperature=0,
        logprobs=1,
        extra_body={
            "prompt_logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
        },
    )
    extra = answer.choices[0].model_extra
    assert (extra["prompt_token_ids"], extra["token_ids"]) == ([104, 105], list(b"Yo"))
    assert extra["prompt_logprobs"] == [None, {"105": {"logprob": -0.1, "rank": 1, "decoded_token": "i"}}]
    assert answer.choices[0].logprobs.tokens == ["token_id:89", "token_id:111"]
    chat = client.chat.completions.create(
        model="alias",
        messages=USER,
        max_tokens=1,
        temperature=0,
        extra_body={"prompt_logprobs": 0, "return_token_ids": True, "chat_template_kwargs": {"preamble": "!"}},
    )
    assert chat.model_extra["prompt_token_ids"] == [256, ord("!"), 259, 104, 105, 260]
    assert len(chat.model_extra["prompt_logprobs"]) == 6
    assert chat.choices[0].model_extra["token_ids"] == [89]


def test_return_token_ids_streamed(client):
    kwargs = {
        "model": "alias",
        "max_tokens": 3,
        "temperature": 0,
        "stream": True,
        "extra_body": {"return_token_ids": True},
    }
    chunks = [c.choices[0].model_extra for c in client.completions.create(prompt="hi", **kwargs)]
    assert chunks[0]["prompt_token_ids"] == [BOS, 104, 105]
    assert [t for c in chunks for t in c["token_ids"]] == list(b"You")
    chunks = [c.choices[0].model_extra for c in client.chat.completions.create(messages=USER, **kwargs)]
    assert chunks[0]["prompt_token_ids"] == [256, 259, 104, 105, 260]
    assert [t for c in chunks for t in c.get("token_ids", ())] == list(b"You")


def test_sampling_fields_reach_the_engine(client, served):
    client.chat.completions.create(
        model="alias",
        messages=USER,
        max_completion_tokens=5,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": 3},
        seed=9,
        stop="END",
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "stop_token_ids": [66],
            "ignore_eos": True,
            "min_tokens": 2,
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
        },
    )
    p = last_params(served)
    assert (p.max_tokens, p.min_tokens, p.temperature, p.top_p, p.top_k, p.min_p) == (5, 2, 0.7, 0.9, 40, 0.05)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.1, 0.5, -0.5)
    assert (p.logit_bias, p.seed, p.stop, p.stop_token_ids) == ({65: 3}, 9, ("END",), (66,))
    assert p.ignore_eos and p.include_stop_str_in_output and not p.skip_special_tokens
    assert p.logprobs is None and p.prompt_logprobs is None


def test_defaults_come_from_the_model_and_then_from_openai(client, served):
    client.completions.create(model="alias", prompt="hi")
    p = last_params(served)
    assert (p.temperature, p.top_k, p.top_p, p.max_tokens) == (0.5, 7, 1.0, 16)
    client.chat.completions.create(model="alias", messages=USER, temperature=0)
    assert last_params(served).max_tokens == 512 - 5


def test_harmless_fields_and_neutral_values_pass(client):
    client.chat.completions.create(
        model="alias",
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        max_tokens=1,
        user="me",
        metadata={"a": "b"},
        store=False,
        response_format={"type": "text"},
        tools=[],
        extra_body={"suffix": None},
    )


def test_history_with_tool_calls_is_rendered(client):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    history = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "user", "content": "so?"}]
    answer = client.chat.completions.create(model="alias", messages=history, max_tokens=64, temperature=0)
    assert answer.choices[0].message.content.startswith("You said: hiso?")


def test_tokenize_round_trip(served):
    def post(path, **body):
        answer = httpx.post(served.base_url + path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    text = "naïve 你好 🙂<eos>"
    ids = post("/tokenize", prompt=text)
    assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == 512 and ids["token_strs"] is None
    assert ids["tokens"][0] == BOS
    bare = post("/tokenize", model="alias", prompt=text, add_special_tokens=False, return_token_strs=True)
    assert bare["tokens"] == ids["tokens"][1:] and bare["token_strs"][-1] == "<eos>"
    assert post("/detokenize", tokens=bare["tokens"]) == {"prompt": text}
    chat = post("/tokenize", messages=USER)
    assert chat["tokens"] == [256, 259, 104, 105, 260]
    assert post("/tokenize", messages=USER, add_generation_prompt=False)["tokens"] == [256, 259, 104, 105]
    assert post("/tokenize", prompt="", add_special_tokens=False)["tokens"] == []


def test_health_version_metrics(served):
    assert httpx.get(served.base_url + "/health").status_code == 200
    assert httpx.get(served.base_url + "/version").json()["version"]
    assert "surefoot_free_blocks 1024\n" in httpx.get(served.base_url + "/metrics").text


def test_async_client_and_32_streams(served):
    """Every stream gets its own text, whole, whatever runs beside it."""

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.chat.completions.create(
            model="alias", messages=[{"role": "user", "content": f"no. {i}"}], temperature=0, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=served.base_url + "/v1", api_key="none", max_retries=0, timeout=30
        ) as client:
            return await asyncio.gather(*(one(client, i) for i in range(32)))

    assert asyncio.run(run()) == [f"You said: no. {i}. 你好🙂" for i in range(32)]
    assert served.engine.free_blocks == served.engine.num_blocks
    assert served.worker.num_inflight == 0
