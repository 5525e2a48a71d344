"""The audit finds what is wrong on the shipped pages and nothing else; a clean set of numbers raises nothing."""

from __future__ import annotations

import json

import pytest
import tiny
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from surefoot.analyze import claims as pages
from surefoot.analyze.audit import audit, unchecked
from surefoot.analyze.audit_text import family_in, family_of
from surefoot.analyze.estimate import Question, chip_target, estimate
from surefoot.analyze.numbers import amount, seconds
from surefoot.cli.main import run_cli
from surefoot.core.errors import InputError
from surefoot.device.chips import lookup


def findings(data: dict) -> list:
    return audit(pages.parse({"format": pages.FORMAT} | data, "test"))


def serious(data: dict) -> list[tuple[str, str]]:
    return [(f.severity, f.check) for f in findings(data) if f.severity != "missing"]


# The shipped pages


def test_a_step_of_6_ms_contradicts_211_tokens_per_second():
    (found,) = audit(pages.read("qwen3.5-0.8b-910b"))
    assert (found.severity, found.check) == ("impossible", "decode-step")
    for part in ("6.2 ms", "211.4 tok/s", "8 / 6.2 ms = 1,290 tok/s", "3.785 - 0.503 s", "36.5 ms a step"):
        assert part in found.line()


def test_requests_per_second_beyond_the_bandwidth():
    found = audit(pages.read("llama-3.2-910"))
    impossible = [f for f in found if f.severity == "impossible"]
    assert {f.check for f in impossible} == {"bandwidth"}
    rows = pages.read("llama-3.2-910").rows
    assert sorted(w for f in impossible for w in f.where) == sorted(row.id for row in rows), "every row is beyond it"
    assert {f.check for f in found if f.severity == "missing"} == {"tokens"}
    assert not [f for f in found if f.severity == "suspicious"]


def test_answers_of_different_length_under_another_models_template():
    found = audit(pages.read("llama-1b-against-unichat-3b"))
    assert [(f.severity, f.check) for f in found] == [("suspicious", "answer-length")] + [
        ("suspicious", "template")
    ] * 2
    assert "11.54 s" in found[0].statement and "8.83 s" in found[0].statement
    assert "1.6 x 11.54 = 18.5 s" in found[0].arithmetic


def test_the_pages_name_no_people_and_are_data():
    assert len(pages.examples()) == 3
    for path in pages.examples().values():
        data = json.loads(path.read_text())
        assert data["format"] == pages.FORMAT and data["rows"] and data["source"]


# Clean numbers


def test_numbers_of_the_estimator_raise_nothing():
    """Step times anywhere between the estimator's ends make a consistent page, for a dense and a hybrid model."""
    for family, architecture in (("llama", "LlamaForCausalLM"), ("qwen3.5", "Qwen3_5ForCausalLM")):
        config = {"architectures": [architecture]} | (tiny.LLAMA if family == "llama" else tiny.QWEN)
        asked = Question(("bf16", "w8a8"), (1, 4, 16), (64,))
        found = estimate("x", config, chip_target(lookup("H200")), asked)
        for variant in found["variants"]:
            for end in ("low", "high"):
                page = page_of(variant, config, end)
                assert serious(page) == [], (family, variant["name"], end)


def page_of(variant: dict, config: dict, end: str) -> dict:
    dtype, output = variant["name"], 50
    prefill = variant["prefill"][0]["seconds"][end]
    rows = []
    for point in variant["decode"]:
        step, batch = point["seconds"][end], point["batch"]
        whole = batch * prefill + output * step
        rows.append(
            {
                "batch": batch,
                "prompt_tokens": 64,
                "output_tokens": output,
                "decode_step_s": step,
                "seconds": whole,
                "tokens_per_s": batch * output / whole,
                "prefill_s": batch * prefill,
                "ttft_s": batch * prefill,
                "request_s": whole,
                "requests_per_s": batch / whole,
            }
        )
    weights, kv = variant["weight_bytes"], variant["kv_bytes_per_token"]
    memory = [{"weight_bytes": weights, "cache_tokens": 1000, "cache_bytes": 1000 * kv, "total_bytes": 10**9}]
    model = {"name": "x", "dtype": dtype, "config": config}
    return {"chip": "H200", "models": {"x": model}, "rows": rows, "memory": memory}


