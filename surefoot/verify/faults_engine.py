"""Faults in the engine's paths: pages, slots, prefix cache, preemption, padding, graphs, races, prompts, sampling.

Most of the correctness fixes of real engines are of this kind; a comparison of layers on one prompt does not see them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from surefoot.backends.native import NativeBackend
from surefoot.core.batch import Batch
from surefoot.verify import inject
from surefoot.verify.faults import ATTENTION, DELTA, LLAMA, QWEN, Fault

# ---- KV pages


def _slot_off_by_one(target: NativeBackend, scale: float):
    return inject.batch(target, lambda b: replace(b, slot_mapping=b.slot_mapping + 1))


def _stale_page(target: NativeBackend, scale: float):
    """The block table's second page is the first again; the tokens are written where they belong."""

    def change(b: Batch) -> Batch:
        table = b.block_table.clone()
        if table.shape[1] > 1:
            table[:, 1] = table[:, 0]
        return replace(b, block_table=table)

    return inject.batch(target, change)


def _unwritten(target: NativeBackend, scale: float):
    """Keys and values of the last token of a page are not written when it comes alone."""

    def write(right, k, v, k_cache, v_cache, slots):
        keep = slots % k_cache.shape[1] != k_cache.shape[1] - 1
        if len(k) > 1 or bool(keep.all()):
            right(k, v, k_cache, v_cache, slots)

    return inject.op(inject.layer_with(target, "self_attn", 0), "kv_write", write)


def _blind_hashes(target: NativeBackend, scale: float):
    """Pages are found by their number in the sequence, whatever the tokens."""
    scheduler = target.engine.scheduler

    def hashes(request, count):
        while len(request.block_hashes) < count:
            request.block_hashes.append(len(request.block_hashes).to_bytes(32, "big"))
        return request.block_hashes[:count]

    return inject.attribute(scheduler, "_hashes", hashes)


@contextlib.contextmanager
def _keeps_count(target: NativeBackend, scale: float) -> Iterator[None]:
    """After a preemption a request goes on where it was, on pages that it has just been given."""
    scheduler = target.engine.scheduler
    preempt, admit = scheduler._preempt, scheduler._admit

    def keep(request, step):
        done = request.num_computed_tokens
        preempt(request, step)
        request.sampler_state = done

    def resume(request, step):
        admitted = admit(request, step)
        if admitted and isinstance(request.sampler_state, int):
            request.num_computed_tokens, request.sampler_state = request.sampler_state, None
        return admitted

    with inject.attribute(scheduler, "_preempt", keep), inject.attribute(scheduler, "_admit", resume):
        yield


# ---- states


def _no_reset(target: NativeBackend, scale: float):
    """New requests find the state of whoever had the slot before."""
    runner = target.engine.runner
    prepare = runner._prepare_states
    return inject.attribute(runner, "_prepare_states", lambda step: prepare(_without_resets(step)))


def _without_resets(step: Any) -> Any:
    return replace(step, state_resets=[])


def _state_lost(target: NativeBackend, scale: float):
    """Each chunk of a prompt starts from zero."""

    def chunk(right, q, k, v, g, beta, state, slots, starts, lens):
        state[slots] = 0
        return right(q, k, v, g, beta, state, slots, starts, lens)

    return inject.op(inject.layer_with(target, "linear_attn", 1), "gated_delta_chunk", chunk)


def _padded(target: NativeBackend, scale: float):
    """Pieces are padded to a multiple of 8 rows, and the padding goes through the recurrence."""
    part = inject.layer_with(target, "linear_attn", 1)

    def chunk(right, q, k, v, g, beta, state, slots, starts, lens):
        out = right(q, k, v, g, beta, state, slots, starts, lens)
        fade = (-part.A_log.float().exp() * torch.nn.functional.softplus(part.dt_bias.float())).exp()
        for slot, n in zip(slots.tolist(), lens):
            state[slot] *= fade[:, None, None] ** (-n % 8)
        return out

    return inject.op(part, "gated_delta_chunk", chunk)


def _shared_slot(target: NativeBackend, scale: float):
    """Rows of a batch share the state slot of its last request, as padded rows of a graph that point to a live one."""

    def change(b: Batch) -> Batch:
        slots = b.state_slots.clone()
        slots[:1] = b.state_slots[-1]
        return replace(b, state_slots=slots)

    return inject.batch(target, change)


def _late_conv_state(target: NativeBackend, scale: float):
    """What the convolution carries on is one token late."""

    def conv(right, x, weight, bias, state, slots, starts, lens):
        before = state[slots].clone()
        out = right(x, weight, bias, state, slots, starts, lens)
        row = 0
        for i, n in enumerate(lens):
            inputs = torch.cat((before[i], x[row : row + n].t()), dim=-1)
            width = state.shape[-1]
            state[slots[i]] = inputs[:, -width - 1 : -1]
            row += n
        return out

    return inject.op(inject.layer_with(target, "linear_attn", 1), "causal_conv", conv)


def _wrong_checkpoint(target: NativeBackend, scale: float):
    """A prefix hit restores the state of another checkpoint row."""
    runner, slots = target.engine.runner, target.engine.config.max_num_seqs
    right = runner._copy_state

    def copied(source: int, destination: int) -> None:
        states = runner._linear_states()
        last = len(states[0].conv) - 1
        restoring = destination <= slots
        right(last if restoring else source, destination)

    for layer in runner._linear_states():
        layer.conv[-1].zero_()
        layer.recurrent[-1].zero_()
    return inject.attribute(runner, "_copy_state", copied)


