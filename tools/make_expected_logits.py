"""Store what `transformers` (fp32, CPU) computes for the canaries, for `surefoot selftest` to compare with.

    python -m tools.make_expected_logits             # rewrites surefoot/canaries/*/expected_logits.npz
    python -m tools.make_expected_logits --check     # recompute, compare, write nothing; exit 1 if they differ

For each canary: one English chat, one Chinese chat and one plain prompt, each with its answer; full-vocabulary logits
at a few positions spread from the first token to the last. Run it again whenever a canary has been trained anew.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from surefoot import canaries
from surefoot.bringup.selftest import EXPECTED_FILE

POSITIONS = 5


def pick(name: str) -> list[dict]:
    """The longest English chat, the longest Chinese chat and the longest plain prompt of the known answers."""
    items = canaries.known_answers(name)
    chats = [i for i in items if "messages" in i]
    groups = (
        [i for i in chats if i["answer"].isascii()],
        [i for i in chats if not i["answer"].isascii()],
        [i for i in items if "prompt" in i],
    )
    return [max(group, key=lambda i: len(i["answer"])) for group in groups if group]


def token_ids(tokenizer, item: dict) -> list[int]:
    if "prompt" in item:
        return tokenizer(item["prompt"] + item["answer"])["input_ids"]
    text = tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
    return tokenizer(text + item["answer"], add_special_tokens=False)["input_ids"]


def compute(name: str) -> dict[str, np.ndarray]:
    folder = canaries.path(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    arrays: dict[str, np.ndarray] = {}
    items = pick(name)
    for number, item in enumerate(items):
        ids = token_ids(tokenizer, item)
        positions = np.unique(np.linspace(0, len(ids) - 1, POSITIONS).astype(np.int64))
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0]
        arrays[f"token_ids_{number}"] = np.array(ids, dtype=np.int64)
        arrays[f"positions_{number}"] = positions
        arrays[f"logits_{number}"] = logits[torch.from_numpy(positions)].float().numpy()
    arrays["count"] = np.array(len(items))
    return arrays


def same(name: str, arrays: dict[str, np.ndarray]) -> bool:
    """Whether the stored file says the same, up to the rounding of another machine's fp32."""
    path = canaries.path(name) / EXPECTED_FILE
    if not path.is_file():
        return False
    with np.load(path) as stored:
        return set(stored) == set(arrays) and all(np.allclose(stored[k], arrays[k], rtol=0, atol=1e-3) for k in arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=canaries.CANARIES, help="which canaries; default all")
    parser.add_argument("--check", action="store_true", help="compare with the stored files and write nothing")
    args = parser.parse_args()
    torch.set_num_threads(2)
    stale = []
    for name in args.names:
        arrays = compute(name)
        path = canaries.path(name) / EXPECTED_FILE
        if args.check:
            stale += [] if same(name, arrays) else [name]
            continue
        np.savez_compressed(path, **arrays)
        print(f"{path}: {int(arrays['count'])} sequences, {path.stat().st_size} bytes")
    if stale:
        sys.exit(f"stale: {', '.join(stale)}; run python -m tools.make_expected_logits")


if __name__ == "__main__":
    main()
