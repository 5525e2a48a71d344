"""Surefoot's engine against transformers, same weights, same dtype, same process, interleaved.

    python benchmarks/bench_transformers.py [MODEL] [--dtype bfloat16] [--repeats 5]

MODEL is a folder with a config.json; weights are random, drawn from one seed for both. Decode: seconds per step with B
sequences running, after a prompt of 64 tokens, median over steps and repeats. Prefill: seconds for one prompt of 512
tokens up to its first token. Inside the timed region: the forward pass, the head for the rows that need it, and the
choice of the token (greedy) brought to the host; outside: tokenisation and detokenisation. transformers decodes a batch
of equal lengths (its best case) with DynamicCache and SDPA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from surefoot.backends.transformers import TransformersBackend
from surefoot.core.config import EngineConfig
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine

PROMPT, STEPS, PREFILL = 64, 8, 512


def prompt(length: int, seed: int, vocab: int) -> list[int]:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def native_decode(engine: Engine, batch: int) -> float:
    """Median seconds of a step that decodes `batch` sequences."""
    params = SamplingParams(max_tokens=STEPS + 1, ignore_eos=True)
    for i in range(batch):
        engine.add_request(prompt(PROMPT, i, engine.vocab_size), params)
    times = []
    while engine.has_unfinished():
        started = time.perf_counter()
        outputs = engine.step()
        if len(outputs) == batch and all(o.num_output_tokens > 1 for o in outputs):
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def native_prefill(engine: Engine, seed: int) -> float:
    engine.add_request(prompt(PREFILL, seed, engine.vocab_size), SamplingParams(max_tokens=1, ignore_eos=True))
    started = time.perf_counter()
    while engine.has_unfinished():
        engine.step()
    return time.perf_counter() - started


@torch.inference_mode()
def hf_decode(model, batch: int, vocab: int) -> float:
    ids = torch.tensor([prompt(PROMPT, i, vocab) for i in range(batch)])
    result = model(ids, use_cache=True, logits_to_keep=1)
    times = []
    for _ in range(STEPS):
        token = result.logits[:, -1].argmax(-1)
        started = time.perf_counter()
        result = model(token[:, None], past_key_values=result.past_key_values, use_cache=True, logits_to_keep=1)
        result.logits[:, -1].argmax(-1).tolist()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@torch.inference_mode()
def hf_prefill(model, seed: int, vocab: int) -> float:
    ids = torch.tensor([prompt(PREFILL, seed, vocab)])
    started = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).tolist()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="../shared/data/models/llama-3.2-1b-instruct")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = EngineConfig(
        dtype=args.dtype, random_weights=0, max_model_len=1024, kv_cache_tokens=8192, enable_prefix_caching=False
    )
    engine = Engine.load(args.model, config)
    reference = TransformersBackend(args.model, config)
    vocab = engine.vocab_size
    cases = {
        "decode, batch 1": (lambda r: native_decode(engine, 1), lambda r: hf_decode(reference.model, 1, vocab), 1),
        "decode, batch 8": (lambda r: native_decode(engine, 8), lambda r: hf_decode(reference.model, 8, vocab), 8),
        "prefill 512": (lambda r: native_prefill(engine, r), lambda r: hf_prefill(reference.model, r, vocab), PREFILL),
    }
    print(f"{args.model}, {args.dtype}, {torch.get_num_threads()} threads, {args.repeats} repeats after one warm-up")
    print(f"{'':18}{'surefoot tok/s':>16}{'transformers tok/s':>20}{'ratio (median of pairs, min..max)':>36}")
    records = []
    for name, (ours, theirs, per_step) in cases.items():
        ours(-1), theirs(-1)
        pairs = [(ours(r), theirs(r)) for r in range(args.repeats)]
        ratios = sorted(b / a for a, b in pairs)
        mine, other = (per_step / statistics.median(column) for column in zip(*pairs))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f})"
        print(f"{name:18}{mine:16.1f}{other:20.1f}{spread:>36}")
        records.append({"case": name, "surefoot_s": [a for a, _ in pairs], "transformers_s": [b for _, b in pairs]})
    print(json.dumps({"dtype": args.dtype, "ops": engine.info.ops, "versions": engine.info.versions, "raw": records}))


if __name__ == "__main__":
    main()
