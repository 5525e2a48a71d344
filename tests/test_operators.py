"""Operator coverage: a trace on meta equals the trace of a run with real numbers, and each kind of answer is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from real_device import RealTracer, put

from surefoot import canaries
from surefoot.analyze import hf, native, show
from surefoot.analyze.check import check_operators
from surefoot.analyze.coverage import cover
from surefoot.analyze.registry import Registry, Status, available, load
from surefoot.analyze.trace import Tracer
from surefoot.cli.main import run_cli
from surefoot.core.errors import InputError, ModelError
from surefoot.core.sampling import SamplingParams
from surefoot.models.registry import build
from surefoot.ops.npu import attention as npu_attention
from surefoot.ops.npu import common as npu_common
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.load import load_weights
from surefoot.weights.tokenizer import Tokenizer

MODELS = Path(__file__).parents[2] / "shared" / "data" / "models"
REAL_SHAPES = ["llama-3.2-1b-instruct", "llama-3.2-3b-instruct", "qwen3.5-0.8b-base"]
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": None, "eos_token_id": None}
ARCHITECTURES = {
    "gpt2": GPT,
    "gptj": GPT | {"rotary_dim": 4},
    "llama": TINY,
    "mistral": TINY | {"sliding_window": 16},
    "qwen2": TINY,
    "qwen3": TINY | {"head_dim": 8},
    "gemma2": TINY | {"head_dim": 8, "sliding_window": 16},
    "phi3": TINY | {"pad_token_id": 0},
    "opt": TINY | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": TINY | {"n_head": 4},
    "falcon": TINY,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99},
    "mixtral": TINY | {"num_local_experts": 4},
    "gpt_oss": TINY | {"head_dim": 8, "num_local_experts": 4},
    "qwen3_5_text": TINY
    | {"num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    | {"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "t5": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 99},
}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load()


def found(tracer: Tracer, shapes: bool = True) -> dict:
    return {
        key: (use.calls, sorted(use.parts_of), use.status, use.shapes if shapes else None)
        for key, use in tracer.found.items()
    }


def tracers(registry: Registry) -> tuple[RealTracer, RealTracer]:
    return RealTracer(registry), RealTracer(registry)


def config_of(name: str):
    transformers = pytest.importorskip("transformers")
    try:
        return transformers.AutoConfig.for_model(name, **ARCHITECTURES[name])
    except ValueError:
        pytest.skip(f"this transformers has no {name}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_meta_equals_a_real_run_for_transformers_models(registry, name):
    config = config_of(name)
    *meta, incomplete = hf.trace_config(config, registry, batch=2, prompt=24)
    assert incomplete is None
    torch.manual_seed(0)
    model = put(hf.build(config, device="cpu"))
    real = tracers(registry)
    hf.run_workload(model, real, 2, 24)
    for a, b in zip(meta, real):
        assert a.passes == b.passes == 2 and len(a.found) > 20
        assert found(a) == found(b)
    answer = cover(name, "transformers", registry, meta)
    assert answer.runs is True, answer.verdict


def loaded(name: str) -> torch.nn.Module:
    checkpoint = Checkpoint(canaries.path(name))
    model = build(checkpoint.config)
    load_weights(model, checkpoint, torch.device("cpu"), torch.bfloat16)
    return put(model)


def forget_constants() -> None:
    """Constants are kept by device, and here two kinds of tensor say that they are on the same one."""
    npu_attention._causal_mask.cache_clear()
    npu_common.filled.cache_clear()


@pytest.fixture(autouse=True)
def own_constants():
    forget_constants()
    yield
    forget_constants()


def real_engine(model, config, pair):
    with torch.inference_mode(), RealTracer(pair[0].registry):
        return native.traced_engine(model, torch.bfloat16, config, pair)


@pytest.mark.parametrize(
    "name,sampling,shapes",
    [
        ("canary-llama", native.SAMPLING[:3], True),
        ("canary-qwen3.5", native.SAMPLING[:3], True),
        # How many tokens a penalty touches depends on which tokens came out: with it, shapes are not compared.
        ("canary-llama", native.SAMPLING[3:], False),
    ],
)
def test_meta_equals_a_real_run_of_the_engine(registry, name, sampling, shapes):
    config = json.loads((canaries.path(name) / "config.json").read_text())
    longest, batch = 20, 3
    real, meta = tracers(registry), (Tracer(registry, answer_host=True), Tracer(registry, answer_host=True))
    workload = native.workload_config(longest, batch)
    native.run_workload(real_engine(loaded(name), workload, real), longest, batch, sampling)
    forget_constants()
    bare = build(config)
    native.meta_weights(bare, torch.bfloat16)
    native.run_workload(native.traced_engine(bare, torch.bfloat16, workload, meta), longest, batch, sampling)
    for a, b in zip(meta, real):
        assert a.passes == b.passes > 1
        assert found(a, shapes) == found(b, shapes)


def test_the_real_run_computes_the_known_answers(registry):
    """The stand-in device is no fake: a canary answers on it."""
    name = canaries.CANARIES[0]
    answer = canaries.known_answers(name)[0]
    tokenizer = Tokenizer.load(canaries.path(name))
    expected = tokenizer.encode(answer["answer"], add_special_tokens=False)[:12]
    engine = real_engine(loaded(name), native.workload_config(64, 2), tracers(registry))
    (done,) = engine.generate([tokenizer.encode_chat(answer["messages"])], SamplingParams(max_tokens=len(expected)))
    assert done.token_ids == expected


@pytest.mark.parametrize("name", REAL_SHAPES)
@pytest.mark.parametrize("through", ["native", "transformers"])
def test_real_shapes_without_weights(name, through):
    folder = MODELS / name
    if not folder.exists():
        pytest.skip(f"no test data at {folder}")
    coverage = check_operators(str(folder), through=through, batch=2, prompt=20)
    assert coverage.runs is True and coverage.verdict.startswith("runs: all ")
    assert coverage.count(Status.FALLBACK) == coverage.count(Status.UNKNOWN) == 0
    config = json.loads((folder / "config.json").read_text())
    hidden = config.get("text_config", config)["hidden_size"]
    assert any(f", {hidden}]" in row.shapes for row in coverage.rows if row.phase == "decode")
    assert not any("float64" in row.dtypes for row in coverage.rows)


class Planted(torch.nn.Module):
    """Prefill and decode are both one call of `code`."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    def forward(self, x):
        return self.code(x)


