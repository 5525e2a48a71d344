"""doctor, coverage, answers: is the installation sound, are the operators there, are known answers right?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from surefoot.bringup.stages.base import BAD, GOOD, WARN, Record, Work
from surefoot.weights.jsonfile import read_json_object


def run_doctor(work: Work) -> Record:
    from surefoot.bench.result import host
    from surefoot.bringup.doctor import examine
    from surefoot.bringup.machine import look
    from surefoot.device.probe import probe

    work.progress("looking at the installation", None)
    record = examine(look(), probe, work.settings.device.partition(":")[0]).as_dict()
    return record | {"host": host(), "model": _card(work)}


CARD = (
    "architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling",
    "rms_norm_eps", "tie_word_embeddings", "layer_types", "full_attention_interval", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim", "dtype",
    "torch_dtype",
)  # fmt: skip


def _card(work: Work) -> Record:
    """The model as its folder describes it: the config in short, files and sizes."""
    folder = Path(work.folder.manifest["model_folder"])
    config = read_json_object(folder / "config.json")
    text = config | (config.get("text_config") or {})
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    weights = [size for name, size in files.items() if name.endswith(".safetensors")]
    return {
        "name": work.settings.model,
        "config": {key: text[key] for key in CARD if text.get(key) not in (None, [], {})},
        "files": files,
        "weight_files": len(weights),
        "weight_file_bytes": sum(weights),
    }


def doctor_outcome(record: Record) -> tuple[str, str]:
    return (GOOD if record["ready"] else BAD), record["verdict"]


def run_coverage(work: Work) -> Record:
    """Against the NPU registry whatever the device is: it says what would happen there."""
    from surefoot.analyze.check import check_operators

    work.progress("tracing the operators", None)
    settings = work.settings
    return check_operators(settings.model, "npu", dtype=settings.dtype).as_dict()


def coverage_outcome(record: Record) -> tuple[str, str]:
    fallbacks = sum(record["operators"].get("CPU fallback", {}).values())
    level = BAD if record["runs"] is False else WARN if record["runs"] is None or fallbacks else GOOD
    return level, f"on an NPU: {record['verdict']}"


def run_answers(work: Work) -> Record:
    """The canaries' known answers in the dtype in question and in fp32, then this model's own sample answers."""
    import torch

    from surefoot.bringup import selftest
    from surefoot.engine.engine import Engine

    settings = work.settings
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    work.progress("loading the model", 0.0)
    engine = Engine.load(settings.model, settings.engine())
    samples = _samples(work, engine)
    info = engine.info.as_dict()
    del engine
    dtypes = tuple(dict.fromkeys((info["dtype"], "float32")))
    # The canaries check the device and its kernels; quantised they would not answer word for word.
    config = settings.engine(random_weights=None, quant=None, quant_group_size=None, quant_lm_head=False)

    def progress(what: str, fraction: float | None) -> None:
        work.progress(what, 0.3 + 0.7 * (fraction or 0.0))

    checks = selftest.run(config, dtypes, progress)
    passed, line = selftest.verdict(checks, str(info["device"]))
    return {
        "format": "surefoot-answers/1",
        "passed": passed,
        "verdict": line,
        "checks": [asdict(c) for c in checks],
        "num_checks": len(checks),
        "num_passed": sum(c.passed for c in checks),
        "info": info,
        "samples": samples,
    }


def _samples(work: Work, engine: Any) -> Record:
    """Greedy answers to the built-in prompts."""
    from surefoot.core.sampling import SamplingParams
    from surefoot.verify.prompts import built_in

    tokenizer = engine.tokenizer
    if tokenizer is None:
        return {"items": [], "why": "the model has no tokenizer"}
    work.progress("sample answers", 0.1)
    asked = built_in(tokenizer.has_chat_template).prompts
    ids = [tokenizer.encode_chat(p.messages) if p.messages else tokenizer.encode(p.text) for p in asked]
    done = engine.generate(ids, SamplingParams(max_tokens=work.settings.sample_tokens))
    items = [
        {
            "prompt": prompt.name,
            "form": "chat template" if prompt.messages else "plain text",
            "text": completion.text,
            "prompt_tokens": len(completion.prompt_token_ids),
            "output_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }
        for prompt, completion in zip(asked, done, strict=True)
    ]
    return {"sampling": "greedy", "max_tokens": work.settings.sample_tokens, "items": items}


def answers_outcome(record: Record) -> tuple[str, str]:
    return (GOOD if record["passed"] else BAD), record["verdict"]
