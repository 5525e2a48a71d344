"""`surefoot compare`: how sides are written, checks and the jail, scores by hand and by a judge, run, screen."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from surefoot.bench.run import NamedProof
from surefoot.cli.main import run_cli
from surefoot.compare import checks, rubric, run, summary
from surefoot.compare.prompts import Prompt, built_in, data_file, read
from surefoot.compare.sides import Side, parse
from surefoot.core import confighash
from surefoot.core.errors import InputError

SHORT = ["--repeats", "1", "--max-tokens", "8"]

# ---- sides


def test_sides_are_models_settings_and_servers():
    plain, int8, served = parse(
        ["canary-llama", "hf:ORG/NAME:quant=w8a8,device=npu:0,threads=2,name=int8", "http://h:8000:model=m"]
    )
    assert (plain.name, plain.model, plain.backend) == ("canary-llama", "canary-llama", "native")
    assert (int8.name, int8.model) == ("int8", "hf:ORG/NAME")
    assert (int8.config.quant, int8.config.device, int8.config.num_threads) == ("w8a8", "npu:0", 2)
    assert not int8.config.enable_prefix_caching
    assert (served.url, served.model, served.backend) == ("http://h:8000", "m", "http")
    (vllm, _) = parse(["DIR:backend=vllm,device=npu,tensor_parallel_size=2,ray=true", "http://h:8000"])
    assert (vllm.vllm.tensor_parallel_size, vllm.vllm.ray, vllm.config.enable_prefix_caching) == (2, True, True)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["canary-llama"], "needs two sides"),
        (["canary-llama", "canary-llama"], "name=..."),
        (["a", "b:colour=red"], "unknown setting 'colour'"),
        (["a", "b:max_num_seqs=x"], "write a number"),
        (["a", "b:dtype=int3"], "unknown dtype"),
        (["a", "b:backend=onnx"], "choose native"),
        (["a", "b:tensor_parallel_size=2"], "belongs to --backend vllm"),
        (["a", "http://h:1:dtype=float16"], "has settings already"),
    ],
)
def test_a_side_that_cannot_be_is_one_line(texts, said):
    with pytest.raises(InputError, match=said) as caught:
        parse(texts)
    assert "\n" not in str(caught.value)


def test_a_side_survives_its_way_into_a_process():
    for side in parse(["m:graph=full,batch_buckets=1/2/4", "n:backend=vllm,vllm_seed=3"]):
        assert Side.from_dict(json.loads(json.dumps(side.as_dict()))) == side


# ---- prompts and checks


def test_the_built_in_set_is_complete():
    prompts = built_in()
    kinds = [(p.kind, p.text.isascii()) for p in prompts]
    assert kinds.count(("completion", True)) == 8
    assert kinds.count(("completion", False)) == 3
    assert [p.kind for p in prompts].count("question") == 5
    assert len({p.id for p in prompts}) == 16


def passed(check: dict, answer: str) -> bool | None:
    (result,) = checks.check(Prompt("x", "question", "?", (check,)), answer)
    return result["passed"]


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        ({"contains": ["北京"]}, "是北京。", "是上海。"),
        ({"contains": ["AI", "computer science"]}, " AI.", " said the captain"),
        ({"contains": ["Paris"]}, "It is paris!", "comparison"),
        ({"number": 15}, "1+2+3+4+5等于15。", "1+2+3+4+5等于16。"),
        ({"number": 15}, "答案是:15,公差为1", "150"),
        ({"number": 1500}, "= 1,500.0 m", "no"),
        ({"script": "han"}, "我是一个模型 (AI)", "I am a model"),
        ({"script": "latin"}, "I am", "我是"),
    ],
)
def test_known_answers(check, right, wrong):
    assert passed(check, right) is True
    assert passed(check, wrong) is False
    assert passed(check, "") is False


FIBONACCI = {
    "the n-th": "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a",
    "recursive from 1": "def f(n: int) -> int:\n    return n if n < 2 else f(n - 1) + f(n - 2)",
    "first n": "def fib(n):\n    s = [0, 1]\n    for _ in range(n):\n        s += [s[-1] + s[-2]]\n    return s[:n]",
    "generator": "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        yield a\n        a, b = b, a + b",
    "prints too": "def fib(n, m={}):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\nprint(fib(10))",
}


@pytest.mark.parametrize("code", FIBONACCI.values(), ids=FIBONACCI)
def test_right_code_runs(code):
    assert passed({"code": "fibonacci"}, f"好的:\n```python\n{code}\n```\n就是这样。")
    assert passed({"code": "fibonacci"}, code)


WRONG = {
    "a constant": ("def fib(n):\n    return 55", "AssertionError"),
    "another function": ("def fib(n):\n    return n * n", "AssertionError"),
    "no function": ("print(55)", "no function was defined"),
    "syntax": ("def fib(n: return", "SyntaxError"),
    "leaves before it is judged": ("import os\nos._exit(0)", "before it was judged"),
    "memory": ("x = 'a' * (3 << 30)", "MemoryError"),
    "network": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "PermissionError"),
    "a process": ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
    "a signal": ("import os\nos.kill(os.getppid(), 0)", "PermissionError"),
    "a file": ("open('left', 'w').write('x')", "PermissionError"),
}


@pytest.mark.parametrize(("code", "why"), WRONG.values(), ids=WRONG)
def test_wrong_and_forbidden_code_does_not_pass(code, why):
    (result,) = checks.check(Prompt("x", "question", "?", ({"code": "fibonacci"},)), f"```python\n{code}\n```")
    assert result["passed"] is False
    assert why in result["why"]


def test_endless_code_ends(monkeypatch):
    monkeypatch.setattr(checks, "WALL_SECONDS", 1.0)
    assert checks.run("while True: pass", data_file("fibonacci.py")) == {"passed": False, "why": "not done after 1 s"}


def test_code_is_not_run_when_it_must_not(tmp_path):
    prompt = Prompt("x", "question", "?", ({"code": "fibonacci"},))
    assert checks.check(prompt, "def f(n): ...", run_code=False)[0]["passed"] is None


def test_a_file_of_prompts(tmp_path):
    file = tmp_path / "p.json"
    file.write_text('[{"kind": "question", "text": "2+2?", "checks": [{"number": 4}]}]')
    assert read(file) == [Prompt("p1", "question", "2+2?", ({"number": 4},))]
    for wrong in ("[]", "{", '[{"kind": "x", "text": "a"}]', '[{"kind": "question", "text": ""}]',
                  '[{"kind": "question", "text": "a", "checks": [{"number": "4"}]}]',
                  '[{"kind": "question", "text": "a", "checks": [{"code": "quicksort"}]}]',
                  '[{"kind": "question", "text": "a", "id": "1"}, {"kind": "question", "text": "b", "id": "1"}]',
                  ):  # fmt: skip
        file.write_text(wrong)
        with pytest.raises(InputError):
            read(file)


# ---- scores

FOUR_FIVE = {"correctness": 4, "clarity": 5}
RUBRIC = {"correctness": "1: wrong. 5: right.", "clarity": "1: no. 5: yes."}


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ('{"correctness": 4, "clarity": 5}', FOUR_FIVE),
        ('<think>{"correctness": 1, "clarity": 1}</think>\n```json\n{"correctness": 4, "clarity": 5}\n```', FOUR_FIVE),
        ("The answer is great!", None),
        ('{"correctness": 6, "clarity": 5}', None),
        ('{"correctness": "4", "clarity": 5}', None),
        ('{"correctness": 4.5, "clarity": 5}', None),
        ('{"correctness": true, "clarity": 5}', None),
        ('{"correctness": 4}', None),
        ('{"correctness": 4, "clarity": 5} or {"correctness": 1, "clarity": 1}', None),
    ],
)  # fmt: skip
def test_a_judge_is_read_strictly(reply, scores):
    assert rubric.read_scores(reply, RUBRIC) == scores


class Judge(BaseHTTPRequestHandler):
    """Scores every second answer properly; the others it chats about."""

    count = 0

    def do_GET(self):
        self._send({"data": [{"id": "judge"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert "correctness" in asked["messages"][0]["content"]
        type(self).count += 1
        good = '{"correctness": 4, "completeness": 3, "clarity": 5, "language": 5}'
        self._send({"choices": [{"message": {"content": good if self.count % 2 else "Well done!"}}]})

    def _send(self, body):
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def judge_url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# ---- the run


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Two canaries and a side that does not exist, over three prompts."""
    folder = tmp_path_factory.mktemp("compare")
    asked = [p for p in built_in() if p.id in ("q3", "q5", "e1")]
    rows = [{"id": p.id, "kind": p.kind, "text": p.text, "checks": list(p.checks)} for p in asked]
    (folder / "prompts.json").write_text(json.dumps(rows))
    sides = ["canary-llama:threads=1", "canary-llama:quant=w8a8,name=int8,threads=1", "no-such-model"]
    words = ["--repeats", "2", "--prompts", str(folder / "prompts.json"), "-o", str(folder / "c.json")]
    assert run_cli(["compare", *sides, *words]) == 0
    return folder


