"""Do the canaries notice faults? ``python -m tools.train_canaries.faults [--out DIR]``.

Each fault is put into the transformers model by changing weights or rope tables, which gives the same numbers as an
engine with that fault would. Printed is how many known answers are still right: the fewer, the better.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import corpus
from .recipes import RECIPES, Recipe
from .train import DEFAULT_OUT, THREADS, examples_of, measure

Fault = Callable[[nn.Module], None]


def _layers(model: nn.Module, kind: str) -> list[nn.Module]:
    """All modules called ``kind`` in the decoder layers."""
    return [getattr(layer, kind) for layer in model.model.layers if hasattr(layer, kind)]


def _rope(change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """A fault in the table of rope frequencies."""

    def fault(model: nn.Module) -> None:
        rotary = model.model.rotary_emb
        rotary.inv_freq = change(rotary.inv_freq)

    return fault


def _scaled(part: str, factor: float, keep: slice = slice(0, 0)) -> Fault:
    """A tensor of every layer multiplied by ``factor`` except for ``keep`` of its last dimension."""

    def fault(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(part):
                kept = parameter[..., keep].clone()
                parameter.mul_(factor)
                parameter[..., keep] = kept

    return fault


def _swap_query_heads(model: nn.Module) -> None:
    """Query head i reads key head i % 2 instead of i // 2."""
    for attention in _layers(model, "self_attn"):
        size = attention.head_dim
        order = torch.arange(4 * size).view(4, size)[[0, 2, 1, 3]].flatten()
        attention.q_proj.weight.copy_(attention.q_proj.weight[order])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, order])


def _swap_value_heads(model: nn.Module) -> None:
    """Delta-net value head i uses key head i % 2 instead of i // 2."""
    heads = torch.tensor([0, 2, 1, 3])
    for delta in _layers(model, "linear_attn"):
        size, first = delta.head_v_dim, 2 * delta.key_dim
        order = torch.arange(4 * size).view(4, size)[heads].flatten()
        qkv = torch.cat([torch.arange(first), order + first])
        delta.out_proj.weight.copy_(delta.out_proj.weight[:, order])
        for module, rows in (
            (delta.in_proj_qkv, qkv),
            (delta.conv1d, qkv),
            (delta.in_proj_z, order),
            (delta.in_proj_a, heads),
            (delta.in_proj_b, heads),
        ):
            module.weight.copy_(module.weight[rows])
        delta.A_log.copy_(delta.A_log[heads])
        delta.dt_bias.copy_(delta.dt_bias[heads])


def _forget_decay(model: nn.Module) -> None:
    for delta in _layers(model, "linear_attn"):
        delta.A_log.fill_(-30.0)


def _plain_norms(model: nn.Module) -> None:
    """Norm weights used as they are, without the one that Qwen3.5 adds."""
    for name, parameter in model.named_parameters():
        if "norm" in name and "linear_attn" not in name:
            parameter.sub_(1.0)


def _full_rotary(model: nn.Module) -> None:
    """Frequencies spread as if the whole head were rotated."""
    rotary = model.model.rotary_emb
    rotary.inv_freq = 1.0 / (1e7 ** (torch.arange(0, 64, 2, dtype=torch.float) / 256))


LLAMA_FAULTS: dict[str, Fault] = {
    "none": lambda model: None,
    "rope scaling ignored": _rope(lambda f: 1.0 / (500000.0 ** (torch.arange(0, 64, 2, dtype=torch.float) / 64))),
    "rope theta 10000": _rope(lambda f: 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float) / 64))),
    "no rope": _rope(torch.zeros_like),
    "rope turned backwards": _rope(torch.neg),
    "query heads on the wrong key heads": _swap_query_heads,
    "attention scores 10 % too large": _scaled("q_proj.weight", 1.1),
    "attention scores twice too large": _scaled("q_proj.weight", 2.0),
}
QWEN_FAULTS: dict[str, Fault] = {
    "none": lambda model: None,
    "full instead of partial rotary": _full_rotary,
    "rope theta 10000": _rope(lambda f: 1.0 / (10000.0 ** (torch.arange(0, 64, 2, dtype=torch.float) / 64))),
    "no rope": _rope(torch.zeros_like),
    "rope turned backwards": _rope(torch.neg),
    "value heads on the wrong key heads": _swap_value_heads,
    "decay of the state left out": _forget_decay,
    "beta always one half": _scaled("in_proj_b.weight", 0.0),
    "convolution sees the last token only": _scaled("conv1d.weight", 0.0, slice(3, 4)),
    "dt_bias left out": _scaled("dt_bias", 0.0),
    "norms without the added one": _plain_norms,
}


@torch.no_grad()
def try_faults(recipe: Recipe, out: Path) -> None:
    """Print a line for each fault."""
    folder = out / recipe.name
    tok = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    must, _ = examples_of(recipe, tok)
    print(f"{recipe.name}: {len(corpus.known(recipe.name))} known answers")
    for label, fault in (LLAMA_FAULTS if recipe is RECIPES["llama"] else QWEN_FAULTS).items():
        broken = copy.deepcopy(model)
        fault(broken)
        right, least, _ = measure(broken, must)
        print(f"  {label:40s} {right:4d} right, least margin {least:6.2f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of the canaries' folders")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    for recipe in RECIPES.values():
        try_faults(recipe, args.out)


if __name__ == "__main__":
    main()
