"""Estimates: sizes equal the engine's to the byte, costs equal hand arithmetic, times are honest intervals."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot import canaries
from surefoot.analyze import calibrate, probes
from surefoot.analyze.estimate import (
    Question,
    cache_plan,
    calibrated_target,
    chip_target,
    estimate,
    largest_batch,
    sketch,
)
from surefoot.analyze.rates import CalibratedRates, Calibration, ChipRates, Interval, OpFit, Variant
from surefoot.analyze.roofline import chip_peak, decode_step, lower_bound, prefill_steps, step_cost
from surefoot.cache.plan import plan
from surefoot.cli.main import run_cli
from surefoot.core.config import EngineConfig
from surefoot.core.errors import CapacityError, InputError
from surefoot.device import get_device
from surefoot.device.chips import CHIPS, Chip, lookup
from surefoot.engine.engine import Engine
from surefoot.quant.schemes import scheme

MODELS = Path(__file__).parents[2] / "shared" / "data" / "models"
SIZES = {"max_model_len": 64, "max_num_seqs": 3, "kv_cache_tokens": 200, "num_state_checkpoints": 2}


def config_of(name: str) -> dict:
    family, changes = tiny.CONFIGS[name]
    architecture = "LlamaForCausalLM" if family == "llama" else "Qwen3_5ForCausalLM"
    return {"architectures": [architecture]} | (tiny.LLAMA if family == "llama" else tiny.QWEN) | changes


def real(name: str) -> dict:
    path = MODELS / name / "config.json"
    if not path.exists():
        pytest.skip(f"no test data at {path}")
    return json.loads(path.read_text())


def assert_sizes_equal(folder: Path, config: dict, dtype: str, quant: str | None, lm_head: bool = False) -> None:
    asked = EngineConfig(dtype=dtype, quant=quant, quant_lm_head=lm_head, random_weights=0, **SIZES)
    engine = Engine.load(str(folder), asked)
    info = engine.info
    paper = sketch(config, getattr(torch, dtype), scheme(quant) if quant else None, lm_head)
    planned = cache_plan(paper, asked, "cpu", get_device("cpu").memory()[0], info.block_size)
    assert (paper.parameters, paper.weight_bytes) == (info.num_parameters, info.weight_bytes)
    assert (planned.kv_bytes, planned.state_bytes) == (info.kv_cache_bytes, info.state_bytes)
    assert (planned.num_blocks, planned.max_model_len) == (info.num_blocks, info.max_model_len)
    cache = held(t for layer in engine.runner.layers for t in vars(layer).values())
    assert cache == planned.kv_bytes + planned.state_bytes, "what is planned is what is allocated"
    assert held(engine.model.parameters()) == paper.weight_bytes


def held(tensors) -> int:
    """Bytes of memory behind these tensors, shared memory once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("name", sorted(tiny.CONFIGS))
