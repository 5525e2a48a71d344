"""Servers as black boxes: what is found out about them, what can be proven, what is refuted, and how they may fail."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import pytest
import torch
from http_proxy import Refuse, Rules, proxied

from surefoot import canaries
from surefoot.backends.http import Abilities, EndpointError, HttpBackend
from surefoot.backends.http_logprobs import TokenNames, output_entries, prompt_entries
from surefoot.backends.transformers import TransformersBackend
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.outputs import TokenLogprob
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine
from surefoot.serve.inprocess import serving
from surefoot.serve.settings import ServeSettings
from surefoot.verify import gate, run
from surefoot.verify.endpoint import verify_endpoint
from surefoot.verify.shapes import VerifySettings
from surefoot.verify.told import Told
from surefoot.weights.tokenizer import Tokenizer

MODEL = "canary-llama"
LOGPROB_FIELDS = ("prompt_logprobs", "logprobs", "echo", "top_logprobs", "return_tokens_as_token_ids")


@pytest.fixture(scope="module")
def engine() -> Engine:
    # Tests exchange its weights, which a recorded step does not see.
    return Engine.load(MODEL, EngineConfig(dtype="float32", max_num_seqs=16, graph="off"))


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine) as address:
        yield address


@pytest.fixture(scope="module")
def reference() -> TransformersBackend:
    return TransformersBackend(MODEL, EngineConfig(dtype="float32"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> VerifySettings:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    questions = ("请介绍一下你自己", "1+2+3+4+5等于多少?", "What is the capital of France?")
    lines = [json.dumps({"messages": [{"role": "user", "content": q}]}) for q in questions]
    path.write_text("\n".join(lines), encoding="utf-8")
    return VerifySettings(MODEL, dtype="float32", prompts=path, continuation_tokens=16, long_tokens=64)


def names() -> TokenNames:
    return TokenNames(Tokenizer.load(canaries.path(MODEL)))


def examine(reference, url, settings, **more):
    backend = HttpBackend(url, **more)
    try:
        found = verify_endpoint(reference, backend, settings)
    finally:
        backend.close()
    return backend, found, {f.check: f for f in found}


def verdict(found) -> str:
    return gate.decide({"endpoint": {"findings": [f.as_dict() for f in found]}})[0]


# ---- our own server


def test_abilities_of_our_own_server(url):
    backend = HttpBackend(url, names=names())
    can = backend.abilities
    assert can == Abilities(
        token_ids=True,
        text=True,
        messages=True,
        prompt={"prompt_logprobs": 20},
        output={"logprobs": 20, "return_tokens_as_token_ids": True},
        chat={"logprobs": True, "top_logprobs": 20},
        return_token_ids=True,
        tokenize=True,
        tokenize_chat=True,
    )
    assert backend.model == MODEL
    assert backend.info()["dtype"] == "float32"
    backend.close()


def test_scores_and_answers_are_the_engines(url, engine):
    prompts = [[5, 6, 7, 8, 9], [100], list(range(40, 60))]
    params = SamplingParams(max_tokens=5, logprobs=20)
    exact = fresh()
    backend = HttpBackend(url)
    for concurrency in (1, 3):
        for got, want in zip(backend.generate(prompts, params, concurrency), exact.generate(prompts, params)):
            assert got.token_ids == want.token_ids
            assert got.logprobs[0].logprob == pytest.approx(want.logprobs[0].logprob, abs=1e-4)
    for scores, logits in zip(backend.score_logprobs(prompts), exact.score(prompts)):
        assert scores.entries[0] is None
        for entry, row in zip(scores.entries[1:], logits.log_softmax(-1)):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
            assert entry.rank == 1 + int((row > row[entry.token_id]).sum())
            assert [t for t, _ in entry.top[:2]] == row.topk(2).indices.tolist()
    backend.close()


def fresh() -> Engine:
    return Engine.load(MODEL, EngineConfig(dtype="float32"))


def test_proof_over_http_gives_the_verdict_of_the_proof_in_process(url, settings):
    small = replace(settings, skip_parity=True)
    inside, outside = run.prove(small), run.prove(replace(small, url=url))
    assert (inside.verdict, outside.verdict) == ("proven", "proven")
    ours, theirs = (p.finding("logits").details["kl"]["mean"] for p in (inside, outside))
    assert ours < 1e-9 and theirs < 1e-9


def test_findings_of_our_own_server(url, reference, settings):
    _, found, by_check = examine(reference, url, settings)
    assert verdict(found) == "proven"
    assert by_check["template"].summary == "3 chats have the same token ids"
    assert by_check["logits"].details["source"] == "log-probabilities of prompts"
    assert by_check["sampler"].status == "pass"
    for check in ("weights", "config", "layers", "head"):
        assert by_check[check].status == "not_possible"
    parity = {f.details.get("path"): f.status for f in found if f.check == "parity"}
    passed = {f"{n} requests at a time": "pass" for n in (1, 8, 32)}
    assert parity == {"engine paths": "not_possible"} | passed


@pytest.mark.parametrize("where", ["norm", "rope"])
def test_a_wrong_model_behind_the_server_is_refuted(url, engine, reference, settings, where):
    model = engine.model.model
    if where == "norm":
        fault = changed(model.layers[2].input_layernorm, "eps", model.layers[2].input_layernorm.eps * 300)
    else:
        fault = changed(model.rotary_emb, "inv_freq", model.rotary_emb.inv_freq * 1.02)
    with fault:
        _, found, by_check = examine(reference, url, settings)
    assert verdict(found) == "refuted"
    assert by_check["logits"].status == "fail"
    assert by_check["parity"].status == "not_reached"


@contextlib.contextmanager
def changed(module, name, value):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def test_the_logits_are_judged_again_from_their_raw_numbers(url, reference, settings):
    _, found, by_check = examine(reference, url, settings)
    evidence = {"endpoint": {"findings": [f.as_dict() for f in found]}}
    raw = next(f for f in evidence["endpoint"]["findings"] if f["check"] == "logits")["details"]["raw"]
    raw["run"]["worst"], raw["run"]["err"] = ({"n": p["n"], "f4": shifted(p)} for p in (raw["run"]["worst"],) * 2)
    assert gate.decide(evidence)[0] == "refuted"
    assert by_check["logits"].status == "pass"


def shifted(packed) -> str:
    from surefoot.verify.pack import pack, unpack

    values = unpack(packed)
    values[3] += 1.0
    return pack(values)["f4"]


# ---- servers that can do less, or do something else


def no_prompt_logprobs(path, body):
    if "prompt_logprobs" in body:
        raise Refuse("unknown field prompt_logprobs")


def text_only(path, body):
    if isinstance(body.get("prompt"), list):
        raise Refuse("prompt must be a string")
    for name in ("prompt_logprobs", "echo", "return_token_ids", "return_tokens_as_token_ids"):
        if name in body:
            raise Refuse(f"unknown field {name}")


def silently_deaf(path, body):
    for name in (*LOGPROB_FIELDS, "return_token_ids"):
        body.pop(name, None)


def test_echo_serves_where_prompt_logprobs_is_unknown(url, reference, settings):
    with proxied(url, Rules(no_prompt_logprobs)) as less:
        backend, found, _ = examine(reference, less, replace(settings, skip_parity=True))
    assert backend.abilities.prompt == {"echo": True, "logprobs": 20, "return_tokens_as_token_ids": True}
    assert verdict(found) == "proven"


def test_answers_serve_where_prompts_are_not_scored(url, reference, settings):
    rules = Rules(text_only, routes=("/v1/models", "/v1/completions", "/v1/chat/completions"))
    longer = replace(settings, prompts=None)
    with proxied(url, rules) as less:
        backend, found, by_check = examine(reference, less, longer)
    assert not backend.abilities.token_ids and backend.abilities.prompt is None
    assert by_check["template"].summary == "5 chats have as many tokens (ids are not shown)"
    assert by_check["logits"].details["source"] == "log-probabilities of the server's own answers"
    assert verdict(found) == "proven"
    assert [f.status for f in found if f.check == "parity"] == ["not_possible", "pass", "pass", "pass"]


def test_without_logprobs_nothing_is_proven_and_the_line_says_so(url, reference, settings):
    with proxied(url, Rules(silently_deaf)) as less:
        _, found, by_check = examine(reference, less, replace(settings, skip_parity=True))
    assert verdict(found) == "undecided"
    assert by_check["logits"].status == "not_possible"
    assert "gives no log-probabilities" in by_check["logits"].summary
    assert "greedy tokens are the reference's own choices" in by_check["logits"].summary


def test_without_logprobs_another_answer_is_still_refuted(url, engine, reference, settings):
    layer = engine.model.model.layers[0].input_layernorm
    with proxied(url, Rules(silently_deaf)) as less, changed(layer, "scale", layer.scale * 0.3):
        _, found, by_check = examine(reference, less, settings)
    assert verdict(found) == "refuted"
    assert "the reference would not give" in by_check["logits"].summary


def test_the_right_text_proves_nothing(url, engine, reference, settings):
    """Logits off by 7, and the same answers: only log-probabilities tell."""
    layer = engine.model.model.layers[1].input_layernorm
    with changed(layer, "scale", -layer.scale):
        with proxied(url, Rules(silently_deaf)) as less:
            _, unseen, _ = examine(reference, less, replace(settings, skip_parity=True))
        _, seen, _ = examine(reference, url, settings)
    assert (verdict(unseen), verdict(seen)) == ("undecided", "refuted")


def test_another_template_is_found_by_its_tokens(url, reference, settings):
    def double_bos(path, body, answer):
        if path == "/tokenize" and "messages" in body:
            answer["tokens"] = [answer["tokens"][0], *answer["tokens"]]

    with proxied(url, Rules(after=double_bos)) as other:
        _, found, by_check = examine(reference, other, settings)
    assert verdict(found) == "refuted"
    assert by_check["template"].status == "fail"
    assert "at token 1" in by_check["template"].summary
    assert by_check["logits"].status == "not_reached"


def test_a_template_that_can_only_be_counted(url, reference, settings):
    def one_more(path, body, answer):
        if path == "/v1/chat/completions":
            answer["usage"]["prompt_tokens"] += 1

    rules = Rules(silently_deaf, one_more, routes=("/v1/models", "/v1/completions", "/v1/chat/completions"))
    with proxied(url, rules) as other:
        _, _, by_check = examine(reference, other, settings)
    assert by_check["template"].status == "fail"
    assert "tokens instead of" in by_check["template"].summary


def test_sampling_that_nobody_asked_for(url, reference, settings):
    def hot(path, body):
        body |= {"temperature": 1.5} if "prompt_logprobs" not in body and body.get("max_tokens", 0) > 8 else {}

    with proxied(url, Rules(hot)) as other:
        _, _, by_check = examine(reference, other, settings)
    assert by_check["logits"].status == "pass"
    assert by_check["sampler"].status == "fail"


def test_a_penalty_that_nobody_asked_for(url, reference, settings):
    with proxied(url, Rules(lambda path, body: body.update(repetition_penalty=1.8))) as other:
        _, _, by_check = examine(reference, other, settings)
    assert by_check["sampler"].status == "fail"
    assert "rank" in by_check["sampler"].summary


def test_answers_that_change_under_load(url, reference, settings):
    import threading

    busy, lock = [0], threading.Lock()

    def count(path, body):
        with lock:
            busy[0] += 1
        time.sleep(0.02)

    def spoil(path, body, answer):
        with lock:
            crowd, busy[0] = busy[0], busy[0] - 1
        if crowd > 4 and path == "/v1/completions":
            answer["choices"][0]["token_ids"][0] ^= 1

    with proxied(url, Rules(count, spoil)) as other:
        _, found, _ = examine(reference, other, settings)
    outcome = {f.details.get("path"): f.status for f in found if f.check == "parity"}
    assert outcome["1 requests at a time"] == "pass"
    assert outcome["32 requests at a time"] == "fail"


# ---- servers that fail


def test_a_server_that_dies_midway_leaves_what_was_found(url, reference, settings, tmp_path):
    rules = Rules(lives=24)
    with proxied(url, rules) as mortal, pytest.raises(EndpointError, match="during the check of") as death:
        examine(reference, mortal, settings)
    found = death.value.findings
    assert "\n" not in str(death.value)
    assert found[0].check == "template" and found[0].status == "pass"
    assert found[-1].status == "undecided" and "not finished" in found[-1].summary
    assert verdict(found) == "undecided"

    partial = tmp_path / "proof.partial.json"
    with proxied(url, Rules(lives=24)) as mortal, pytest.raises(EndpointError):
        run.prove(replace(settings, url=mortal), partial=partial)
    assert '"partial": true' in partial.read_text(encoding="utf-8")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_nobody_there():
    with pytest.raises(EndpointError, match="cannot reach http://127.0.0.1:.* is the server running") as error:
        HttpBackend(f"http://127.0.0.1:{free_port()}/v1/")
    assert "\n" not in str(error.value)


def test_no_url_at_all():
    with pytest.raises(InputError, match="is no URL"):
        HttpBackend("localhost:8000")


def test_the_wrong_model_name(url):
    with pytest.raises(InputError, match="does not serve 'other': it has canary-llama"):
        HttpBackend(url, "other")


def test_the_api_key():
    with serving(fresh(), ServeSettings(api_keys=("secret",))) as address:
        with pytest.raises(InputError, match="--api-key"):
            HttpBackend(address)
        assert HttpBackend(address, api_key="secret").abilities.prompt


def test_no_openai_server():
    def nonsense(path, body, answer):
        answer.clear()

    with serving(fresh()) as address, proxied(address, Rules(after=nonsense)) as other:
        with pytest.raises(EndpointError, match="names no model"):
            HttpBackend(other)
        backend = HttpBackend(other, MODEL)
        with pytest.raises(EndpointError, match="is it an OpenAI-compatible server"):
            backend.ask("Hi", 1)


def test_logits_and_activations_are_refused_in_one_line(url):
    backend = HttpBackend(url)
    for call in (lambda: backend.score([[1]]), lambda: backend.capture([1])):
        with pytest.raises(InputError) as error:
            call()
        assert "\n" not in str(error.value)


# ---- shapes of log-probabilities


def test_prompt_entries_of_vllm():
    row = {"7": {"logprob": -2.0, "rank": 40, "decoded_token": "x"}, "3": {"logprob": -0.1, "rank": 1}}
    body = {"choices": [{"text": "", "prompt_logprobs": [None, row]}]}
    (none, entry) = prompt_entries(body, [1, 7], TokenNames(None))
    assert none is None
    assert entry == TokenLogprob(7, -2.0, 40, ((3, -0.1), (7, -2.0)))
    assert prompt_entries(body, [1, 8], TokenNames(None)) is None, "the table is about another token"
    assert prompt_entries(body, [1, 7, 9], TokenNames(None)) is None


def test_prompt_entries_of_echo():
    lists = {
        "tokens": ["token_id:1", "token_id:7", "token_id:9"],
        "token_logprobs": [None, -9999.0, -1.0],
        "top_logprobs": [None, {"token_id:3": -0.5}, {"token_id:9": -1.0}],
    }
    body = {"choices": [{"text": "", "logprobs": lists}]}
    entries = prompt_entries(body, [1, 7], TokenNames(None))
    assert entries == [None, TokenLogprob(7, float("-inf"), 0, ((3, -0.5),))]
    assert prompt_entries(body, [1, 8], TokenNames(None)) is None, "not the prompt that was asked about"
    assert prompt_entries({"choices": [{"logprobs": None}]}, [1, 7], TokenNames(None)) is None
    assert prompt_entries({"choices": [{"logprobs": {"token_logprobs": [-1.0]}}]}, [1, 7], TokenNames(None)) is None


def test_output_entries_by_text_bytes_and_id():
    known = names()
    token = known.tokenizer.encode(" Paris", add_special_tokens=False)[0]
    text = known.tokenizer.token_bytes(token)
    for item in (
        {"token": text.decode(), "logprob": -0.5},
        {"token": "\ufffd", "bytes": list(text), "logprob": -0.5},
        {"token": "?", "id": token, "logprob": -0.5},
        {"token": f"token_id:{token}", "logprob": -0.5},
    ):
        (entry,) = output_entries({"content": [item | {"top_logprobs": [item]}]}, known, " Paris")
        assert entry == TokenLogprob(token, -0.5, 1, ((token, -0.5),))
    assert output_entries({"content": [{"token": "no such token", "logprob": -0.5}]}, known, "x") is None
    assert output_entries({"content": []}, known, "") is None


def test_output_entries_that_name_another_token_are_read_by_the_text():
    known = names()
    paris, other = (known.tokenizer.encode(t, add_special_tokens=False)[0] for t in (" Paris", "ow"))
    tops = [{"id": other, "token": "ow", "logprob": -12.0}, {"id": paris, "token": " Paris", "logprob": 0.0}]
    told = {"content": [{"id": other, "token": "ow", "logprob": -12.0, "top_logprobs": tops}]}
    (entry,) = output_entries(told, known, "Paris")
    assert (entry.token_id, entry.logprob, entry.rank) == (paris, 0.0, 1)
    assert output_entries(told, known, "Berlin") is None


def test_rows_of_what_was_told_see_a_single_wrong_value_and_a_shift():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    exact = logits.log_softmax(-1)

    def entry(row, shift=0.0):
        top = tuple((int(i), float(v) + shift) for v, i in zip(*row.topk(5)))
        return TokenLogprob(top[0][0], top[0][1], 1, top)

    ids = [0] + [int(row.argmax()) for row in exact[:3]]
    right = Told(ids, [None] + [entry(row) for row in exact[:3]])
    shifted_one = Told(ids, [None, entry(exact[0]), entry(exact[1], 0.3), entry(exact[2])])
    assert right.places == [1, 2, 3]
    assert right.rows(right.pick(logits), right.values)["err"].max() < 1e-6
    errors = shifted_one.rows(shifted_one.pick(logits), shifted_one.values)["err"]
    assert errors[1] > 0.05 and errors[0] < 1e-6 and errors[2] < 1e-6


# ---- other people's servers


@contextlib.contextmanager
def foreign(command: list[str], address: str):
    """A server of somebody else as a process of its own; the test is skipped if it does not come up."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if process.poll() is not None:
                pytest.skip(f"{command[2]} does not start here: {process.stdout.read().strip().splitlines()[-1:]}")
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{address}/health", timeout=2)
                break
            time.sleep(0.3)
        else:
            pytest.skip(f"{command[2]} did not come up in two minutes")
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed (pip install mlx-lm[cpu])"
)
def test_mlx_lm_is_proven(reference, settings):
    """Another engine altogether, in bf16; it scores no prompts but gives log-probabilities of its answers.

    Without parity: mlx-lm 0.32 sometimes drops or never answers some of 32 requests that come at once.
    """
    port, folder = free_port(), str(canaries.path(MODEL))
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", folder, "--port", str(port)]
    longer = replace(settings, dtype="bfloat16", prompts=None, skip_parity=True)
    with foreign(command, address):
        _, found, by_check = examine(reference, address, longer, model=folder)
    assert by_check["logits"].details["source"] == "log-probabilities of the server's own answers"
    assert verdict(found) == "proven"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers serve needs accelerate")
def test_transformers_serve_is_not_refuted_and_not_proven(reference, settings):
    """It takes no token ids and gives no log-probabilities (transformers 5.23): greedy text is all there is."""
    port, folder = free_port(), str(canaries.path(MODEL))
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu"]
    short = replace(settings, dtype="bfloat16", continuation_tokens=8, skip_parity=True)
    with foreign([*command, "--port", str(port)], address):
        backend, found, by_check = examine(reference, address, short, model=folder)
    assert not backend.abilities.token_ids and backend.abilities.chat is None
    assert by_check["template"].status == by_check["sampler"].status == "pass"
    assert "are the reference's own choices" in by_check["logits"].summary
    assert verdict(found) == "undecided"
