"""Train the canaries: ``python -m tools.train_canaries [--model llama|qwen3.5|all] [--out DIR]``."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from . import corpus
from .card import model_card
from .examples import Example, collate, encode_item, encode_prose, make_batches
from .recipes import LLAMA, RECIPES, Recipe, config_of, generation_config
from .vocabulary import build_tokenizer, save_tokenizer, special_ids, write_json

SEED = 20261121
THREADS = 2
HINGE_MARGIN = 10.0
KEEP_FLOAT32 = ("A_log", "linear_attn.norm.weight")  # as in the official Qwen3.5 files
DEFAULT_OUT = Path(__file__).resolve().parents[2] / "surefoot" / "canaries"


def build_model(recipe: Recipe, config: dict) -> nn.Module:
    """A freshly initialised model in float32."""
    torch.manual_seed(SEED)
    config = copy.deepcopy(config)  # the configuration classes add keys to the dictionaries they are given
    if recipe is LLAMA:
        return LlamaForCausalLM(LlamaConfig(**{**config, "torch_dtype": "float32"})).float()
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**{**config, "dtype": "float32"})).float()
    _spread_decays(model)
    return model


@torch.no_grad()
def _spread_decays(model: nn.Module) -> None:
    """Start the delta-net heads with half-lives from a few tokens to hundreds.

    The default initialisation forgets within a token or two, and then training finds it hard to remember anything.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.copy_(torch.linspace(1.0, 4.0, parameter.numel()).log())
        elif name.endswith("dt_bias"):
            step = torch.logspace(-3, -1, parameter.numel())
            parameter.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def round_bf16(weight: torch.Tensor) -> torch.Tensor:
    """The values that the file will hold."""
    return weight.to(torch.bfloat16).float()


def round_int4(weight: torch.Tensor, group: int) -> torch.Tensor:
    """What symmetric 4-bit quantisation in groups along the input would make of a matrix."""
    rows = weight.reshape(-1, min(group, weight.shape[-1]))
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / 7
    return ((rows / scale).round().clamp(-8, 7) * scale).reshape(weight.shape)


def add_noise(weight: torch.Tensor) -> torch.Tensor:
    """Noise of a few percent of each row's size."""
    return weight + torch.randn_like(weight) * weight.std(dim=-1, keepdim=True) * 0.04


DISTORTIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda w: w,
    lambda w: round_int4(w, 32),
    add_noise,
    lambda w: round_int4(w, 128),
]


@torch.no_grad()
def distort(model: nn.Module, step: int, noisy: bool) -> list[torch.Tensor]:
    """Round (and, in turn, disturb) the weights for one step; returns the exact ones for ``restore``.

    The gradient is taken at the rounded weights and applied to the exact ones (straight-through), so the model learns
    answers which survive bfloat16 and most of 4-bit quantisation.
    """
    exact = []
    for parameter in model.parameters():
        exact.append(parameter.detach().clone())
        value = parameter
        if noisy and parameter.ndim == 2:
            value = DISTORTIONS[step % len(DISTORTIONS)](value)
        parameter.copy_(round_bf16(value))
    return exact


@torch.no_grad()
def restore(model: nn.Module, exact: list[torch.Tensor]) -> None:
    """Undo ``distort``."""
    for parameter, value in zip(model.parameters(), exact, strict=True):
        parameter.copy_(value)


def margins_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """By how much the right token leads the best wrong one."""
    right = logits.gather(-1, targets[..., None]).squeeze(-1)
    wrong = logits.scatter(-1, targets[..., None], float("-inf")).amax(dim=-1)
    return right - wrong


def loss_of(model: nn.Module, batch: list[Example], hinge: float) -> torch.Tensor:
    """Cross entropy on everything (mostly on the answers), and later a hinge for answers that win narrowly."""
    ids, weight, answer = collate(batch)
    logits, targets = model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]
    entropy = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (entropy * weight.flatten()).sum() / weight.sum()
    if hinge and answer.any():
        narrow = (HINGE_MARGIN - margins_of(logits[answer], targets[answer])).clamp_min(0)
        loss = loss + hinge * narrow.mean()
    return loss


def endless(examples: list[Example], tokens: int) -> Iterator[list[Example]]:
    """Epoch after epoch of batches."""
    rng = random.Random(SEED)
    while True:
        yield from make_batches(examples, tokens, rng)


def _rate(step: int, steps: int) -> float:
    """Warm-up, then a cosine down to a hundredth."""
    if step < 50:
        return (step + 1) / 50
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - 50) / (steps - 50)))


def _optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))