def test_the_record_holds_everything(measured):
    record = json.loads((measured / "c.json").read_text())
    assert not record["partial"]
    first, int8, absent = record["sides"].values()
    for side in (first, int8):
        facts, numbers = side["facts"], side["summary"]
        assert facts["load_s"] > 0
        assert facts["memory"]["weight_bytes"] > 0
        assert facts["memory"]["peak_bytes"] > facts["memory"]["weight_bytes"]
        assert facts["template"]["sha256"]
        assert side["proof"]["status"] == "UNPROVEN"
        assert numbers["checks"] == {"passed": 3, "run": 3, "not_run": 0}
        assert numbers["seconds_per_token"] > 0
    assert int8["facts"]["identity"]["quant"]
    assert int8["facts"]["memory"]["weight_bytes"] < first["facts"]["memory"]["weight_bytes"]
    assert "no-such-model" in absent["error"]
    assert absent["summary"]["prompts"] == {}


def test_raw_answers_are_kept_with_what_was_sent(measured):
    answers = [json.loads(line) for line in (measured / "c.answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 * 3 * 2
    by_prompt = {a["prompt"]: a for a in answers}
    assert by_prompt["e1"]["sent"] == "The capital of France is"
    assert by_prompt["e1"]["template"] == "none"
    assert by_prompt["q3"]["template"] == "chat"
    assert "中国的首都是哪里?" in by_prompt["q3"]["sent"]
    assert by_prompt["q3"]["sent"] != "中国的首都是哪里?"
    record = json.loads((measured / "c.json").read_text())
    seconds = sum(a["seconds"] for a in answers if a["side"] == "int8")
    tokens = sum(a["tokens"] for a in answers if a["side"] == "int8")
    assert record["sides"]["int8"]["summary"]["seconds_per_token"] == pytest.approx(seconds / tokens)


def test_charts_are_pictures(measured):
    assert (measured / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (measured / "c.svg").read_text()


def test_the_screen_fits_and_says_what_failed(measured, capsys):
    assert run_cli(["compare", "--from", str(measured / "c.json"), "--no-charts"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) <= 40
    wanted = [
        "per question",
        "per token",
        "peak memory",
        "known answers",
        "3 of 3",
        "UNPROVEN",
        "failed: no-such-model",
    ]
    assert [text for text in wanted if text not in said] == []


def test_scores_by_hand(measured, capsys, tmp_path):
    again = ["compare", "--from", str(measured / "c.json"), "--no-charts", "--scores", str(tmp_path / "s.csv")]
    sheet = (measured / "c.scores.csv").read_text()
    filled = sheet.replace("int8,q3,correctness,", "int8,q3,correctness,4")
    (tmp_path / "s.csv").write_text(filled.replace("int8,q5,correctness,", "int8,q5,correctness,5"))
    assert run_cli(again) == 0
    assert "4.50 (n=2)" in capsys.readouterr().out
    six, unknown = sheet.replace("q3,correctness,", "q3,correctness,6"), filled.replace("int8,", "int9,")
    for wrong in (sheet, six, unknown, "a,b\n1,2\n"):
        (tmp_path / "s.csv").write_text(wrong)
        assert run_cli(again) == 2


def test_nonsense_of_a_judge_is_recorded_and_not_scored(measured, judge_url, capsys):
    assert run_cli(["compare", "--from", str(measured / "c.json"), "--judge", judge_url, "--no-charts"]) == 0
    record = json.loads((measured / "c.json").read_text())
    states = [s["status"] for s in record["scores"]]
    assert states.count("scored") == states.count("no score") == 3
    assert all(s["reply"] == "Well done!" for s in record["scores"] if s["status"] == "no score")
    assert all("scores" not in s for s in record["scores"] if s["status"] == "no score")
    assert record["judge"]["model"] == "judge"
    assert "not scored" in capsys.readouterr().out


def test_a_proof_of_the_same_configuration_is_found(measured):
    facts = json.loads((measured / "c.json").read_text())["sides"]["int8"]["facts"]
    proof = {"verdict": "proven", "target": facts["info"], "seal": "x" * 64, "settings": {"model": "canary-llama"}}
    proof["model"] = {"files_sha256": {"config.json": facts["identity"]["config_sha256"]}}
    assert confighash.of_proof(proof) == facts["identity"]
    other = proof | {"target": facts["info"] | {"dtype": "float32"}}
    state = run.proof_of(facts, [NamedProof(other, "other.json"), NamedProof(proof, "this.json")])
    assert (state.status, state.file) == ("PROVEN", "this.json")
    assert run.proof_of(facts, [NamedProof(other, "other.json")]).status == "UNPROVEN"
    assert run.proof_of(facts, [NamedProof(proof, "this.json", ["tampered"])]).status == "UNPROVEN"


def side(tokens: float, **more) -> dict:
    numbers = {"prompts": {"q": {}}, "tokens_per_answer": tokens, "cut_off": 0, "unstable": 0} | more
    facts = {"identity": {}, "template": {"name": "x", "sha256": "1"}, "load_s": 1.0, "info": {}, "vocab_size": 1}
    return {"facts": facts, "summary": numbers}


def test_answers_of_different_length_are_pointed_out():
    assert summary.cautions({"A": side(10), "B": side(12)}) == []
    (line,) = summary.cautions({"A": side(10), "B": side(31)})
    assert line.startswith("B answers 3.1 times as long as A: compare seconds per token")
    assert "cut off" in summary.cautions({"A": side(10), "B": side(10, cut_off=2)})[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["canary-llama"], "needs two sides"),
        (["canary-llama", "x", "-o", "out.txt"], "give a .json file"),
        (["canary-llama", "x", "--repeats", "0"], "repeats must be at least 1"),
        (["canary-llama", "x", "--judge", "http://127.0.0.1:9"], "cannot reach"),
        (["canary-llama", "x", "--judge-model", "m"], "--judge URL"),
        (["canary-llama", "x", "--scores", "s.csv"], "--from"),
        (["canary-llama", "x", "--rubric", "no.json"], "cannot read the rubric"),
        (["--from", "no.json"], "cannot read no.json"),
        (["no-such-a", "no-such-b"], "no side could be measured: no-such-a"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_cli(["compare", *words, "--no-charts", *SHORT] if "--repeats" not in words else ["compare", *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("surefoot: ")]
    assert len(error) == 1
    assert said in error[0]
