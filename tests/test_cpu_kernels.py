"""The C++ kernels on every instruction set that this machine runs: against the references, alone against batched, with
NaN and infinity, strided views, other thread counts; and the package without them."""

from __future__ import annotations

import copy
import mmap
import subprocess
import sys
import warnings

import pytest
import torch

from surefoot import ops
from surefoot.ops import cpu
from surefoot.ops.attention import paged_sample
from surefoot.ops.spec import REGISTRY

pytestmark = pytest.mark.skipif(cpu.kernels is None, reason="the C++ kernels are not built here")
ISAS = cpu.kernels.isas() if cpu.kernels else []
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=ISAS)
def isa(request):
    before = cpu.kernels.isa()
    cpu.kernels.set_isa(request.param)
    yield request.param
    cpu.kernels.set_isa(before)


@pytest.fixture
def threads():
    """Sets the number of threads and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def kernel(op: str):
    """The registered C++ implementation of an op."""
    return next(i for i in REGISTRY[op].implementations if i.device == "cpu")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


OPS = [name for name, spec in REGISTRY.items() if any(i.device == "cpu" for i in spec.implementations)]


@pytest.mark.parametrize("op", OPS)
def test_every_sample_equals_the_reference(isa, op):
    spec, impl = REGISTRY[op], kernel(op)
    for sample in spec.samples():
        for dtype in DTYPES:
            call = sample.make(dtype, torch.device("cpu"), torch.Generator().manual_seed(1))
            if not impl.supports(**call):
                continue
            exact = {
                k: v.float().clone() if isinstance(v, torch.Tensor) and v.is_floating_point() else copy.deepcopy(v)
                for k, v in call.items()
            }
            expected, actual = spec.reference(**exact), impl.fn(**call)
            expected = [*expected] if isinstance(expected, tuple) else [expected]
            actual = [*actual] if isinstance(actual, tuple) else [actual]
            expected += [exact[name] for name in spec.mutates]
            actual += [call[name] for name in spec.mutates]
            tol = spec.tolerance[dtype]
            for a, e in zip(actual, expected):
                if e is not None:
                    torch.testing.assert_close(
                        a.float(), e.float(), atol=tol.atol, rtol=tol.rtol, msg=f"{sample.name} {dtype}"
                    )


def test_every_op_has_a_kernel():
    assert set(REGISTRY) == set(OPS)


def test_isa_is_refused_when_unknown():
    with pytest.raises(ValueError, match="avx9000"):
        cpu.kernels.set_isa("avx9000")
    with pytest.raises(TypeError, match="expected 17 arguments"):
        cpu.kernels.linear(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner,outer", [(2048, 64), (100, 9), (1, 3), (8192, 12)])
def test_a_token_is_bitwise_the_same_in_any_batch(isa, dtype, inner, outer):
    x, w, bias = randn(70, inner, dtype=dtype), randn(outer, inner, dtype=dtype, seed=1), randn(outer, dtype=dtype)
    alone = torch.cat([ops.linear(row, w, bias) for row in x.split(1)])
    for rows in (2, 5, 8, 13, 64, 70):
        assert torch.equal(ops.linear(x[:rows], w, bias), alone[:rows]), rows


def test_linear_takes_strided_rows_and_every_tail(isa):
    whole = randn(5, 300)
    for inner in (1, 7, 15, 16, 17, 31, 33, 63, 65, 127, 129):
        x, w = whole[:, 3 : 3 + inner], randn(11, inner, seed=2)
        torch.testing.assert_close(ops.linear(x, w), x @ w.t(), atol=1e-4, rtol=1e-4)
        half = x.bfloat16()
        expected = half.float() @ w.bfloat16().float().t()
        torch.testing.assert_close(ops.linear(half, w.bfloat16()).float(), expected, atol=3e-2, rtol=3e-2)


def test_linear_keeps_nan_and_infinity_in_their_row(isa):
    x, w = randn(4, 128), randn(6, 128, seed=1).abs()
    x[1, 5], x[2, 127] = torch.nan, torch.inf
    for dtype in DTYPES:
        y = ops.linear(x.to(dtype), w.to(dtype))
        assert y[1].isnan().all() and (y[2] == torch.inf).all()
        assert y[0].isfinite().all() and y[3].isfinite().all()


def test_float_conversions_equal_pytorch(isa):
    """Every bf16 and fp16 bit pattern in, and out again, through a norm with weight one."""
    for dtype in (torch.bfloat16, torch.float16):
        bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        x = bits.view(dtype).view(-1, 64)
        total = ops.add_rms_norm(x, torch.zeros_like(x), torch.ones(64), 1e-6)[1]
        assert torch.equal(total.isnan(), x.isnan())
        assert torch.equal(total[~x.isnan()], x[~x.isnan()])
        a = randn(*x.shape, dtype=dtype)
        assert torch.equal(ops.add_rms_norm(a, x, torch.ones(64), 1e-6)[1].nan_to_num(), (a + x).nan_to_num())


def test_gates_reach_their_limits(isa):
    far = torch.tensor([[-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4, torch.nan]])
    one = torch.ones_like(far)
    torch.testing.assert_close(ops.sigmoid_mul(one, far), torch.sigmoid(far), equal_nan=True)
    torch.testing.assert_close(ops.swiglu(far, one), torch.nn.functional.silu(far), equal_nan=True)


def test_addition_is_pytorchs_bit_by_bit(isa, threads):
    threads(2)
    for dtype in DTYPES:
        for rows, width in [(1, 2048), (8, 2048), (40, 1030), (3, 7), (1, 1)]:
            x, y = randn(rows, width, dtype=dtype), randn(rows, width, dtype=dtype, seed=1) * 100
            x[0, 0], y[-1, -1], x[rows // 2, width // 2] = torch.nan, torch.inf, -torch.inf
            assert torch.equal(ops.add(x, y).nan_to_num(1234.0), (x + y).nan_to_num(1234.0)), (dtype, rows, width)
    wide = randn(6, 64)
    assert torch.equal(ops.add(wide[:, 8:24], wide[:, 32:48]), wide[:, 8:24] + wide[:, 32:48])
    assert torch.equal(ops.add(wide, wide[0]), wide + wide[0]), "what has to be broadcast is PyTorch's"


def test_angles_of_a_token_are_the_same_in_any_batch(threads):
    positions, inv_freq = torch.tensor([131071, 0, 77, *range(200)]), 1.0 / 5e5 ** (torch.arange(0, 64, 2) / 64)
    angle = positions.double().float().unsqueeze(-1) * inv_freq
    threads(2)
    cos, sin = ops.rotary_angles(positions, inv_freq)
    torch.testing.assert_close(cos.double(), angle.double().cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(sin.double(), angle.double().sin(), atol=1e-7, rtol=0)
    for i in (0, 1, 2, 150):
        alone = ops.rotary_angles(positions[i : i + 1], inv_freq)
        assert torch.equal(alone[0][0], cos[i]) and torch.equal(alone[1][0], sin[i])


def test_embedding_takes_rows_of_any_size_from_a_mapped_file(tmp_path, threads):
    """Also a file whose pages are not in memory, and rows that begin within a page."""
    threads(2)
    for width, dtype in [(2048, torch.bfloat16), (33, torch.float32), (7, torch.float16)]:
        table = randn(300, width, dtype=dtype)
        (tmp_path / "table").write_bytes(b"123456" + table.view(torch.uint8).numpy().tobytes())
        with open(tmp_path / "table", "r+b") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        mapped = torch.frombuffer(pages, dtype=dtype, offset=6, count=table.numel()).view(300, width)
        ids = torch.randint(0, 300, (129,), generator=torch.Generator().manual_seed(0))
        for rows in (ids, ids[:1], ids[:8]):
            assert torch.equal(ops.embedding(rows, mapped), table[rows])


def test_embedding_refuses_what_is_outside_the_table(threads):
    table = randn(10, 4)
    for bad in (-1, 10, 1 << 40):
        with pytest.raises(IndexError, match="of a table of 10"):
            ops.embedding(torch.tensor([3, bad]), table)


def attention_call(query_lens, seq_lens, dtype=torch.float32, heads=8, kv_heads=2, dim=64, block_size=16):
    gen = torch.Generator().manual_seed(3)
    return paged_sample(dtype, torch.device("cpu"), gen, query_lens, seq_lens, heads, kv_heads, dim, block_size)


def one_request(call, i):
    """Request i of an attention call alone."""
    start = call["query_start_loc"].tolist()
    n = call["query_lens_host"][i]
    return call | {
        "q": call["q"][start[i] : start[i + 1]],
        "block_table": call["block_table"][i : i + 1].contiguous(),
        "query_start_loc": torch.tensor([0, n], dtype=torch.int32),
        "seq_lens": call["seq_lens"][i : i + 1].contiguous(),
        "query_lens_host": [n],
        "seq_lens_host": [call["seq_lens_host"][i]],
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_alone_equals_batched(isa, dtype):
    call = attention_call([1, 1, 40, 7, 1], [1, 1500, 90, 7, 513], dtype)
    together = ops.paged_attention(**call).split(call["query_lens_host"])
    for i, expected in enumerate(together):
        assert torch.equal(ops.paged_attention(**one_request(call, i)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 2, 64), (3, 1, 20)])
def test_attention_of_a_chunk_equals_that_of_the_whole(isa, dtype, shape):
    """Chunks of one to four tokens run on the decode kernel, and 512 is where its parts meet."""
    whole = attention_call([600], [600], dtype, *shape)
    expected = ops.paged_attention(**whole)
    chunks = (
        (0, 64),
        (64, 67),
        (67, 199),
        (190, 200),
        (0, 1),
        (63, 64),
        (511, 512),
        (512, 513),
        (510, 514),
        (595, 600),
    )
    for begin, end in (*chunks, (599, 600)):
        part = whole | {
            "q": whole["q"][begin:end],
            "query_start_loc": torch.tensor([0, end - begin], dtype=torch.int32),
            "seq_lens": torch.tensor([end], dtype=torch.int32),
            "query_lens_host": [end - begin],
            "seq_lens_host": [end],
        }
        assert torch.equal(ops.paged_attention(**part), expected[begin:end]), (begin, end)


def test_decode_attention_rounds_little_more_than_its_result(isa):
    """Where weights of the softmax are bf16: at most half as much error again, against fp32, as rounding makes."""
    call = attention_call([1, 1, 1], [100, 700, 2000], torch.bfloat16)
    exact = ops.paged_attention(**{k: v.float() if k in ("q", "k_cache", "v_cache") else v for k, v in call.items()})
    error = (ops.paged_attention(**call).float() - exact).square().mean().sqrt()
    assert error < 1.5 * (exact.bfloat16().float() - exact).square().mean().sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_ignores_garbage_in_free_slots(isa, dtype):
    """NaN behind a request's last token, and in pages that nobody owns, must not be seen."""
    for lens in (([1, 1], [17, 5]), ([9, 30], [17, 30])):
        call = attention_call(*lens, dtype)
        expected = ops.paged_attention(**call)
        used = torch.zeros(call["k_cache"].shape[:2], dtype=torch.bool)
        for row, length in zip(call["block_table"], call["seq_lens_host"]):
            for t in range(length):
                used[row[t // 16], t % 16] = True
        call["k_cache"][~used] = torch.nan
        call["v_cache"][~used] = torch.nan
        assert torch.equal(ops.paged_attention(**call), expected)


def test_attention_shows_nan_of_a_used_slot(isa):
    call = attention_call([1, 1], [17, 5])
    call["k_cache"][call["block_table"][0, 1], 0] = torch.nan
    out = ops.paged_attention(**call)
    assert out[0].isnan().all() and out[1].isfinite().all()


def delta_call(lens, heads=4, dk=32, dv=40, dtype=torch.float32):
    total, n = sum(lens), len(lens)
    return {
        "q": randn(total, 2, dk, dtype=dtype, seed=1),
        "k": randn(total, 2, dk, dtype=dtype, seed=2),
        "v": randn(total, heads, dv, dtype=dtype, seed=3),
        "g": -randn(total, heads, seed=4).abs(),
        "beta": randn(total, heads, seed=5).sigmoid(),
        "state": randn(n + 1, heads, dk, dv, seed=6),
        "slots": torch.arange(n) + 1,
        "query_start_loc": torch.tensor([0, *torch.tensor(lens).cumsum(0)], dtype=torch.int32),
        "query_lens_host": list(lens),
    }


def test_delta_rule_in_chunks_equals_the_whole_bitwise(isa):
    whole = delta_call([70])
    parts = copy.deepcopy(whole)
    expected = ops.gated_delta_chunk(**whole)
    got = []
    for begin, end in ((0, 1), (1, 2), (2, 40), (40, 70)):
        part = {k: parts[k][begin:end] for k in ("q", "k", "v", "g", "beta")}
        part |= {"state": parts["state"], "slots": parts["slots"]}
        if end - begin == 1:
            got.append(ops.gated_delta_step(**part))
        else:
            starts = torch.tensor([0, end - begin], dtype=torch.int32)
            got.append(ops.gated_delta_chunk(**part, query_start_loc=starts, query_lens_host=[end - begin]))
    assert torch.equal(torch.cat(got), expected)
    assert torch.equal(parts["state"], whole["state"])


def test_delta_rule_takes_views_of_one_projection(isa):
    mixed = randn(6, 2 * 32 + 2 * 32 + 4 * 40)
    call = delta_call([6])
    views = dict(zip(("q", "k", "v"), mixed.split([64, 64, 160], dim=-1)))
    heads = {"q": (2, 32), "k": (2, 32), "v": (4, 40)}
    views = {name: x.unflatten(-1, heads[name]) for name, x in views.items()}
    copies = {name: x.contiguous() for name, x in views.items()}
    expected = ops.gated_delta_chunk(**copy.deepcopy(call) | copies)
    assert kernel("gated_delta_chunk").supports(**call | views)
    assert torch.equal(ops.gated_delta_chunk(**call | views), expected)


def test_norm_takes_interleaved_heads(isa):
    """Qwen3.5 packs each head's query beside its gate: rows 2 x D apart."""
    q, gate = randn(5, 4, 2, 64).unbind(-2)
    assert kernel("rms_norm").supports(q, torch.ones(64), 1e-6)
    assert torch.equal(ops.rms_norm(q, torch.ones(64), 1e-6), ops.rms_norm(q.contiguous(), torch.ones(64), 1e-6))
    expected = ops.gated_rms_norm(q.contiguous(), gate.contiguous(), torch.ones(64), 1e-6)
    assert torch.equal(ops.gated_rms_norm(q, gate, torch.ones(64), 1e-6), expected)


def test_the_number_of_threads_changes_nothing(isa, threads):
    x, w = randn(9, 512), randn(300, 512, seed=1)
    call, delta = attention_call([1, 40], [700, 300]), delta_call([40, 3])
    results = []
    for n in (1, 2, 3):
        threads(n)
        results.append([ops.linear(x, w), ops.paged_attention(**call), ops.gated_delta_chunk(**copy.deepcopy(delta))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_without_the_extension_everything_runs_and_says_so_once():
    code = """
import sys, warnings
sys.modules["surefoot.ops.cpu._kernels"] = None
import torch
from surefoot import ops
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("default")
    for _ in range(3):
        y = ops.linear(torch.ones(2, 3), torch.ones(4, 3))
assert ops.cpu.kernels is None and ops.cpu.instruction_set() is None
assert ops.chosen() == {"linear/cpu": "reference"}, ops.chosen()
assert torch.equal(y, torch.full((2, 4), 3.0))
print(len(seen), str(seen[0].message))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 ") and "kernels are not built" in done.stdout


def test_kernels_without_vector_instructions_are_named():
    """They are right and slow; every other set of instructions needs no word."""
    assert "no AVX2" in cpu.why_slow("portable") and "C++17 compiler" in cpu.why_slow(None)
    assert {cpu.why_slow(name) for name in ("avx2", "avx512_bf16", "neon")} == {None}


def test_no_warning_with_the_extension():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.linear(torch.ones(2, 3), torch.ones(4, 3))


def test_kernels_of_another_version_are_left_alone():
    code = """
import types, sys, warnings
old = types.ModuleType("surefoot.ops.cpu._kernels")
sys.modules["surefoot.ops.cpu._kernels"] = old
import surefoot.ops.cpu as cpu
print(cpu.kernels, cpu.state)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "None older or newer than its Python files", done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_argmax_is_torchs_and_says_where_there_is_none(isa, dtype):
    """First of equals, across blocks; rows with NaN, infinities, or nothing at all; strided rows."""
    logits = torch.randn(9, 1601, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, 700] = logits[1, 1600] = logits[1, 900] = 9.0
    logits[2, 5] = torch.nan
    logits[3, :] = -torch.inf
    logits[4, ::2], logits[4, 31] = -torch.inf, 7.0
    logits[5, 40] = logits[5, 3] = torch.inf
    logits[6] = -1000.0
    logits[7] = 0.0
    for x in (logits, logits[:, :1], logits[:, 1:1400], logits[::2], logits[:, :17]):
        best, index = cpu.argmax(x)
        expected, where = x.max(-1)
        torch.testing.assert_close(best, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(index, torch.where(expected > -torch.inf, where, -1))
    assert cpu.argmax(logits.t()) is None and cpu.argmax(logits[:0]) is None
