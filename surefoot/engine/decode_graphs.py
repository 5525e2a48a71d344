"""Captured decode steps: for each batch bucket one graph of model, logits and greedy choice, over static inputs.

A replay is: fill the host buffer, one copy to the device, `graph.replay()`. The inputs of a bucket lie in one buffer at
fixed addresses, its `Batch` consists of views of it, and the host copies of the lengths are lists changed in place
(`device.graphs.host_call` says why). Sampling with temperature, penalties or log-probabilities is applied to the
graph's logits afterwards, like in an eager step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from surefoot.core.batch import Batch, KVPages, LinearState
from surefoot.device import Device
from surefoot.device.graphs import Graph
from surefoot.engine import sampler
from surefoot.engine.scheduler import Schedule, Scheduled
from surefoot.models.base import CausalLM

LONGS = ("input_ids", "positions", "slot_mapping", "state_slots", "logits_indices", "rope_lens")


class StaticInputs:
    """Inputs of a decode step with `bucket` rows. `width`: pages of the longest sequence."""

    def __init__(
        self, bucket: int, width: int, block_size: int, layers: list[KVPages | LinearState], device: Device, rope: bool
    ) -> None:
        self.bucket, self.block_size = bucket, block_size
        sizes = [bucket] * len(LONGS), [bucket + 1, bucket, bucket * width]
        total = 8 * sum(sizes[0]) + 4 * sum(sizes[1])
        self._host = torch.zeros(total, dtype=torch.uint8)
        self._device = torch.zeros(total, dtype=torch.uint8, device=device.torch_device)
        longs, ints = _views(self._device, *sizes)
        host_longs, host_ints = _views(self._host, *sizes)
        self._fields = dict(zip(LONGS, (t.numpy() for t in host_longs)))
        starts, self._seq_lens, table = (t.numpy() for t in host_ints)
        self._table = table.reshape(bucket, width)
        starts[:] = np.arange(bucket + 1)
        self._fields["logits_indices"][:] = np.arange(bucket)
        self.batch = Batch(
            input_ids=longs[0],
            positions=longs[1],
            slot_mapping=longs[2],
            query_start_loc=ints[0],
            seq_lens=ints[1],
            block_table=ints[2].view(bucket, width),
            state_slots=longs[3],
            logits_indices=longs[4],
            query_lens_host=[1] * bucket,
            seq_lens_host=[1] * bucket,
            num_decodes=bucket,
            layers=layers,
            rope_lens=longs[5] if rope else None,
        )

    def fill(self, items: Sequence[Scheduled]) -> None:
        """Write one step's requests, exactly `bucket` of them, and copy them to the device."""
        assert len(items) == self.bucket
        f, size = self._fields, self.block_size
        for i, item in enumerate(items):
            request, pos, blocks = item.request, item.start, item.request.block_ids
            f["input_ids"][i] = request.token_ids(pos, pos + 1)[0]
            f["positions"][i] = pos
            f["slot_mapping"][i] = blocks[pos // size] * size + pos % size
            f["state_slots"][i] = request.state_slot or 0
            f["rope_lens"][i] = max(pos + 1, request.num_prompt_tokens)
            # Pages beyond the sequence keep what was there: nothing reads them.
            self._table[i, : len(blocks)] = blocks
            self._seq_lens[i] = self.batch.seq_lens_host[i] = pos + 1
        self._device.copy_(self._host, non_blocking=True)


def _views(buffer: torch.Tensor, longs: list[int], ints: list[int]):
    """int64 tensors first, then int32 ones, over one byte buffer."""
    split = 8 * sum(longs)
    return buffer[:split].view(torch.int64).split(longs), buffer[split:].view(torch.int32).split(ints)


def static_bytes(bucket: int, width: int) -> int:
    """Bytes of `StaticInputs` on the device."""
    return 8 * len(LONGS) * bucket + 4 * (2 * bucket + 1 + bucket * width)


@dataclass
class Decoded:
    """What a graph leaves: logits [bucket, V], and each row's greedy choice, packed as `sampler.unpack` takes it."""

    logits: torch.Tensor
    greedy: torch.Tensor


class DecodeGraphs:
    """All graphs of one engine. `captures` counts them as they are made: all before the first step, but for those
    `on_use`, which the first step of their size makes once `ready()`; this computes the step as well.
    """

    def __init__(
        self,
        model: CausalLM,
        device: Device,
        on_use: tuple[int, ...],
        ready: Callable[[], bool],
        *,
        max_model_len: int,
        block_size: int,
        layers: list[KVPages | LinearState],
        rope: bool,
    ) -> None:
        self.model, self.device, self.on_use, self.ready = model, device, on_use, ready
        self.captures = 0
        self.seconds = 0.0
        self.replays = 0
        width = -(-max_model_len // block_size)
        self._inputs = partial(
            StaticInputs, width=width, block_size=block_size, layers=layers, device=device, rope=rope
        )
        self._pool = device.graph_pool()
        self._graphs: dict[int, tuple[StaticInputs, Graph]] = {}

    def capture(self, bucket: int, items: Sequence[Scheduled]) -> None:
        """Make the graph of one bucket, over these rows."""
        began = time.perf_counter()
        inputs = self._inputs(bucket)
        inputs.fill(items)
        self._graphs[bucket] = inputs, self.device.capture(partial(self._forward, inputs), self._pool)
        self.captures += 1
        self.device.synchronize()
        self.seconds += time.perf_counter() - began

    def _forward(self, inputs: StaticInputs) -> Decoded:
        logits = self.model.compute_logits(self.model(inputs.batch))
        return Decoded(logits, sampler.sample(logits, sampler.SamplingBatch(inputs.bucket)).pack())

    def run(self, padded: Schedule) -> Decoded | None:
        """Replay the graph of this step, or make it where that computes the step; None if there is none for it."""
        rows = len(padded.items)
        if padded.num_decodes != rows or any(i.request.needs_prompt_logits for i in padded.items):
            return None
        found = self._graphs.get(rows)
        if found is None:
            if rows not in self.on_use or not self.ready():
                return None
            self.capture(rows, padded.items)
            return self._graphs[rows][1].output
        inputs, graph = found
        inputs.fill(padded.items)
        graph.replay()
        self.replays += 1
        return graph.output
