"""The server over the real engine: a canary's known answers, batched, streamed, scored, and pages that come back."""

from __future__ import annotations

import asyncio
import math

import httpx
import openai
import pytest
from serve_helpers import serving, until

from surefoot import canaries
from surefoot.core.config import EngineConfig
from surefoot.serve.settings import ServeSettings

pytest.importorskip("surefoot.engine.engine")


@pytest.fixture(scope="module", params=canaries.CANARIES)
def served(request):
    from surefoot.engine.engine import Engine

    if not (canaries.path(request.param) / "model.safetensors").is_file():
        pytest.skip(f"{request.param} is not trained yet")
    config = EngineConfig(dtype="float32", max_num_seqs=8, num_threads=1)
    with serving(lambda: Engine.load(request.param, config), ServeSettings(drain_timeout=1.0)) as s:
        yield s


@pytest.fixture(scope="module")
def client(served):
    with openai.OpenAI(base_url=served.base_url + "/v1", api_key="none", max_retries=0, timeout=60) as c:
        yield c


def chats(served) -> list[dict]:
    return [a for a in canaries.known_answers(served.engine.info.model) if "messages" in a][:12]


def test_known_answers(served, client):
    for known in chats(served)[:4]:
        answer = client.chat.completions.create(
            model=served.engine.info.model, messages=known["messages"], temperature=0, max_tokens=256
        )
        assert answer.choices[0].message.content == known["answer"]
        assert answer.choices[0].finish_reason == "stop"


def test_known_answers_streamed_side_by_side(served):
    """More streams than the engine runs at once; each gets its own answer, character for character."""

    async def one(client: openai.AsyncOpenAI, messages: list) -> str:
        stream = await client.chat.completions.create(
            model=served.engine.info.model, messages=messages, temperature=0, stream=True, max_tokens=256
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

    async def run(questions: list[dict]) -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.base_url + "/v1", api_key="none", timeout=60) as client:
            return await asyncio.gather(*(one(client, q["messages"]) for q in questions))

    questions = chats(served)
    assert asyncio.run(run(questions)) == [q["answer"] for q in questions]


def test_scores_add_up(served, client):
    """Prompt scoring gives the probabilities that generating the same tokens gave."""
    kwargs = {
        "model": served.engine.info.model,
        "temperature": 0,
        "logprobs": 3,
        "extra_body": {"return_token_ids": True},
    }
    made = client.completions.create(prompt="The capital of France", max_tokens=6, **kwargs).choices[0]
    ids = made.model_extra["prompt_token_ids"] + made.model_extra["token_ids"]
    scored = client.completions.create(prompt=ids, max_tokens=0, echo=True, **kwargs).choices[0]
    n = len(made.model_extra["token_ids"])
    assert scored.logprobs.tokens[-n:] == made.logprobs.tokens
    assert scored.logprobs.token_logprobs[-n:] == pytest.approx(made.logprobs.token_logprobs, abs=1e-3)
    assert scored.logprobs.token_logprobs[0] is None
    for top, token in zip(made.logprobs.top_logprobs, made.logprobs.tokens):
        assert max(top, key=top.get) == token and sum(map(math.exp, top.values())) <= 1.0001


def test_offsets_point_into_the_text(served, client):
    text = "Hello 你好 world"
    lp = client.completions.create(model=served.engine.info.model, prompt=text, max_tokens=0, echo=True, logprobs=0)
    choice = lp.choices[0]
    assert choice.text == text
    for token, start in zip(choice.logprobs.tokens, choice.logprobs.text_offset):
        if not token.startswith(("bytes:", "<|")):
            assert text.startswith(token, start)


def test_seed_makes_sampling_repeatable(served, client):
    def texts():
        answer = client.completions.create(
            model=served.engine.info.model, prompt="Once", temperature=1.0, seed=5, n=3, max_tokens=12
        )
        return [c.text for c in answer.choices]

    first = texts()
    assert texts() == first


def test_tokenize_round_trip(served):
    text = "naïve 你好, 🙂 world"
    ids = httpx.post(served.base_url + "/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert httpx.post(served.base_url + "/detokenize", json={"tokens": ids}).json() == {"prompt": text}


def test_bad_requests_leave_the_engine_alone(served, client):
    model = served.engine.info.model
    for fields in ({"prompt": [10**7]}, {"prompt": [1] * (served.engine.max_model_len + 1)}, {"temperature": 500}):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": model, "prompt": "hi", **fields})
    known = chats(served)[0]
    answer = client.chat.completions.create(model=model, messages=known["messages"], temperature=0)
    assert answer.choices[0].message.content == known["answer"]


def test_client_that_leaves_frees_its_pages(served):
    def occupied() -> tuple:
        stats = served.engine.stats()
        return stats["running"], stats["waiting"]

    body = {"prompt": "Once", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": 3}
    with httpx.stream("POST", served.base_url + "/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
    until(lambda: occupied() == (0, 0), "pages free")
    assert served.worker.num_inflight == 0


def test_failed_forward_leaves_the_engine_whole(served, client, monkeypatch):
    """The pages and slots of the failed requests come back, and the next answer is right."""
    engine, known = served.engine, chats(served)[0]
    run, free = engine.runner.run, engine.stats()["free_blocks"]
    failures = iter([True])

    def fail_once(step):
        if next(failures, False):
            raise RuntimeError("a kernel failed")
        return run(step)

    monkeypatch.setattr(engine.runner, "run", fail_once)
    ask = {"model": engine.info.model, "messages": known["messages"], "temperature": 0, "max_tokens": 256}
    with pytest.raises(openai.InternalServerError, match="computing this request failed"):
        client.chat.completions.create(**ask)
    assert client.chat.completions.create(**ask).choices[0].message.content == known["answer"]
    until(lambda: engine.stats()["free_blocks"] == free and not engine.has_unfinished(), "everything is free")
