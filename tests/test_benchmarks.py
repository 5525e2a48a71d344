"""The arithmetic of the benchmarks: ratios pair by pair, shares of the machine's limits, verdicts, fitted costs."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("numpy")
BENCHMARKS = str(Path(__file__).parent.parent / "benchmarks")


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from peers import table

    return table


def run(case="decode-1", ours=(0.04, 0.05), theirs=(0.06, 0.06), hf=(0.2, 0.1)) -> dict:
    work = {"bytes": 900_000_000, "macs": 900_000_000, "head_bytes": 100_000_000, "head_macs": 100_000_000}
    return {
        "model": "llama-3.2-1b-instruct",
        "group": "int8",
        "case": case,
        "tokens": {"decode-1": 1, "decode-8": 8, "prefill-512": 512}[case],
        "threads": 2,
        "machine": {"cpu": "a CPU"},
        "seconds": {"surefoot w8a8": list(ours), "llama.cpp Q8_0": list(theirs), "transformers bfloat16": list(hf)},
        "families": {
            "surefoot w8a8": "surefoot",
            "llama.cpp Q8_0": "llama.cpp Q8_0",
            "transformers bfloat16": "transformers",
        },
        "about": {"surefoot w8a8": {"work": work}},
        "limits": [{"read": 40e9, "int8": 900e9}, {"read": 25e9, "int8": 900e9}],
    }


def test_a_pair_is_compared_under_its_own_limits(table):
    assert table.ratios(run(), "llama.cpp Q8_0") == pytest.approx([1.2, 1.5])
    assert table.limit(run())["bandwidth"] == pytest.approx((1 / 40 / 0.04 + 1 / 25 / 0.05) / 2)
    assert table.limit(run())["share"] == table.limit(run())["bandwidth"]


def test_a_prefill_needs_one_row_of_the_head(table):
    found = table.limit(run("prefill-512", ours=(1.0, 1.0)))
    assert found["peak"] == pytest.approx((0.9e9 * 512 + 0.1e9) / 900e9) and found["share"] == found["peak"]


def test_every_request_reads_and_writes_its_recurrent_states(table):
    def bandwidth(case, state):
        found = run(case)
        found["about"]["surefoot w8a8"]["work"]["state_bytes"] = state
        return table.limit(found)["bandwidth"]

    assert bandwidth("decode-1", 1_000_000_000) == pytest.approx(2 * bandwidth("decode-1", 0))
    assert bandwidth("decode-8", 1_000_000_000) == pytest.approx(9 * bandwidth("decode-8", 0))


def test_targets_are_judged_in_the_newest_run(table):
    text = table.render([run(theirs=(0.01, 0.01)), run()])
    assert "≥ 1.3: met" in text and "≥ 3.3: met" in text and "≥ 85%: not met" in text
    assert text.count("llama.cpp Q8_0") == 1


def test_int4_is_held_against_the_multiplies_of_its_activations(table):
    limits = [{"read": 1e15, "int8": 900e9, "int16": 450e9}] * 2
    sixteen = table.limit(run("decode-8") | {"group": "int4", "limits": limits})
    eight = table.limit(run("decode-8") | {"group": "int4-a8", "limits": limits})
    assert sixteen["peak"] == pytest.approx(2 * eight["peak"])


def test_every_group_has_a_peak_and_a_folder(table):
    from bench_peers import GROUPS
    from peers.files import SCHEMES

    assert set(GROUPS) == set(table.PEAK)
    assert {folder for folder, _ in GROUPS.values()} == {*SCHEMES, "full"}


def test_fit_finds_the_cost(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from cost_curve import fit

    points = [(b, c) for b in (1, 8, 32) for c in (128, 1024, 8192)]
    columns = [[1.0] * len(points), [b for b, _ in points], [b * c for b, c in points]]
    seconds = [0.03 + 0.001 * b + 1e-6 * b * c for b, c in points]
    found = fit(columns, seconds)
    assert found["coefficients"] == pytest.approx([0.03, 0.001, 1e-6]) and found["largest_relative_error"] < 1e-9
    falling = fit(columns, [0.03 - 1e-9 * b for b, _ in points])
    assert min(falling["coefficients"]) == 0.0


def test_kinds_of_layers_are_compared_with_the_shortest_context(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from context_flatness import table

    rounds = {128: [{"linear_attn": 2.0, "self_attn": 1.0}] * 3, 1024: [{"linear_attn": 2.0, "self_attn": 4.0}] * 3}
    assert "| 1024 | 2.00 (1.00x) | 4.00 (4.00x) |" in table(rounds)