@pytest.mark.parametrize("dtype,quant", [("float32", None), ("bfloat16", None), ("bfloat16", "w8a8")])
def test_sizes_equal_the_engines(tmp_path, name, dtype, quant):
    config = config_of(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_sizes_equal(tmp_path, config, dtype, quant)


@pytest.mark.parametrize("name", list(canaries.CANARIES))
@pytest.mark.parametrize("quant,lm_head", [(None, False), ("w8a16", False), ("w4a16", False), ("w4a16", True)])
def test_sizes_of_the_canaries_equal_the_engines(name, quant, lm_head):
    folder = canaries.path(name)
    assert_sizes_equal(folder, json.loads((folder / "config.json").read_text()), "float16", quant, lm_head)


def test_real_shapes():
    """Parameters as published, KV bytes as in the models' cards."""
    one = sketch(real("llama-3.2-1b-instruct"), torch.bfloat16)
    assert (one.parameters, one.weight_bytes) == (1_235_814_400, 2 * 1_235_814_400)
    qwen = sketch(real("qwen3.5-0.8b-base"), torch.bfloat16)
    shapes = json.loads((MODELS / "qwen3.5-0.8b-base" / "tensor_shapes.json").read_text())["transformers_state_dict"]
    assert qwen.parameters == sum(math.prod(shape) for name, shape in shapes.items() if "visual" not in name)
    target = chip_target(lookup("H200"))
    found = estimate("x", real("llama-3.2-1b-instruct"), target, Question(("bf16",), (1,), (128,)))
    assert found["variants"][0]["kv_bytes_per_token"] == 16 * 2 * 8 * 64 * 2


def test_linear_flops_and_compulsory_bytes_by_hand():
    config = config_of("llama")
    hidden, inter, vocab, layers = 48, 96, 199, 3
    weights = layers * (hidden * (6 + 2 + 2) * 16 + 6 * 16 * hidden + 3 * hidden * inter) + hidden * vocab
    paper = sketch(config, torch.float32)
    cost = step_cost(paper.model, decode_step(4, 32), torch.float32)
    assert cost.by_class(lambda call: call.flops)["linear"] == 2 * 4 * weights
    kv = 4 * 32 * layers * 2 * 2 * 16 * 4
    written = 4 * layers * 2 * 2 * 16 * 4 + 4 * layers * 8  # new keys and values, and their slots
    norms, embedding = (2 * layers + 1) * hidden * 4, 4 * (hidden * 4 + 8)
    angles = 4 * 8 + 8 * 4  # positions and frequencies
    assert cost.total(lambda call: call.must_move) == weights * 4 + kv + written + norms + embedding + angles
    assert cost.total(lambda call: call.bytes) > cost.total(lambda call: call.must_move)


@pytest.mark.parametrize("name", ["llama", "llama-rope-dynamic", "qwen3.5", "qwen3.5-all-linear"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_cost_on_paper_equals_the_ops_that_the_engine_calls(tmp_path, name, phase):
    """One source of truth: the same op calls, shapes and costs, seen by `ops.intercept` in a real engine."""
    config = config_of(name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    # With prefix caching a hybrid model's prompt is cut once more, where its state is saved.
    asked = EngineConfig(random_weights=0, dtype="float32", enable_prefix_caching=False, **SIZES)
    engine = Engine.load(str(tmp_path), asked)
    step = prefill_steps(20, 64)[0] if phase == "prefill" else decode_step(3, 21)
    timed = probes.op_seconds(engine, get_device("cpu"), phase, step)
    seen = [(call.op, call.flops, call.bytes) for call, _ in timed.calls]
    cost = step_cost(sketch(config, torch.float32).model, step, torch.float32, engine.info.block_size)
    paper = [(call.op, call.flops, call.bytes) for call, count in cost.calls.items() for _ in range(count)]
    assert sorted(seen) == sorted(paper)


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_the_largest_batch_is_the_planners(name):
    paper = sketch(config_of(name), torch.bfloat16)
    target, config = chip_target(lookup("910B4")), EngineConfig(num_state_checkpoints=2)
    memory, length = paper.weight_bytes + 4_000_000, 300
    most = largest_batch(paper, config, target, length, memory)
    assert most > 1

    def attempt(batch: int):
        return plan(
            paper.model.state_specs(),
            dtype_bytes=2,
            max_model_len=length,
            model_max_len=4096,
            max_num_seqs=batch,
            block_size=128,
            kv_cache_tokens=batch * 384,
            num_checkpoints=2,
            budget_bytes=int(4_000_000 * 0.85),
        )

    attempt(most)
    with pytest.raises(CapacityError):
        attempt(most + 1)
    assert largest_batch(paper, config, target, length, paper.weight_bytes) == 0


@settings(max_examples=100, deadline=None)
@given(prompt=st.integers(1, 200), room=st.integers(1, 64), batch=st.integers(1, 5))
def test_prefill_steps_cover_each_prompt_once(prompt, room, batch):
    steps = prefill_steps(prompt, room, batch)
    assert sum(step.num_tokens for step in steps) == prompt * batch
    assert sum(step.num_logits for step in steps) == batch
    assert all(step.num_tokens <= room for step in steps)
    assert all(list(s.query_lens[: s.query_lens.count(1)]) == [1] * s.query_lens.count(1) for s in steps)


def test_the_bound_is_the_slower_of_compute_and_memory():
    paper = sketch(config_of("llama"), torch.bfloat16)
    cost = step_cost(paper.model, decode_step(1, 8), torch.bfloat16)
    flops, moved = cost.total(lambda call: call.flops), cost.total(lambda call: call.must_move)
    peak = chip_peak({"bfloat16": 1e9, "float32": 1e3}, "bfloat16")
    assert lower_bound(cost, peak, 1e30) == pytest.approx(flops / 1e9)
    assert lower_bound(cost, peak, 1.0) == moved
    assert lower_bound(cost, lambda call: None, None) is None


def test_int8_has_its_own_peak_and_weight_only_has_not():
    chip = Chip("x", "cuda", peak_flops={"bfloat16": 1.0, "int8": 2.0})
    peak = chip_peak(chip.peak_flops, "bfloat16")
    for name, wanted in (("w8a8", 2.0), ("w8a16", 1.0), ("w4a16", 1.0)):
        paper = sketch(config_of("llama"), torch.bfloat16, scheme(name))
        calls = step_cost(paper.model, decode_step(2, 8), torch.bfloat16).calls
        assert {peak(call) for call in calls if call.kind == name} == {wanted}


def test_unknown_stays_unknown():
    cost = step_cost(sketch(config_of("llama"), torch.bfloat16).model, decode_step(1, 8), torch.bfloat16)
    assert ChipRates(lookup("910B4"), "bfloat16").interval(cost, "decode") == Interval(None, None, None)
    only = dataclasses.replace(lookup("910B4"), memory_bandwidth=1e12)
    found = ChipRates(only, "bfloat16").interval(cost, "decode")
    assert found.low is not None and found.high is None
    assert Interval(None, None, None).inverse(3) == Interval(None, None, None)


@pytest.mark.parametrize("chip", [c for c in CHIPS if c.memory_bandwidth and "bfloat16" in c.peak_flops], ids=str)
def test_intervals_are_ordered_and_grow(chip):
    found = estimate("x", config_of("qwen3.5"), chip_target(chip), Question(("bf16", "w4a16"), (1, 8), (16, 64)))
    for variant in found["variants"]:
        for row in variant["prefill"] + variant["decode"]:
            assert 0 < row["seconds"]["low"] < row["seconds"]["high"]
            assert row["tokens_per_s"]["low"] < row["tokens_per_s"]["high"]
            assert (row["joules_per_token_at_most"] is None) == (chip.power is None)
        by = {(r["batch"], r["context"]): r["seconds"]["low"] for r in variant["decode"]}
        assert by[1, 16] < by[8, 16] < by[8, 64]
    json.dumps(found, allow_nan=False)


def test_every_number_of_a_chip_has_a_source():
    for chip in CHIPS:
        assert chip.source
        assert not chip.memory or chip.memory_source
        assert not chip.power or chip.power_source
    assert len({alias for c in CHIPS for alias in c.aliases}) == sum(len(c.aliases) for c in CHIPS)
    assert lookup("Ascend 910C").memory_bandwidth == 1.6e12
    assert lookup("910B") is None and lookup("910b4").name == "Ascend 910B4 (A2)"


QUICK = calibrate.Settings(
    variants=("float32", "w8a8"),
    repeats=2,
    matrix=(256, 128),
    rows=(1, 8, 64),
    read_bytes=1 << 20,
    scale=16,
    prompts=(8, 32),
    batches=(1, 3),
    contexts=(16, 40),
)


@pytest.fixture(scope="module")
def measured() -> Calibration:
    return calibrate.calibrate(QUICK)


def test_a_calibration_survives_its_file(measured, tmp_path):
    path = tmp_path / "deep" / "c.json"
    calibrate.save(measured, path)
    assert calibrate.load(path) == measured
    assert set(measured.variants) == {"float32", "w8a8"}
    assert measured.versions["torch"] and measured.date and measured.bandwidth[0] <= measured.bandwidth[1]


def test_a_calibration_explains_the_probe_steps_it_was_made_from(measured):
    """By construction: every probe step lies within [least, largest] error, so the interval's high end covers it."""
    variant = measured.variants["float32"]
    rates = CalibratedRates(measured, variant)
    paper = sketch(probes.models(16)[0], torch.float32)
    cost = step_cost(paper.model, decode_step(3, 40), torch.float32)
    low, median, largest = variant.error["decode"]
    interval = rates.interval(cost, "decode")
    assert interval.low <= interval.expected <= interval.high
    assert interval.high >= rates.raw(cost, "decode") * largest
    assert 0 < low <= median <= largest


def test_a_phase_or_op_without_evidence_widens_the_interval():
    variant = Variant(linear={1: (1e-9, 1e-9)}, ops={}, error={"decode": (1.0, 1.0, 1.0)})
    c = Calibration("cpu", "x", "now", 1, 10**9, (1e10, 1e10), 1e-6, {"float32": variant})
    cost = step_cost(sketch(config_of("llama"), torch.float32).model, decode_step(1, 8), torch.float32)
    rates = c.rates("float32")
    assert rates is not None and c.rates("bfloat16") is None
    assert rates.interval(cost, "decode").high == pytest.approx(2 * rates.interval(cost, "decode").expected)
    variant.ops |= {call.op: OpFit(0, 0, 0) for call in cost.calls}
    assert rates.interval(cost, "decode").high == pytest.approx(1.25 * rates.interval(cost, "decode").expected)


def test_a_model_far_smaller_than_the_probes_has_a_wider_interval():
    """Its weights stay in the caches and its calls are mostly their start, which the probe models do not show."""
    variant = Variant(linear={1: (1e-9, 1e-9)}, error={"decode": (1.0, 1.0, 1.0)})
    c = Calibration("cpu", "x", "now", 1, 10**9, (1e10, 1e10), 1e-6, {"float32": variant})
    cost = step_cost(sketch(config_of("llama"), torch.float32).model, decode_step(1, 8), torch.float32)
    variant.ops |= {call.op: OpFit(0, 0, 0) for call in cost.calls}
    weights = cost.total(lambda call: call.weights)
    for probe, stretch in ((3 * weights, 1.25), (5 * weights, 2.0)):
        variant.weights = probe
        found = c.rates("float32").interval(cost, "decode")
        assert found.high == pytest.approx(stretch * found.expected)
    variant.linear_call = {1: 1e-3, 4: 0.0}
    calls = cost.total(lambda call: call.op == "linear")
    before, after = found, c.rates("float32").interval(cost, "decode")
    assert after.expected - before.expected == pytest.approx(calls * 1e-3, rel=1e-3)


def test_a_calibration_has_the_cost_of_a_small_linear_call(measured):
    for variant in measured.variants.values():
        assert set(variant.linear_call) == set(variant.linear) and min(variant.linear_call.values()) >= 0
        assert variant.weights > 0


@settings(max_examples=60, deadline=None)
@given(
    points=st.dictionaries(st.integers(1, 300), st.floats(1e-12, 1e-6), min_size=1, max_size=5),
    rows=st.integers(1, 2000),
)
def test_rates_between_measured_rows_stay_between_their_values(points, rows):
    variant = Variant(linear={n: (t, t) for n, t in points.items()})
    value, most = variant.per_weight(rows), max(points)
    around = [points[max((n for n in points if n <= rows), default=min(points))]]
    around.append(points[min((n for n in points if n >= rows), default=most)] * max(1.0, rows / most))
    assert min(around) * 0.999 <= value <= max(around) * 1.001


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.sampled_from([0.0, 1e-6, 3e-6])] * 3))
def test_fit_finds_the_factors(truth):
    features = [(1.0, float(a), float(b)) for a in (1, 10, 100) for b in (5, 50, 1000)]
    seconds = [sum(t * f for t, f in zip(truth, row)) for row in features]
    found = calibrate.fit(features, seconds)
    assert all(v >= 0 for v in found)
    for row, wanted in zip(features, seconds):
        assert sum(t * f for t, f in zip(found, row)) == pytest.approx(wanted, rel=1e-3, abs=1e-9)


def test_calibrated_estimate(measured):
    target = calibrated_target(measured)
    found = estimate("x", config_of("qwen3.5"), target, Question(("fp32", "w8a8", "bf16"), (1, 3), (16,)))
    fp32, w8a8, bf16 = found["variants"]
    assert fp32["decode"][0]["seconds"]["expected"] > 0
    assert "prefill" not in bf16 and bf16["notes"]
    assert w8a8["activations"] == "float32"


@pytest.mark.parametrize(
    "content,words",
    [
        (None, "run `surefoot calibrate`"),
        ("{", "cannot read"),
        ("[]", "not a calibration"),
        ('{"format": "x"}', "again"),
    ],
)
def test_a_bad_calibration_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=words) as error:
        calibrate.load(path)
    assert "\n" not in str(error.value)
    path.write_text(json.dumps({"format": "surefoot-calibration-1", "device": "cpu"}))
    with pytest.raises(InputError, match="damaged"):
        calibrate.load(path)


