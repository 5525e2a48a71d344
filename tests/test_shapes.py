"""Buckets for a workload: optimal, played by the real scheduler; and dynamic, bucketed and fixed on a real engine."""

from __future__ import annotations

import itertools
import json

import pytest
import tiny
from emulated_npu.capture import GraphCpu
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot.bench import shapes
from surefoot.bench.buckets import choices, padding, powers_of_two, split
from surefoot.bench.shapes import Limits, advise, play, requests
from surefoot.bench.shapes_run import RunSettings, compare
from surefoot.cli.main import run_cli
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError

LIMITS = Limits(max_model_len=512, max_num_seqs=6, max_num_batched_tokens=128)


# ---- the best buckets


@given(
    counts=st.dictionaries(st.integers(1, 24), st.integers(1, 9), min_size=1, max_size=7),
    most=st.integers(1, 5),
    align=st.sampled_from((1, 4)),
)
@settings(max_examples=80, deadline=None)
def test_no_other_buckets_waste_less(counts, most, align):
    cover = 24
    ends = sorted({-(-size // align) * align for size in counts} - {cover})
    for choice in choices(counts, most, align=align, cover=cover):
        assert choice == padding(counts, choice.buckets)
        assert choice.buckets[-1] == cover and all(b % align == 0 for b in choice.buckets)
        others = itertools.combinations(ends, min(len(ends), len(choice.buckets) - 1))
        assert choice.padded == min(padding(counts, (*other, cover)).padded for other in others)


def test_more_buckets_come_only_where_they_waste_less():
    found = choices({8: 5, 100: 1}, 10, cover=100)
    assert [c.buckets for c in found] == [(100,), (8, 100)]
    assert [c.padded for c in found] == [5 * 92, 0] and found[0].waste == 460 / 600
    assert [c.buckets for c in split(found, found, 3)] in ([(100,), (8, 100)], [(8, 100), (100,)])
    assert [len(c.buckets) for c in split(found, found, 9)] == [2, 2]
    assert powers_of_two(20) == (1, 2, 4, 8, 16, 20)


# ---- the workload


def test_a_workload_is_played_by_the_scheduler():
    """Three in flight, prompts of 100 and a budget of 128: a whole prompt and a piece of the next."""
    played = play([(100, 4)] * 3, LIMITS, concurrency=3)
    assert played.prefill == {128: 2, 47: 1} and sum(played.decode.values()) == 3
    alone = play([(100, 4)] * 3, LIMITS, concurrency=1)
    assert alone.prefill == {100: 3} and alone.decode == {1: 9}
    assert play([(100, 4), (600, 1)], LIMITS).left_out == 1
    with pytest.raises(InputError, match="no request of the workload fits into max_model_len 512"):
        play([(600, 1)], LIMITS)


def test_the_advice_covers_every_step_and_wastes_least():
    played = play(requests("lognormal:60,0.9,300/uniform:2,40", 80), LIMITS)
    modes = advise(played, 6)
    best, plain, fixed = modes["bucketed"], modes["powers of two"], modes["fixed"]
    assert best["decode_shapes"] + best["prefill_shapes"] <= 6
    assert best["batch_buckets"][-1] == 6 and best["token_buckets"][-1] == 128
    assert 0 == modes["dynamic"]["waste"] < best["waste"] < min(plain["waste"], fixed["waste"])
    assert fixed["batch_buckets"] == [6] and fixed["token_buckets"] == [128]
    assert advise(played, 40)["bucketed"]["waste"] <= best["waste"]
    with pytest.raises(InputError, match="at least 2"):
        advise(played, 1)


def test_workloads(tmp_path):
    assert requests("fixed:7/fixed:3", 2) == [(7, 3), (7, 3)] and requests("fixed:7", 1) == [(7, 128)]
    drawn = requests("uniform:16,4096", 400)
    assert drawn == requests("uniform:16,4096", 400) and all(16 <= p <= 4096 for p, _ in drawn)
    middle = sorted(p for p, _ in requests("lognormal:500,0.8", 999))[499]
    assert 430 < middle < 580
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1,20,3\n2,30,4\n")
    assert requests(str(trace), 10) == [(20, 3), (30, 4)]
    mooncake = tmp_path / "trace.jsonl"
    mooncake.write_text('{"timestamp": 0, "input_length": 600, "output_length": 2, "hash_ids": [1, 2]}\n')
    assert requests(str(mooncake), 10) == [(600, 2)]


@pytest.mark.parametrize(
    "said", ["nothing.csv", "uniform:9", "uniform:9,2", "lognormal:-1,2", "fixed:0", "fixed:x", "fixed:4/normal:1"]
)
def test_impossible_workloads(said):
    with pytest.raises(InputError, match=r"uniform:LOW,HIGH, lognormal:MEDIAN"):
        requests(said, 1)


# ---- on an engine

ENGINE = {"dtype": "float32", "max_model_len": 160, "kv_cache_tokens": 1024, "max_num_seqs": 4}
MODES = {"dynamic": (None, None), "bucketed": ((2, 4), (16, 48, 64, 96)), "fixed": ((4,), (96,))}
RUN = RunSettings(lengths=(5, 16, 60, 120), batch=3, output_len=4, repeats=1)


@pytest.fixture(scope="module", params=["llama", "qwen3.5"])
def folder(request, tmp_path_factory):
    return str(tiny.save(tiny.reference(request.param), tmp_path_factory.mktemp(request.param)))


def config(**more) -> EngineConfig:
    return EngineConfig(**(ENGINE | {"max_num_batched_tokens": 96, "graph": "off"} | more))


def test_dynamic_bucketed_and_fixed_agree(folder):
    found = compare(folder, config(), MODES, RUN)
    assert found["ok"] and found["problems"] == []
    modes = found["modes"]
    assert [m["new_shapes"] == [] for m in modes.values()] == [False, True, True]
    assert modes["bucketed"]["warmup_shapes"] == 6 and modes["fixed"]["warmup_shapes"] == 2
    assert modes["dynamic"]["memory_bytes"] < modes["fixed"]["memory_bytes"]
    assert all(len(m["points"]) == 4 and m["points"][0]["prefill_s"] > 0 for m in modes.values())


def test_graphs_are_captured_as_predicted_and_never_again(folder):
    modes = {"dynamic": (None, None), "bucketed": MODES["bucketed"]}
    found = compare(folder, config(graph="full"), modes, RUN, device=GraphCpu)
    assert found["ok"]
    assert [m["captures"] for m in found["modes"].values()] == [3, 2]  # 1, 2 and 4 by default


def test_a_shape_outside_the_buckets_fails_by_name(folder):
    modes = {"dynamic": (None, None), "bucketed": ((1, 2), (16, 32))}
    found = compare(folder, config(), modes, RunSettings(lengths=(40,), batch=3, output_len=3, repeats=1))
    assert not found["ok"]
    assert "bucketed: recompile after warm-up: decode of 3 requests, the buckets end at 2" in found["problems"]
    assert any("prefill of 96 tokens, the buckets end at 32" in problem for problem in found["problems"])


def test_other_tokens_fail(folder, monkeypatch):
    from surefoot.engine.padding import Padding

    right = Padding.pad

    def wrong(self, step):
        padded = right(self, step)
        for item in padded.items:
            if item.request.request_id.startswith("padding"):
                item.request.state_slot, item.request.block_ids = (
                    step.items[0].request.state_slot,
                    [step.items[0].request.block_ids[0]] * len(item.request.block_ids),
                )
        return padded

    monkeypatch.setattr(Padding, "pad", wrong)
    found = compare(folder, config(), MODES, RUN)
    assert any(problem.startswith("bucketed: other tokens than dynamic") for problem in found["problems"])


def test_lengths_that_do_not_fit(folder):
    with pytest.raises(InputError, match="lengths up to 204 tokens with the output exceed max_model_len 160"):
        compare(folder, config(), MODES, RunSettings(lengths=(200,), output_len=4))


# ---- the verb


def test_the_verb(folder, capsys):
    def surefoot(*more: str) -> tuple[int, str, str]:
        return run_cli(["shapes", folder, *flags, *more]), *capsys.readouterr()

    flags = ["--max-model-len", "160", "--max-num-seqs", "4", "--max-num-batched-tokens", "96", "--dtype", "float32"]
    flags += ["--kv-cache-tokens", "1024", "--workload", "uniform:5,100/fixed:8", "-n", "50", "--max-captures", "5"]
    code, out, err = surefoot()
    assert (code, err) == (0, "") and "take      --batch-buckets " in out and "powers of two" in out
    code, out, _ = surefoot("--run", "--lengths", "5,40", "--output-len", "3", "--repeats", "1", "--json")
    data = json.loads(out)
    assert code == 0 and data["run"]["ok"] and set(data["run"]["modes"]) == {"dynamic", "bucketed", "fixed"}
    code, out, _ = surefoot("--run", "--lengths", "40", "--batch-buckets", "1", "--repeats", "1")
    assert code == 1 and "FAIL      bucketed: recompile after warm-up: decode of 3 requests" in out
    code, _, err = surefoot("--workload", "oops")
    assert code == 2 and err.count("\n") == 1 and shapes.FORMS in err