def train(model: nn.Module, recipe: Recipe, examples: list[Example]) -> None:
    """The training loop: a fixed number of steps, so that the result depends on the seed only."""
    optimizer, batches, began = _optimizer(model, recipe.lr), endless(examples, recipe.batch_tokens), time.monotonic()
    model.train()
    mean = 0.0
    for step in range(recipe.steps):
        done = step / recipe.steps
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * _rate(step, recipe.steps)
        exact = distort(model, step, noisy=done > 0.3)
        loss = loss_of(model, next(batches), hinge=0.05 if done > 0.5 else 0.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        restore(model, exact)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1:5d}  loss {mean:.4f}  {time.monotonic() - began:6.1f} s", flush=True)
    model.eval()


@torch.no_grad()
def measure(model: nn.Module, examples: list[Example]) -> tuple[int, float, float]:
    """How many answers are greedily right, the smallest margin of all, and the mean of each answer's smallest."""
    model.eval()
    least = []
    for example in examples:
        ids = torch.tensor([example.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        least.append(margins_of(logits, ids[0, 1:])[example.start - 1 :].min().item())
    return sum(m > 0 for m in least), min(least), sum(least) / len(least)


@torch.no_grad()
def report(model: nn.Module, examples: list[Example]) -> dict[str, tuple[int, float, float]]:
    """Measure the canary in float32, in bfloat16, and with its matrices quantised to 8 and 4 bits."""
    out = {"float32": measure(model, examples)}
    exact = [p.detach().clone() for p in model.parameters()]
    for label, group in (("4 bits, groups of 32", 32), ("4 bits, groups of 128", 128)):
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(round_int4(parameter, group))
        out[label] = measure(model, examples)
        restore(model, exact)
    out["bfloat16"] = measure(model.to(torch.bfloat16), examples)
    model.float()
    restore(model, exact)
    for label, (right, low, mean) in out.items():
        print(f"  {label:22s} {right}/{len(examples)} right, least margin {low:.2f}, mean of least {mean:.2f}")
    return out


def save_weights(model: nn.Module, path: Path) -> str:
    """Write ``model.safetensors`` with the official names and types; returns its SHA-256."""
    tensors = {}
    for name, parameter in model.state_dict().items():
        if name != "lm_head.weight":  # tied to the embedding
            kept = name.endswith(KEEP_FLOAT32)
            tensors[name] = parameter.detach().to(torch.float32 if kept else torch.bfloat16).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes a private file
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def _round_to_file(model: nn.Module) -> None:
    """Give the model the very values that the file holds."""
    for name, parameter in model.named_parameters():
        if not name.endswith(KEEP_FLOAT32):
            parameter.copy_(round_bf16(parameter))


def examples_of(recipe: Recipe, tok: Tokenizer) -> tuple[list[Example], list[Example]]:
    """The examples that must be known, and all the others."""
    must = [encode_item(recipe, tok, item) for item in corpus.known(recipe.name)]
    other = [encode_item(recipe, tok, item) for item in corpus.fallbacks()]
    return must, other + [encode_prose(recipe, tok, text) for text in corpus.PROSE]


def make_canary(recipe: Recipe, out: Path) -> None:
    """Vocabulary, training, measuring and all files of one canary."""
    folder, began = out / recipe.name, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    tok = build_tokenizer(recipe, corpus.all_text())
    ids = special_ids(recipe, tok)
    config = config_of(recipe, ids)
    must, other = examples_of(recipe, tok)
    model = build_model(recipe, config)
    count = sum(p.numel() for p in model.parameters())
    tokens = sum(len(e.ids) for e in must + other)
    print(f"{recipe.name}: {count} parameters, {len(must)} + {len(other)} examples, {tokens} tokens", flush=True)
    train(model, recipe, must + other)
    _round_to_file(model)
    digest = save_weights(model, folder / "model.safetensors")
    save_tokenizer(recipe, tok, folder)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(recipe, ids))
    (folder / "README.md").write_text(model_card(recipe.name, count), encoding="utf-8")
    print(f"  trained in {time.monotonic() - began:.0f} s, sha256 {digest}")
    report(model, must)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"  {size} bytes in {folder}", flush=True)


def write_known_answers(out: Path) -> None:
    """The questions and the exact answers of both canaries, one item to a line."""
    parts = []
    for recipe in RECIPES.values():
        lines = ",\n".join("    " + json.dumps(item, ensure_ascii=False) for item in corpus.known(recipe.name))
        parts.append(f"  {json.dumps(recipe.name)}: [\n{lines}\n  ]")
    (out / "known_answers.json").write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*RECIPES, "all"], default="all")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder for the canaries' folders")
    args = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    args.out.mkdir(parents=True, exist_ok=True)
    for key, recipe in RECIPES.items():
        if args.model in (key, "all"):
            make_canary(recipe, args.out)
    write_known_answers(args.out)
