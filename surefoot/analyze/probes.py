"""Two small random models and the engine steps that a calibration times: big enough to leave the caches of a CPU, small
enough for a minute."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from surefoot.analyze.roofline import Step, decode_step, prefill_steps
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size")


def models(scale: int) -> list[dict[str, Any]]:
    """The probe configs, `scale` times narrower."""
    return [{k: v // scale if k in WIDTHS else v for k, v in config.items()} for config in (LLAMA, QWEN)]


def plan(prompts: Sequence[int], batches: Sequence[int], contexts: Sequence[int]) -> Iterator[tuple[str, Step]]:
    """(phase, step) of everything that is timed."""
    for prompt in prompts:
        yield "prefill", prefill_steps(prompt, prompt)[0]
    for context in contexts:
        for batch in batches:
            yield "decode", decode_step(batch, context)


def run(engine: Engine, phase: str, step: Step) -> float:
    """Wall seconds of this step, brought about by requests of these lengths; the engine is empty before and after."""
    decode = phase == "decode"
    params = SamplingParams(max_tokens=2 if decode else 1, ignore_eos=True, temperature=0.0)
    for i, length in enumerate(step.seq_lens):
        prompt = length - 1 if decode else length
        engine.add_request([(7 * i + 13 * j) % engine.vocab_size for j in range(max(1, prompt))], params)
    seconds = 0.0
    while engine.has_unfinished():
        started = time.perf_counter()
        engine.step()
        seconds = time.perf_counter() - started
    return seconds