PARAMETERS, PEAK, BANDWIDTH = 1e9, 1e15, 1e12


@st.composite
def consistent(draw) -> dict:
    """A page by one law: a step takes a + b * batch, prefill c * tokens, nothing beats the chip; rounded."""
    slowness = draw(st.floats(1.05, 30))
    a = slowness * 2 * PARAMETERS / BANDWIDTH
    b = draw(st.floats(0.0, 1.0)) * a + 2 * PARAMETERS / PEAK
    c = draw(st.floats(2.0, 100.0)) * 2 * PARAMETERS / PEAK
    rows = []
    for batch in draw(st.lists(st.sampled_from([1, 2, 4, 8, 32]), min_size=1, max_size=3, unique=True)):
        for output in draw(st.lists(st.sampled_from([8, 20, 100]), min_size=1, max_size=3, unique=True)):
            step, prefill = a + b * batch, c * 128 * batch
            whole = prefill + output * step
            row = {
                "batch": batch,
                "prompt_tokens": 128,
                "output_tokens": output,
                "output_characters": 4 * output,
                "seconds": whole,
                "tokens_per_s": batch * output / whole,
                "requests_per_s": batch / whole,
                "request_s": whole,
                "ttft_s": prefill + step,
                "prefill_s": prefill,
                "decode_step_s": step,
                "tpot_s": step,
            }
            kept = draw(st.sets(st.sampled_from(sorted(row)), min_size=3)) | {"output_tokens"}
            rows.append({k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items() if k in kept})
    model = {"name": "x", "dtype": "bfloat16", "parameters": PARAMETERS}
    chip = {"name": "c", "peak_flops": {"bfloat16": PEAK}, "memory_bandwidth": BANDWIDTH}
    return {"chip": chip, "models": {"x": model}, "rows": rows}


@settings(max_examples=300, deadline=None)
@given(consistent())
def test_a_consistent_page_raises_nothing(page):
    assert serious(page) == []


@settings(max_examples=200, deadline=None)
@given(consistent(), st.floats(3, 50), st.data())
def test_a_number_that_is_far_off_is_found(page, factor, data):
    whole = [row for row in page["rows"] if {"batch", "output_tokens", "seconds", "tokens_per_s"} <= row.keys()]
    assume(whole)
    row = data.draw(st.sampled_from(whole))
    row.pop("prompt_tokens", None)  # else 17 times as much may be a page that counts its 128 prompt tokens: suspicious
    row["tokens_per_s"] *= factor
    assert ("impossible", "throughput") in serious(page)


# Each check alone: numbers that must be found, and nearly the same numbers that must not

SMALL = {"chip": {"name": "c", "peak_flops": {"bfloat16": 1e12, "int8": 2e12}, "memory_bandwidth": 1e10}}
ONE = SMALL | {"models": {"m": {"name": "m", "parameters": 1e8}}}  # 2e8 FLOP a token, 2e8 bytes, 20 ms a step
CONFIG = {"architectures": ["LlamaForCausalLM"]} | tiny.LLAMA

