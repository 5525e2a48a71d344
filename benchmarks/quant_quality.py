"""What quantisation costs in quality: KL divergence, perplexity and greedy text of each scheme, as a Markdown table.

    python benchmarks/quant_quality.py                            # both canaries
    python benchmarks/quant_quality.py canary-llama DIR --texts texts.jsonl

The reference is the same model in fp32. The bfloat16 row shows what the dtype alone costs; the schemes run in bfloat16.
Texts: a canary's own questions with their answers; of any other model, 20 samples of 200 tokens that the fp32 model
draws itself at temperature 1 (seed i for sample i), or the "text" of each line of --texts.
KL is the mean over all positions of KL(fp32 || other) in nats; "same choice" the share of positions with the same most
likely token; "same text" how many of the first 20 prompts are continued greedily word for word as bfloat16 does.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from surefoot import canaries
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine

ROWS: dict[str, dict] = {
    "bfloat16": {},
    "w8a16": {"quant": "w8a16"},
    "w8a8": {"quant": "w8a8"},
    "w8a8, lm_head too": {"quant": "w8a8", "quant_lm_head": True},
    "w4a16, groups of 32": {"quant": "w4a16"},
    "w4a16, groups of 128": {"quant": "w4a16", "quant_group_size": 128},
    "w4a16, groups of 32, lm_head too": {"quant": "w4a16", "quant_lm_head": True},
    "w4a8, groups of 32": {"quant": "w4a8"},
}
BEGINNINGS = ("Once upon a time", "One day", "Lily", "The little dog", "Tom and his mom")
SAMPLES, SAMPLE_TOKENS, GREEDY_TOKENS = 20, 200, 64


@dataclass
class Texts:
    """sequences: scored whole; first: index of the first token that counts; prompts: continued greedily."""

    sequences: list[list[int]]
    first: list[int]
    prompts: list[list[int]]


@dataclass
class Score:
    kl: float
    same_choice: float
    perplexity: float


def texts_of(model: str, engine: Engine, file: Path | None) -> Texts:
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise SystemExit(f"{model} has no tokenizer")
    if file is not None:
        sequences = [tokenizer.encode(json.loads(line)["text"]) for line in file.read_text("utf-8").splitlines()]
        return Texts(sequences, [1] * len(sequences), [ids[: len(ids) // 2] for ids in sequences[:SAMPLES]])
    prompts, answers = [], []
    if model in canaries.CANARIES:
        for known in canaries.known_answers(model):
            chat = "messages" in known
            prompts.append(tokenizer.encode_chat(known["messages"]) if chat else tokenizer.encode(known["prompt"]))
            answers.append(tokenizer.encode(known["answer"], add_special_tokens=False))
        step = len(prompts) // SAMPLES
        return Texts([p + a for p, a in zip(prompts, answers)], [len(p) for p in prompts], prompts[::step][:SAMPLES])
    prompts = [tokenizer.encode(BEGINNINGS[i % len(BEGINNINGS)]) for i in range(SAMPLES)]
    params = [
        SamplingParams(max_tokens=SAMPLE_TOKENS, temperature=1.0, seed=i, ignore_eos=True) for i in range(SAMPLES)
    ]
    drawn = engine.generate(prompts, params)
    return Texts([p + c.token_ids for p, c in zip(prompts, drawn)], [len(p) for p in prompts], prompts)


def score(engine: Engine, texts: Texts, reference: list[torch.Tensor] | None) -> tuple[Score, list[torch.Tensor]]:
    """Against reference log-probabilities, [T, vocab] for each sequence (None: against itself)."""
    kl = agree = loss = 0.0
    count, kept = 0, []
    for i, (ids, first) in enumerate(zip(texts.sequences, texts.first)):
        (logits,) = engine.score([ids])
        ours = logits[first - 1 : -1].double().log_softmax(-1)
        theirs = ours if reference is None else reference[i]
        kept.append(ours)
        kl += float((theirs.exp() * (theirs - ours)).sum())
        agree += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
        loss -= float(ours.gather(-1, torch.tensor(ids[first:])[:, None]).sum())
        count += len(ours)
    return Score(kl / count, agree / count, math.exp(loss / count)), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(canaries.CANARIES))
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    common = {"kv_cache_tokens": 4096, "num_threads": options.threads}
    print("| model | weights | KL, nats | same choice | perplexity | same text | bits per weight, all tensors |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for model in options.models:
        engine = Engine.load(model, EngineConfig(dtype="float32", **common))
        texts = texts_of(model, engine, options.texts)
        own, reference = score(engine, texts, None)
        print(f"| {Path(model).name} | float32 | 0 | 1 | {own.perplexity:.4f} | | 32 |")
        greedy = None
        for name, settings in ROWS.items():
            try:
                engine = Engine.load(model, EngineConfig(dtype="bfloat16", **common, **settings))
            except InputError as error:
                print(f"| | {name} | {error} | | | | |")
                continue
            got, _ = score(engine, texts, reference)
            done = engine.generate(texts.prompts, SamplingParams(max_tokens=GREEDY_TOKENS))
            said = [c.token_ids for c in done]
            greedy = greedy or said
            same = sum(a == b for a, b in zip(greedy, said))
            bits = 8 * engine.info.weight_bytes / engine.info.num_parameters
            print(
                f"| | {name} | {got.kl:.1e} | {got.same_choice:.4f} | {got.perplexity:.4f} "
                f"| {same} of {len(said)} | {bits:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
