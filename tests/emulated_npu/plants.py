"""Mistakes planted in the calls of the fused attention: what a port to an NPU gets wrong, one at a time."""

from __future__ import annotations

from itertools import accumulate

from surefoot.ops.npu import attention


def plant(monkeypatch, change) -> None:
    """Let `change(call)` alter the arguments of each fused attention call."""
    right = attention._attend

    def wrong(shared, query, block_table, seq_lens, **layout):
        call = change({**shared, **layout, "query": query, "block_table": block_table, "seq_lens": list(seq_lens)})
        query, block_table, seq_lens = (call.pop(key) for key in ("query", "block_table", "seq_lens"))
        return right({}, query, block_table, seq_lens, **call)

    monkeypatch.setattr(attention, "_attend", wrong)


def wrong_layout(call):
    """Pages read as [heads, tokens] instead of [tokens, heads]."""
    heads = call["num_key_value_heads"]
    turned = {k: call[k].unflatten(2, (heads, -1)).transpose(1, 2).reshape(call[k].shape) for k in ("key", "value")}
    return call | turned


def wrong_heads(call):
    """Query head h on key head h % Hk instead of h // (H / Hk)."""
    heads, q = call["num_key_value_heads"], call["query"]
    return call | {"query": q.unflatten(-2, (-1, heads)).transpose(-3, -2).reshape(q.shape).contiguous()}


def wrong_ends(call):
    """Each request's own number of queries where ends are cumulative; without ends, cumulative key lengths."""
    if (ends := call.get("actual_seq_lengths")) is not None:
        return call | {"actual_seq_lengths": [b - a for a, b in zip([0, *ends], ends)]}
    return call | {"seq_lens": list(accumulate(call["seq_lens"]))}


def one_key_less(call):
    return call | {"seq_lens": [max(1, n - 1) for n in call["seq_lens"]]}


def upper_left(call):
    return call | {"sparse_mode": 2} if call["sparse_mode"] == 3 else call


def no_mask(call):
    return {k: v for k, v in call.items() if k != "atten_mask"} | {"sparse_mode": 0}


PLANTS = (wrong_layout, wrong_heads, wrong_ends, one_key_less, upper_left, no_mask)
