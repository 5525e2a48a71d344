"""Pads a scheduled step to a bucket: dummy requests with pages and state slots that belong to nobody.

A decode step gets one dummy request per missing row, each with a page and a slot of its own: rows that shared them
would race for them, and a row that pointed at a running request's slot would advance its recurrent state. A step that
prefills gets a single dummy request of the missing tokens. Dummies are never final, so nothing is sampled from them.

`seen` counts the shapes that ran, as (kind, tokens): "decode" or "prefill", and how many rows the model's layers saw.
What a device would compile or capture for is exactly these.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from surefoot.core.request import Request
from surefoot.engine.graphs import GraphPlan, bucket_of
from surefoot.engine.scheduler import Schedule, Scheduled

Shape = tuple[str, int]


class Padding:
    """Buckets of one engine and the dummies that fill them."""

    def __init__(self, plan: GraphPlan, block_size: int) -> None:
        self.plan = plan
        self.seen: Counter[Shape] = Counter()
        self._rows = [_dummy(f"padding-{i}", 1, [i], i) for i in range(plan.num_dummy_rows)]
        tokens = max(1, plan.num_dummy_tokens)
        self._prompt = _dummy("padding", tokens, list(range(-(-tokens // block_size))), 0).request

    def pad(self, step: Schedule) -> Schedule:
        """The step itself where there is nothing to pad or no bucket that holds it."""
        decode = step.num_decodes == len(step.items)
        total = step.num_tokens
        bucket = bucket_of(total, self.plan.batch_buckets if decode else self.plan.token_buckets) or total
        self.seen["decode" if decode else "prefill", bucket] += 1
        missing = bucket - total
        if not missing:
            return step
        if decode:
            return replace(step, items=step.items + self._rows[:missing])
        dummy = Scheduled(self._prompt, 0, missing, final=False)
        # Single tokens come first, whoever they belong to.
        at = step.num_decodes if missing == 1 else len(step.items)
        return replace(step, items=[*step.items[:at], dummy, *step.items[at:]])

    def rows(self, bucket: int) -> list[Scheduled]:
        """A decode step of nothing but dummies, for the capture; they share pages and slots where there are too few."""
        return [self._rows[i % len(self._rows)] for i in range(bucket)]

    def unplanned(self) -> list[Shape]:
        """Shapes that ran and are in no bucket."""
        allowed = {("decode", b) for b in self.plan.batch_buckets} | {("prefill", b) for b in self.plan.token_buckets}
        return sorted(set(self.seen) - allowed)


def num_dummy_blocks(plan: GraphPlan, block_size: int) -> int:
    """Pages that the dummies of a plan need."""
    return max(plan.num_dummy_rows, -(-plan.num_dummy_tokens // block_size))


def _dummy(name: str, tokens: int, blocks: list[int], slot: int) -> Scheduled:
    request = Request(name, [0] * tokens, block_ids=blocks, state_slot=slot)
    return Scheduled(request, 0, 1, final=False)