@pytest.mark.parametrize(
    "args,words",
    [
        (["--chip", "910B"], "910B1"),
        (["--chip", "H200", "--dtype", "int3"], "unknown dtype"),
        (["--chip", "H200", "--batch", "1,x"], "whole numbers"),
        (["--chip", "H200", "--batch", "0"], "1 or more"),
        (["--chip", "H200", "--memory", "12 parsecs"], "64GB"),
        (["--chip", "H200", "--length", "999999999"], "no length"),
        (["--chip", "nowhere.json"], "no calibration"),
    ],
)
def test_bad_input_is_one_line(capsys, args, words):
    assert run_cli(["estimate", "canary-llama", *args]) == 2
    out, err = capsys.readouterr()
    assert words in err and len(err.strip().splitlines()) == 1 and not out


def test_cli_prints_a_table_and_json(capsys):
    args = ["estimate", "canary-qwen3.5", "--chip", "910B4", "--dtype", "bf16", "--batch", "1,4", "--length", "16"]
    assert run_cli(args) == 0
    assert "unknown" in capsys.readouterr().out
    assert run_cli([*args, "--bandwidth", "800", "--peak", "280", "--memory", "32GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["variants"][0]["decode"][0]["seconds"]["high"] > 0
    assert found["memory"] == 32 << 30