# ---- graphs, races


def _stale(name: str):
    """A decode step runs with an input of the step before, as a graph replay that overtakes its parameter update."""

    def apply(target: NativeBackend, scale: float):
        last: list[torch.Tensor] = []

        def change(b: Batch) -> Batch:
            now = getattr(b, name)
            before = last.pop() if last else now
            last.append(now)
            decodes = b.num_tokens == b.num_decodes and before.shape == now.shape
            if not decodes or bool((b.positions == 0).any()):
                return b
            changed = copy.copy(b)
            setattr(changed, name, before)
            return changed

        return inject.batch(target, change)

    return apply


def _race(target: NativeBackend, scale: float):
    """Some rows of an op are sometimes read before they are written."""
    generator = torch.Generator().manual_seed(3)

    def spoil(right, gate, up):
        out = right(gate, up)
        row = int(torch.randint(len(out), (1,), generator=generator))
        out[row] *= torch.rand(1, generator=generator)
        return out

    return inject.op(inject.layer_with(target, "mlp", 1), "swiglu", spoil)


@contextlib.contextmanager
def _nothing(target: NativeBackend, scale: float) -> Iterator[None]:
    yield


# ---- prompts and sampling


def _prompt(change):
    """The target's tokenizer gives other ids for a chat: change(tokenizer, ids, messages) -> ids."""

    def apply(target: NativeBackend, scale: float):
        tokenizer: Any = target.engine.tokenizer
        encode = tokenizer.encode_chat

        def encoded(messages, add_generation_prompt=True, **kwargs):
            return change(tokenizer, encode(messages, add_generation_prompt, **kwargs), messages)

        return inject.attribute(tokenizer, "encode_chat", encoded)

    return apply


def _chatml(tokenizer, ids, messages):
    from surefoot.verify.prompt_causes import CHATML, render

    return tokenizer.encode(render(CHATML, messages))


def _double_bos(tokenizer, ids, messages):
    return [ids[0], *ids]


def _no_generation_prompt(tokenizer, ids, messages):
    return tokenizer.encode(tokenizer.render_chat(messages, False), add_special_tokens=False)


def _request(**changes: Any):
    """Sampling settings that nobody asked for."""

    def apply(target: NativeBackend, scale: float):
        engine = target.engine
        add = engine.add_request

        def added(prompt, params, request_id=None, score=False):
            return add(prompt, params if score else replace(params, **changes), request_id, score)

        return inject.attribute(engine, "add_request", added)

    return apply


STALE = ("stale_graph_inputs",)
FAULTS = [
    Fault("kv_slot_off_by_one", 6, ATTENTION, ("kv_slot_off_by_one",), _slot_off_by_one, LLAMA),
    Fault("block_table", 6, ATTENTION, ("block_table",), _stale_page),
    Fault("kv_not_written", 6, ATTENTION, ("kv_not_written",), _unwritten, path="decode"),
    Fault("prefix_hit_wrong", 6, ATTENTION, ("prefix_hit_wrong",), _blind_hashes, LLAMA, path="prefix_hit"),
    Fault("preemption_state_lost", 6, ATTENTION, ("preemption_state_lost",), _keeps_count, LLAMA, path="preempted"),
    Fault(
        "stale_graph_positions", 10, r"model\.rotary_emb", ("stale_graph_inputs",), _stale("positions"), path="decode"
    ),
    Fault(
        "stale_graph_tokens", 10, r"model\.embed_tokens", ("stale_graph_inputs",), _stale("input_ids"), path="decode"
    ),
    Fault("race", 10, r"model\.layers\.1\.mlp", ("not_repeatable",), _race),
    Fault("padding_in_recurrence", 11, DELTA, ("padding_in_recurrence",), _padded, QWEN, path="chunked"),
    Fault("padding_shares_slot", 11, DELTA, ("state_slot_shared",), _shared_slot, QWEN, path="batched"),
    Fault("stale_state", 13, DELTA, ("stale_state",), _no_reset, QWEN, path="reused"),
    Fault("state_lost", 13, DELTA, ("state_lost",), _state_lost, QWEN, path="chunked"),
    Fault("conv_state_shifted", 13, DELTA, ("conv_shifted",), _late_conv_state, QWEN, path="chunked"),
    Fault("prefix_state_wrong", 6, DELTA, ("prefix_hit_wrong",), _wrong_checkpoint, QWEN, path="prefix_hit"),
    Fault("overflow", 5, r"model\.layers\.\d+\..*", ("overflow",), _nothing, ("llama-overflow",), dtype="float16"),
    Fault("double_bos", 1, "tokens", ("double_bos",), _prompt(_double_bos), LLAMA),
    Fault("other_template", 1, "tokens", ("other_template",), _prompt(_chatml), LLAMA),
    Fault("no_generation_prompt", 1, "tokens", ("no_generation_prompt",), _prompt(_no_generation_prompt)),
    Fault("bos_missing", 1, "tokens", ("bos_missing",), _prompt(lambda t, ids, m: ids[1:]), LLAMA),
    Fault("sampling_penalty", 12, "sampler", ("sampling_default",), _request(repetition_penalty=1.3)),
    Fault("sampling_temperature", 12, "sampler", ("sampling_default",), _request(temperature=1.5, seed=1)),
]