PAIRS = {
    "peak": ({"batch": 1000, "tokens_per_s": 6000}, {"batch": 1000, "tokens_per_s": 4900}),
    "bandwidth": ({"batch": 4, "tokens_per_s": 220}, {"batch": 4, "tokens_per_s": 190}),
    "bandwidth step": ({"decode_step_s": 0.015}, {"decode_step_s": 0.021}),
    "bandwidth devices": (
        {"batch": 4, "devices": 2, "tokens_per_s": 420},
        {"batch": 4, "devices": 2, "tokens_per_s": 390},
    ),
    "bandwidth request": ({"request_s": 0.9, "output_tokens": 50}, {"request_s": 1.1, "output_tokens": 50}),
    "throughput": (
        {"batch": 2, "output_tokens": 10, "seconds": 1, "tokens_per_s": 25},
        {"batch": 2, "output_tokens": 10, "seconds": 1, "tokens_per_s": 20.5},
    ),
    "throughput requests": (
        {"output_tokens": 10, "requests_per_s": 2, "tokens_per_s": 40},
        {"output_tokens": 10, "requests_per_s": 2, "tokens_per_s": 21},
    ),
    "first-token": ({"ttft_s": 0.1, "prefill_s": 0.2}, {"ttft_s": 0.21, "prefill_s": 0.2}),
    "first-token whole": ({"ttft_s": 1.2, "seconds": 1}, {"ttft_s": 0.2, "seconds": 1}),
    "first-token sum": (
        {"ttft_s": 0.1, "tpot_s": 0.1, "output_tokens": 11, "request_s": 0.5},
        {"ttft_s": 0.1, "tpot_s": 0.1, "output_tokens": 11, "request_s": 1.1},
    ),
    "characters": ({"output_tokens": 100, "output_characters": 20}, {"output_tokens": 100, "output_characters": 380}),
    "in-flight": (
        {"batch": 4, "request_s": 1, "requests_per_s": 5, "output_tokens": 4},
        {"batch": 4, "request_s": 1, "requests_per_s": 4, "output_tokens": 4},
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_impossible_rows(name):
    wrong, right = PAIRS[name]
    assert ("impossible", name.split()[0]) in serious(ONE | {"rows": [wrong]})
    assert serious(ONE | {"rows": [right]}) == []


def test_suspicious_rows():
    as_tokens = {"output_tokens": 40, "output_characters": 40}
    assert serious(ONE | {"rows": [as_tokens]}) == [("suspicious", "characters")]
    both = {"batch": 1, "prompt_tokens": 90, "output_tokens": 10, "seconds": 10, "tokens_per_s": 10}
    assert serious(ONE | {"rows": [both]}) == [("suspicious", "throughput")]
    rows = [{"batch": 1, "tokens_per_s": 10}, {"batch": 2, "tokens_per_s": 25}]
    assert serious(ONE | {"rows": rows}) == [("suspicious", "speed-up")]
    rows[1]["tokens_per_s"] = 20.5
    assert serious(ONE | {"rows": rows}) == []
    cards = [{"batch": 8, "devices": 1, "tokens_per_s": 10}, {"batch": 8, "devices": 4, "tokens_per_s": 50}]
    assert serious({"rows": cards}) == [("suspicious", "speed-up")]
    step = {"batch": 1, "decode_step_s": 0.03, "output_tokens": 100, "seconds": 10, "tokens_per_s": 10}
    for prefill in ({"prompt_tokens": 16}, {"prefill_s": 0.5}, {"ttft_s": 0.5, "prompt_tokens": 5000}):
        assert serious(ONE | {"rows": [step | prefill]}) == [("suspicious", "decode-step")], prefill
    for prefill in ({}, {"prompt_tokens": 200}, {"prefill_s": 6.5}):
        assert serious(ONE | {"rows": [step | prefill]}) == [], f"{prefill}: the rest may be prefill"
    elsewhere = {"batch": 1, "prompt_tokens": 4096, "decode_step_s": 0.5}
    assert serious(ONE | {"rows": [step | {"prompt_tokens": 200}, elsewhere]}) == []


def test_memory():
    model = {"models": {"m": {"name": "m", "dtype": "bfloat16", "config": CONFIG}}}
    each = 3 * 2 * 2 * 16 * 2
    right = {"cache_tokens": 100, "cache_bytes": 100 * each, "requests": 10, "tokens_per_request": 10}
    assert serious(model | {"memory": [right]}) == []
    for change in (
        {"cache_bytes": 80 * each},
        {"requests": 12},
        {"weight_bytes": 1000},
        {"weight_bytes": 10**6, "total_bytes": 10**6 * 0.5},
    ):
        assert serious(model | {"memory": [right | change]}) == [("impossible", "memory")], change


def test_comparisons():
    models = {"models": {"a": {"name": "a"}, "b": {"name": "b"}}}
    rows = [{"id": "a", "model": "a", "seconds": 10}, {"id": "b", "model": "b", "seconds": 5}]
    page = models | {"comparisons": [{"rows": ["a", "b"]}]}
    assert [f.severity for f in findings(page | {"rows": rows})] == ["missing"]
    lengths = [rows[0] | {"output_tokens": 100}, rows[1] | {"output_tokens": 50}]
    assert serious(page | {"rows": lengths}) == [("suspicious", "answer-length")]
    lengths[1]["output_tokens"] = 100
    assert findings(page | {"rows": lengths}) == []


@pytest.mark.parametrize(
    "text,name,found,own",
    [
        ("<s>[INST] x [/INST]", "Llama-3.2-1B", "Llama 2 or Mistral", "Llama 3"),
        ("<|im_start|>user", "Qwen3.5-0.8B", "ChatML (Qwen)", "ChatML (Qwen)"),
        ("Question: x", "some-model", None, None),
        ("[INST]", "Mistral-7B", "Llama 2 or Mistral", "Llama 2 or Mistral"),
    ],
)
def test_templates(text, name, found, own):
    assert (family_in(text), family_of(name)) == (found, own)
    page = {"models": {"m": {"name": name}}, "prompts": [{"model": "m", "template": text}]}
    wrong = bool(found and own and found != own)
    assert serious(page) == ([("suspicious", "template")] if wrong else [])


def test_what_is_not_stated_is_asked_for():
    rows = [{"requests_per_s": 5}, {"request_s": 1}, {"seconds": 3}]
    assert [f.severity for f in findings({"rows": rows})] == ["missing"] * 4
    page = pages.parse({"format": pages.FORMAT, "chip": "Ascend 910B4", "rows": [{"tokens_per_s": 1}]}, "x")
    assert len(unchecked(page)) == 3


def test_the_favourable_reading_is_taken():
    """Ranges: the ambitious end is a claim too, but a modest range passes."""
    rows = [{"batch": 4, "tokens_per_s": [100, 190]}]
    assert serious(ONE | {"rows": rows}) == []
    rows[0]["tokens_per_s"] = [100, 250]
    assert serious(ONE | {"rows": rows}) == [("impossible", "bandwidth")]


@pytest.mark.parametrize(
    "data,words",
    [
        ([], "JSON object"),
        ({}, '"format"'),
        ({"format": "x"}, "surefoot-claims-1"),
        ({"format": pages.FORMAT, "rows": [{"speed": 1}]}, "unknown field 'speed'"),
        ({"format": pages.FORMAT, "rows": [{"seconds": -1}]}, "positive number"),
        ({"format": pages.FORMAT, "rows": [{"seconds": "1 s"}]}, "positive number"),
        ({"format": pages.FORMAT, "rows": [{"model": "m"}]}, "no model 'm'"),
        ({"format": pages.FORMAT, "rows": [{"dtype": "fp7"}]}, "unknown dtype"),
        ({"format": pages.FORMAT, "rows": [{"id": "a"}, {"id": "a"}]}, "two rows"),
        ({"format": pages.FORMAT, "rows": 3}, "rows"),
        ({"format": pages.FORMAT, "models": {"m": {}}}, "name"),
        ({"format": pages.FORMAT, "comparisons": [{"rows": ["a"]}]}, "the row 'a'"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, capsys, data, words):
    path = tmp_path / "claims.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=words) as error:
        pages.read(path)
    assert "\n" not in str(error.value)
    assert run_cli(["audit", str(path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_cli(capsys):
    assert run_cli(["audit", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert run_cli(["audit", "qwen3.5-0.8b-910b"]) == 1
    assert "1,290 tok/s" in capsys.readouterr().out
    assert run_cli(["audit", "llama-1b-against-unichat-3b", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["findings"]) == 3
    assert run_cli(["audit"]) == 2 and run_cli(["audit", "nothing.json"]) == 2


@pytest.mark.parametrize(
    "value,text",
    [(1.2e12, "1.2 TB/s"), (1290.3, "1,290 B/s"), (211.4, "211.4 B/s"), (None, "unknown"), (0.5, "0.5 B/s")],
)
def test_amounts(value, text):
    assert amount(value, "B/s") == text


@pytest.mark.parametrize("value,text", [(3.785, "3.785 s"), (0.0062, "6.2 ms"), (4e-6, "4 us"), (None, "unknown")])
def test_seconds(value, text):
    assert seconds(value) == text
