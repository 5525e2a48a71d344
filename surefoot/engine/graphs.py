"""Which decode batches are captured as graphs, and to which sizes steps are padded. Torch-free; it decides numbers.

A decode step of n requests runs in the smallest batch bucket >= n, filled up with padded rows. With graphs, each bucket
is one graph of the whole step (model, logits, greedy choice): one capture and one device stream a bucket, where graphs
of single pieces would cost a capture for each layer and bucket. Token buckets do the same for steps that prefill, which
run eagerly: the packed tokens are filled up to a size that the device has seen before.

    plan = plan_graphs(config, no_graphs=None, stream_limit=1800, ...)
    plan.mode, plan.batch_buckets        # "full", (1, 2, 4, 8, 16, 24, 32)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surefoot.cache.plan import format_bytes
from surefoot.core.config import EngineConfig
from surefoot.core.errors import InputError

MEMORY_SHARE = 0.1  # of the free memory, at most, for graphs


@dataclass(frozen=True)
class GraphPlan:
    """What is in effect: `mode` "full" or "off", `why` in one line, and the buckets (empty: no padding).

    memory_bytes: predicted for static inputs, outputs and working memory of all graphs together.
    """

    requested: str
    mode: str = "off"
    why: str = ""
    batch_buckets: tuple[int, ...] = ()
    token_buckets: tuple[int, ...] = ()
    memory_bytes: int = 0

    @property
    def num_captures(self) -> int:
        return len(self.batch_buckets) if self.mode == "full" else 0

    @property
    def num_dummy_rows(self) -> int:
        """Most padded rows of a decode step; at least the one that every cache has."""
        return max([1, *gaps(self.batch_buckets)])

    @property
    def num_dummy_tokens(self) -> int:
        """Most padded tokens of a step that prefills."""
        return max([0, *gaps(self.token_buckets)])

    @property
    def line(self) -> str:
        """For people, before capturing."""
        if self.mode == "off":
            return f"graphs off: {self.why}"
        sizes = ", ".join(map(str, self.batch_buckets))
        return f"{self.num_captures} graphs, for batches of {sizes}; about {format_bytes(self.memory_bytes)}"


def gaps(buckets: tuple[int, ...]) -> list[int]:
    """Most padding that each bucket can need."""
    return [b - previous - 1 for previous, b in zip((0, *buckets), buckets)]


def bucket_of(n: int, buckets: tuple[int, ...]) -> int | None:
    """The smallest bucket that holds n; None beyond the largest."""
    at = bisect_left(buckets, n)
    return buckets[at] if at < len(buckets) else None


def default_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, then steps of 8 up to 256 and of 16 beyond (vLLM's sizes), and max_num_seqs itself."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, max_num_seqs + 1, 16)]
    return _ending(sizes, max_num_seqs)


def exact_buckets(max_num_seqs: int) -> tuple[int, ...]:
    """Every size to 8, then steps of 4: for graphs that cost nothing until they are used."""
    return _ending([*range(1, 9), *range(12, max_num_seqs + 1, 4)], max_num_seqs)


def _ending(sizes: Sequence[int], last: int) -> tuple[int, ...]:
    """The sizes below `last`, and `last` itself."""
    return tuple(sorted({s for s in sizes if s < last} | {last}))


def plan_graphs(
    config: EngineConfig,
    *,
    no_graphs: str | None,
    stream_limit: int | None,
    free_bytes: int,
    bytes_for: Callable[[tuple[int, ...]], int],
    most_rows: int | None = None,
    default: Callable[[int], tuple[int, ...]] = default_buckets,
) -> GraphPlan:
    """The plan for these settings on a device. InputError where "full" was asked for and cannot be.

    no_graphs: why the device cannot capture, None if it can.  bytes_for(buckets): memory that their graphs need.
    default: the buckets for a max_num_seqs where the settings name none.
    most_rows: where attention in a graph reads max_model_len for each row, the rows that cost no more than the weights.
    """
    tokens = config.token_buckets or ()

    def eager(why: str) -> GraphPlan:
        if config.graph == "full":
            raise InputError(f"--graph full is not possible: {why}; use --graph auto or off")
        return GraphPlan(config.graph, "off", why, config.batch_buckets or (), tokens)

    if config.graph == "off":
        return eager("as asked")
    if config.ops == "reference":
        return eager("the reference ops read sequence lengths on the host")
    if no_graphs is not None:
        return eager(no_graphs)
    buckets = config.batch_buckets or default(config.max_num_seqs)
    if stream_limit is not None and len(buckets) > stream_limit:
        if config.batch_buckets is not None:
            return eager(f"{len(buckets)} graphs need as many streams, the device has {stream_limit}: fewer buckets")
        buckets = thin_out(buckets, stream_limit)
    if most_rows is not None and config.graph == "auto":
        buckets = tuple(b for b in buckets if b <= most_rows)
        if not buckets:
            return eager("attention in a graph would read max_model_len at every step: lower it, or ask for full")
    fitting = within(MEMORY_SHARE * free_bytes, buckets, bytes_for)
    if fitting != buckets and (not fitting or config.batch_buckets is not None):
        need, have = format_bytes(bytes_for(buckets)), format_bytes(int(MEMORY_SHARE * free_bytes))
        return eager(f"graphs up to batch {buckets[-1]} need {need} of {have}: lower max_model_len or max_num_seqs")
    why = "a whole decode step each"
    if fitting[-1] < config.max_num_seqs:
        why += f"; larger batches than {fitting[-1]} run eagerly"
    return GraphPlan(config.graph, "full", why, fitting, tokens, bytes_for(fitting))


def within(limit: float, buckets: tuple[int, ...], bytes_for: Callable[[tuple[int, ...]], int]) -> tuple[int, ...]:
    """The smallest buckets, as many as the memory holds."""
    while buckets and bytes_for(buckets) > limit:
        buckets = buckets[:-1]
    return buckets


def thin_out(buckets: tuple[int, ...], count: int) -> tuple[int, ...]:
    """`count` of the buckets, evenly, the largest always."""
    last = len(buckets) - 1
    return tuple(sorted({buckets[last - round(i * last / max(1, count - 1))] for i in range(count)}))
