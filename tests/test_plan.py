"""The planner: byte formulas by hand, requests honoured or refused, and that every plan and every suggestion fits."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot.cache.plan import (
    CachePlan,
    LinearStateSpec,
    PagedKVSpec,
    format_bytes,
    kv_bytes_per_token,
    plan,
    state_bytes_per_slot,
)
from surefoot.core.errors import CapacityError

LLAMA_1B = [PagedKVSpec(num_kv_heads=8, head_dim=64)] * 16
GDN = LinearStateSpec(conv_dim=6144, conv_width=3, num_v_heads=16, head_k_dim=128, head_v_dim=128)
QWEN = ([GDN] * 3 + [PagedKVSpec(num_kv_heads=2, head_dim=256)]) * 6
MIB = 1 << 20


def make(specs=LLAMA_1B, **changes) -> CachePlan:
    config = {
        "dtype_bytes": 2,
        "max_model_len": None,
        "model_max_len": 4096,
        "max_num_seqs": 4,
        "block_size": 16,
        "kv_cache_tokens": None,
        "num_checkpoints": 2,
        "budget_bytes": 1024 * MIB,
    }
    return plan(specs, **(config | changes))


def test_bytes_by_hand():
    assert kv_bytes_per_token(LLAMA_1B[0], 2) == 2 * 8 * 64 * 2 == 2048
    assert state_bytes_per_slot(LLAMA_1B[0], 2) == 0
    assert kv_bytes_per_token(GDN, 2) == 0
    assert state_bytes_per_slot(GDN, 2) == 6144 * 3 * 2 + 16 * 128 * 128 * 4 == 1_085_440
    assert state_bytes_per_slot(GDN, 4) - state_bytes_per_slot(GDN, 2) == 6144 * 3 * 2, "the matrix is fp32 either way"


def test_room_for_everything():
    p = make()
    assert (p.max_model_len, p.num_blocks, p.num_slots, p.num_checkpoints) == (4096, 1 + 4 * 256, 0, 0)
    assert p.kv_bytes == p.num_blocks * 16 * 16 * 2048 and p.state_bytes == 0 and p.notes == []


def test_pages_shrink_to_the_budget_before_the_length_does():
    p = make(budget_bytes=256 * MIB)
    assert (p.max_model_len, p.num_blocks, p.notes) == (4096, 512, [])
    short = make(budget_bytes=64 * MIB)
    assert (short.max_model_len, short.num_blocks) == (127 * 16, 128)
    why = "the memory budget of 64.0 MiB holds 2032 tokens of KV cache"
    assert short.notes == [f"max_model_len reduced from the model's 4096 to 2032: {why}"]


def test_states_come_before_pages():
    p = make(QWEN)
    per_slot = 18 * state_bytes_per_slot(GDN, 2)
    assert (p.num_slots, p.num_checkpoints, p.num_state_rows) == (5, 2, 7) and p.state_bytes == 7 * per_slot
    tight = make(QWEN, budget_bytes=7 * per_slot + 10 * 16 * 6 * 2048)
    assert (tight.num_blocks, tight.max_model_len) == (10, 9 * 16)


def test_a_model_without_kv_needs_no_memory_for_pages():
    p = make([GDN], budget_bytes=7 * state_bytes_per_slot(GDN, 2))
    assert (p.max_model_len, p.num_blocks, p.kv_bytes) == (4096, 1 + 4 * 256, 0)


def test_requested_values_are_honoured():
    p = make(max_model_len=100, kv_cache_tokens=128)
    assert (p.max_model_len, p.num_blocks, p.notes) == (100, 9, [])
    assert make(max_model_len=100).num_blocks == 1 + 4 * 7
    rounded = make(kv_cache_tokens=100)
    assert (rounded.num_blocks, rounded.max_model_len) == (8, 112)
    assert [note.split(":")[0] for note in rounded.notes] == [
        "kv_cache_tokens 100 rounded up to 112, whole pages of 16 tokens",
        "max_model_len reduced from the model's 4096 to 112",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 5000}, "max_model_len 5000 exceeds the model's 4096: ask for that or less"),
        (
            {"max_model_len": 4096, "budget_bytes": 64 * MIB},
            "64.0 MiB holds 2032 tokens of KV cache; lower max_model_len",
        ),
        (
            {"kv_cache_tokens": 9999, "budget_bytes": 64 * MIB},
            "kv_cache_tokens 9999 does not fit: .* holds 2032 tokens",
        ),
        ({"max_model_len": 64, "kv_cache_tokens": 48}, "raise kv_cache_tokens to 64 or lower max_model_len to 48"),
        ({"budget_bytes": 1000}, "budget of 1000 B is too small, the cache needs at least 1.0 MiB: free memory"),
        ({"budget_bytes": -5}, "budget of -5 B is too small"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(changes, message):
    with pytest.raises(CapacityError, match=message) as error:
        make(**changes)
    assert "\n" not in str(error.value)


def test_too_many_states_are_refused_with_how_many_fit():
    per_slot = 18 * state_bytes_per_slot(GDN, 2)
    pages = 2 * 16 * 6 * 2048
    for rows, message in (
        (6, "lower max_num_seqs to 3$"),
        (3, "lower max_num_seqs to 2 and num_state_checkpoints to 0"),
        (1, "not even one sequence fits"),
    ):
        with pytest.raises(CapacityError, match=message):
            make(QWEN, budget_bytes=rows * per_slot + pages)
    assert make(QWEN, budget_bytes=6 * per_slot + pages, max_num_seqs=3).max_model_len == 16


layers = st.lists(
    st.one_of(
        st.builds(PagedKVSpec, st.integers(1, 4), st.integers(1, 8)),
        st.builds(LinearStateSpec, *[st.integers(1, 6)] * 5),
    ),
    min_size=1,
    max_size=4,
)


@settings(deadline=None, max_examples=300)
@given(
    specs=layers,
    budget=st.integers(0, 20_000),
    dtype_bytes=st.sampled_from([2, 4]),
    max_model_len=st.none() | st.integers(1, 70),
    kv_cache_tokens=st.none() | st.integers(1, 200),
    max_num_seqs=st.integers(1, 5),
    block_size=st.integers(1, 8),
    num_checkpoints=st.integers(0, 3),
)
def test_every_plan_fits_and_every_refusal_is_right(specs, budget, **config):
    def attempt(**changes) -> CachePlan:
        return plan(specs, model_max_len=64, budget_bytes=budget, **(config | changes))

    try:
        p = attempt()
    except CapacityError as error:
        follow_the_advice(str(error), attempt)
        return
    size, hybrid = config["block_size"], any(isinstance(spec, LinearStateSpec) for spec in specs)
    assert p.kv_bytes + p.state_bytes <= budget
    assert p.kv_bytes == p.num_blocks * size * sum(kv_bytes_per_token(s, config["dtype_bytes"]) for s in specs)
    rows = 1 + config["max_num_seqs"] + config["num_checkpoints"] if hybrid else 0
    assert p.num_state_rows == rows and p.num_checkpoints == (config["num_checkpoints"] if hybrid else 0)
    assert p.state_bytes == rows * sum(state_bytes_per_slot(s, config["dtype_bytes"]) for s in specs)
    assert (p.num_blocks - 1) * size >= p.max_model_len >= 1, "one whole sequence"
    assert p.max_model_len == (config["max_model_len"] or p.max_model_len) <= 64
    assert config["max_model_len"] or p.max_model_len == 64 or any("max_model_len reduced" in note for note in p.notes)
    if config["kv_cache_tokens"]:
        assert p.num_blocks - 1 == -(-config["kv_cache_tokens"] // size)


def follow_the_advice(message: str, attempt) -> None:
    """Doing what the error lines say leads to a plan, after one line for each setting that was too large."""
    config: dict[str, int] = {}
    for _ in range(5):
        if "free memory" in message:
            return
        advice = read_advice(message)
        assert advice and all(config.get(name) != value for name, value in advice.items()), message
        config |= advice
        try:
            attempt(**config)
        except CapacityError as error:
            message = str(error)
        else:
            return
    raise AssertionError(f"the advice does not lead to a plan: {message}")


def read_advice(message: str) -> dict[str, int]:
    names = r"(max_num_seqs|num_state_checkpoints|max_model_len)"
    found = {name: int(n) for name, n in re.findall(rf"(?:lower|and) {names} to (\d+)", message)}
    for pattern in (r"(max_model_len|kv_cache_tokens) .*holds (\d+) tokens", r"(max_model_len) .*model's (\d+)"):
        found |= {name: int(n) for name, n in re.findall(pattern, message)}
    if "num_state_checkpoints" in found:
        found["num_checkpoints"] = found.pop("num_state_checkpoints")
    if "or lower max_model_len" in message:
        found = {"max_model_len": found["max_model_len"]}
    return found


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 50, "5120.0 TiB")]
)
def test_format_bytes(n, text):
    assert format_bytes(n) == text
