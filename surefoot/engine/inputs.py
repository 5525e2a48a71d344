"""From a schedule to a `Batch`: one packed host buffer, one copy to the device."""

from __future__ import annotations

import numpy as np
import torch

from surefoot.cache.pages import DUMMY_BLOCK
from surefoot.core.batch import Batch, KVPages, LinearState
from surefoot.engine.scheduler import Schedule


def build(
    step: Schedule,
    *,
    block_size: int,
    layers: list[KVPages | LinearState],
    device: torch.device,
    logits_rows: list[int],
    length_dependent_rope: bool = False,
) -> Batch:
    """The forward pass of one scheduled step. `logits_rows`: packed rows whose logits are wanted."""
    items = step.items
    total = step.num_tokens
    width = max(len(item.request.block_ids) for item in items)
    input_ids, positions, slots = (np.empty(total, np.int64) for _ in range(3))
    rope_lens = np.empty(total if length_dependent_rope else 0, np.int64)
    table = np.full((len(items), width), DUMMY_BLOCK, np.int32)
    starts = np.zeros(len(items) + 1, np.int32)
    seq_lens = np.empty(len(items), np.int32)
    state_slots = np.zeros(len(items), np.int64)
    row = 0
    for i, item in enumerate(items):
        request, end = item.request, row + item.num_new_tokens
        blocks = np.asarray(request.block_ids, np.int64)
        pos = np.arange(item.start, item.end)
        input_ids[row:end] = request.token_ids(item.start, item.end)
        positions[row:end] = pos
        slots[row:end] = blocks[pos // block_size] * block_size + pos % block_size
        if length_dependent_rope:
            rope_lens[row:end] = np.maximum(pos + 1, request.num_prompt_tokens)
        table[i, : len(blocks)] = blocks
        starts[i + 1] = row = end
        seq_lens[i] = item.end
        state_slots[i] = request.state_slot or 0
    wide = [input_ids, positions, slots, state_slots, np.asarray(logits_rows, np.int64), rope_lens]
    longs, ints = _upload(wide, [starts, seq_lens, table.ravel()], device)
    return Batch(
        input_ids=longs[0],
        positions=longs[1],
        slot_mapping=longs[2],
        query_start_loc=ints[0],
        seq_lens=ints[1],
        block_table=ints[2].view(len(items), width),
        state_slots=longs[3],
        logits_indices=longs[4],
        query_lens_host=[item.num_new_tokens for item in items],
        seq_lens_host=[item.end for item in items],
        num_decodes=step.num_decodes,
        layers=layers,
        rope_lens=longs[5] if length_dependent_rope else None,
    )


def _upload(longs: list[np.ndarray], ints: list[np.ndarray], device: torch.device):
    """All arrays in one buffer, int64 first; returns views of its copy on the device."""
    split = 8 * sum(a.size for a in longs)
    buffer = torch.from_numpy(np.frombuffer(b"".join(a.tobytes() for a in (*longs, *ints)), np.uint8).copy())
    moved = buffer.to(device, non_blocking=True)
    return (
        moved[:split].view(torch.int64).split([a.size for a in longs]),
        moved[split:].view(torch.int32).split([a.size for a in ints]),
    )