def traced(registry: Registry, code, incomplete=None):
    tracer = Tracer(registry)
    with torch.inference_mode(), tracer:
        Planted(code)(torch.empty(4, 8, device="meta"))
    tracer.passes = 1
    return cover("planted", "nothing", registry, [tracer], incomplete)


def test_a_fallback_is_named_and_its_cost_counted(registry):
    answer = traced(registry, lambda x: torch._int_mm(x.to(torch.int8), x.to(torch.int8).t()) + 1)
    (row,) = [r for r in answer.rows if r.status is Status.FALLBACK]
    assert row.operator == "aten::_int_mm" and row.bytes == 4 * 8 + 8 * 4 + 4 * 4 * 4
    assert answer.verdict == "runs with 1 CPU fallback (aten::_int_mm), moving 128 B a prefill pass"
    assert answer.runs is True
    assert "128 B to the host and back" in show.table(answer, everything=False)


def test_a_fallback_inside_a_composite_is_found():
    sets = ({"empty.memory_format"}, {"mm"}, {"linear", "matmul"}, {"t", "transpose.int"})
    bare = Registry("0", torch.__version__, *map(frozenset, sets))
    weight = torch.empty(3, 8, device="meta")
    answer = traced(bare, lambda x: torch.nn.functional.linear(x, weight))
    statuses = {r.operator: r.status for r in answer.rows}
    assert statuses["aten::linear"] is Status.COMPOSITE and statuses["aten::mm"] is Status.FALLBACK
    assert next(r for r in answer.rows if r.operator == "aten::mm").part_of == "aten::linear"


def test_missing_unknown_and_incomplete_are_never_supported(registry):
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    answer = traced(registry, lambda x: flash(*[x.view(1, 1, 4, 8)] * 3))
    if torch.__version__.startswith("2.13"):
        assert answer.runs is False
        assert answer.verdict.startswith("will not run because torch-npu 2.13.0 has nothing for aten::_scaled_dot")
    else:
        assert answer.runs is None

    library = torch.library.Library("surefoot_test", "DEF")
    library.define("mystery(Tensor x) -> Tensor")
    library.impl("mystery", torch.empty_like, "Meta")
    answer = traced(registry, lambda x: torch.ops.surefoot_test.mystery(x))
    assert answer.runs is None
    assert answer.verdict == "cannot be told: nothing is known about surefoot_test::mystery"
    library._destroy()

    assert traced(registry, lambda x: x, "it stopped").verdict == "cannot be told: it stopped"
    assert cover("m", "t", registry, []).verdict == "cannot be told: the trace saw no operator"


def test_an_unknown_custom_op_made_of_known_ones_is_taken_apart(registry):
    library = torch.library.Library("surefoot_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
    answer = traced(registry, lambda x: torch.ops.surefoot_test.twice(x))
    assert answer.runs is True and "aten::add.Tensor" in {r.operator for r in answer.rows}
    library._destroy()


def test_a_model_that_reads_values_is_incomplete(registry):
    config = config_of("llama")

    def look(self, *args, **kwargs):
        return {} if float(self.lm_head.weight.sum()) > 0 else None

    model = hf.build(config)
    model.forward = look.__get__(model)
    pair = Tracer(registry), Tracer(registry)
    with pytest.raises((RuntimeError, NotImplementedError)):
        hf.run_workload(model, pair, 1, 4)


def test_statuses_of_the_registry(registry):
    assert available() == ["2.13"]
    wanted = {
        "npu::npu_rms_norm": Status.FUSED,
        "atb::_npu_paged_attention": Status.FUSED,
        "aten::scaled_dot_product_attention": Status.FUSED,
        "aten::mm": Status.NATIVE,
        "c10d::allreduce_": Status.NATIVE,
        "aten::linear": Status.COMPOSITE,
        "aten::_int_mm": Status.FALLBACK,
        "aten::searchsorted.Scalar_out": Status.FALLBACK,
        "npu::npu_dropout_gen_mask": Status.UNSUPPORTED,
        "npu::no_such": Status.UNKNOWN,
        "flash_attn::fwd": Status.UNKNOWN,
        "aten::from_a_later_torch": Status.UNKNOWN,
    }
    assert {name: registry.status(name) for name in wanted} == wanted
    assert registry.status("aten::from_a_later_torch", "2.14.0") is Status.UNKNOWN
    assert registry.status("aten::_flash_attention_forward", "2.13.1+cpu") is Status.UNSUPPORTED


def test_the_registry_equals_the_given_one(registry):
    file = MODELS.parent / "npu" / "torch_npu-2.13-registry.json"
    if not file.exists():
        pytest.skip(f"no test data at {file}")
    given = json.loads(file.read_text())
    ours = {f"aten::{n}" for n in registry.kernels}
    # The given list has torch_npu's own operators once more under "aten::", where PyTorch has no schema for them.
    assert ours <= set(given["aten_pu1"])
    extra = {n.removeprefix("aten::") for n in set(given["aten_pu1"]) - ours}
    assert not any(torch._C._dispatch_has_kernel(f"aten::{n}") and n in registry.fallbacks for n in extra)
    assert extra <= set(registry.schemas) | {n for n in extra if not hasattr(torch.ops.aten, n.partition(".")[0])}
    assert {f"aten::{n}" for n in registry.fallbacks} == set(given["aten_cpu_fallback"])
    assert {f"npu::{n}": f"npu::{s}" for n, s in registry.schemas.items()} == given["npu_schemas"]


@pytest.mark.parametrize(
    "arguments,why",
    [
        ({"device": "cuda"}, "known for npu only"),
        ({"release": "1.8"}, "there is 2.13"),
        ({"through": "vllm"}, "unknown --through"),
        ({"dtype": "int8"}, "unknown dtype"),
    ],
)
def test_impossible_questions(arguments, why):
    with pytest.raises(InputError, match=why):
        check_operators("canary-llama", **arguments)


def test_a_config_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ModelError, match="does not know the model type") as error:
        check_operators(str(tmp_path))
    assert "\n" not in str(error.value)


def test_formats_agree():
    coverage = check_operators("canary-llama", batch=2, prompt=20)
    data = json.loads(json.dumps(coverage.as_dict()))
    assert data["runs"] is True and data["operators"]["native"]["decode"] > 20
    text, page = show.table(coverage), show.markdown(coverage)
    assert text.splitlines()[-1] == f"canary-llama: {data['verdict']}"
    assert page.splitlines()[0] == f"**canary-llama: {data['verdict']}**"
    assert page.count("| native | aten::") == sum(r["status"] == "native" for r in data["rows"])


def test_the_verb(capsys):
    assert (
        run_cli(["ops", "canary-llama", "--device", "npu", "--torch-npu", "2.13", "--batch", "1", "--prompt", "9"]) == 0
    )
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("canary-llama: runs: all ")
    assert run_cli(["ops", "canary-llama", "--format", "xml"]) == 2
    assert run_cli(["ops", "canary-llama", "--format", "json", "--problems"]) == 2
    assert run_cli(["ops", "no-such-folder"]) == 2
