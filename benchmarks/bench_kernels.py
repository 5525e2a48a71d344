"""The CPU's linear kernels against the machine's limits and PyTorch, on the shapes of Llama-3.2-1B.

    python benchmarks/bench_kernels.py [--isa avx2] [--threads 2] [--repeats 7] [--kinds w8a8,bf16] [--best] [--json F]
    python benchmarks/bench_kernels.py --one-pool      # do our kernels and PyTorch's slow each other?

First the limits, measured by the same compiler and threads: memory read over a buffer far larger than the caches, and
multiply-adds in registers. Then each kernel at 1, 8 and 512 tokens. Rounds are interleaved: every round measures every
case, each over its own copies of the weights, so that none is left in a cache, and the limits again in between. Shown
are medians over all calls; with --best the fastest, which is closer to the truth where others use the machine. With one
thread, what counts is that thread's CPU time, so that waiting for a core does not.

GB/s counts each weight byte (and scale) once; GMAC/s the multiply-adds; "of limit" is the time the limit would need
(the longer of reading the weights and multiplying) divided by the measured one. tok/s is the sum over all linears of
the model, the output layer included at 1 and 8 tokens: an upper bound for a model's speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from surefoot import ops
from surefoot.device import hugepages
from surefoot.ops import cpu
from surefoot.ops.quant import pack_int4

LAYERS = 16
# (out, in, how many in the model): q and o, k and v, gate and up, down, output layer.
SHAPES = [(2048, 2048, 2), (512, 2048, 2), (8192, 2048, 2), (2048, 8192, 1)]
HEAD = (128256, 2048)
TOKENS = (1, 8, 512)
Clock = Callable[[], float]
CACHE_BYTES = 96 << 20  # weights in turn before one comes again
READ_BYTES = 32 << 20  # per timed read, out of a buffer of sixteen times as many
INT8, FP32, BF16, INT16 = 0, 1, 2, 3  # as Peak in csrc/kernels.h
# kernel: (bytes per weight, which multiply-add peak it is held against)
KINDS = {
    "w8a8": (1.0, INT8),
    "w8a16": (1.0, INT16),
    "w4a16": (4.5 / 8, INT16),
    "w4a8": (4.5 / 8, INT8),
    "bf16": (2.0, BF16),
    "fp32": (4.0, FP32),
}
PEERS = {"torch bf16": "bf16", "torch fp32": "fp32"}


@dataclass
class Case:
    """One shape at one number of tokens; `calls` go over copies of the weights in turn."""

    kind: str
    tokens: int
    shape: tuple[int, int]
    count: int
    calls: list[Callable[[], torch.Tensor]]
    seconds: list[float] = field(default_factory=list)
    turn: int = 0

    def measure(self, clock: Clock) -> None:
        begin, rounds = time.perf_counter(), 0
        while rounds < 3 or time.perf_counter() - begin < 0.1:
            start = clock()
            self.calls[self.turn % len(self.calls)]()
            self.seconds.append(clock() - start)
            self.turn += 1
            rounds += 1

    @property
    def bytes(self) -> float:
        kind = PEERS.get(self.kind, self.kind)
        return self.shape[0] * self.shape[1] * KINDS[kind][0]

    @property
    def macs(self) -> float:
        return float(self.shape[0] * self.shape[1] * self.tokens)


def weights(kind: str, outer: int, inner: int):
    """Arguments after x of the op that multiplies by one random weight."""
    if kind.startswith("w8"):
        act = "int8" if kind == "w8a8" else "float"
        q, scale = torch.randint(-127, 128, (outer, inner), dtype=torch.int8), torch.rand(outer) / 1000
        return ops.linear_w8, (q, scale, None, act, "panels" if cpu.pack_(q, scale) else "rows")
    if kind.startswith("w4"):
        packed = pack_int4(torch.randint(-8, 8, (64, inner))).repeat(outer // 64, 1)
        act = "int8" if kind == "w4a8" else "float"
        scale = (torch.rand(outer, inner // 32) / 100).bfloat16()
        return ops.linear_w4, (packed, scale, 32, None, act, "panels" if cpu.pack_(packed, scale) else "rows")
    dtype = torch.bfloat16 if kind.endswith("bf16") else torch.float32
    w = torch.randn(64, inner).repeat(outer // 64, 1).to(dtype)
    return (F.linear if kind.startswith("torch") else ops.linear), (w,)


def placed(arg):
    """A tensor anew where a loaded model's weights lie: in pages of 2 MiB."""
    return hugepages.empty(arg.shape, arg.dtype).copy_(arg) if isinstance(arg, torch.Tensor) else arg


def cases(kinds: list[str], tokens: tuple[int, ...]) -> list[Case]:
    out = []
    for kind in kinds:
        for shape in [*SHAPES, (*HEAD, 1)]:
            outer, inner, count = shape
            size = outer * inner * KINDS[PEERS.get(kind, kind)][0]
            fn, args = weights(kind, outer, inner)
            # Copies of the same numbers: a product's time does not depend on them.
            copies = [tuple(map(placed, args)) for _ in range(1 + int(CACHE_BYTES / size))]
            head = (outer, inner) == HEAD
            for n in tokens:
                if head and n > 64:
                    continue  # logits are wanted of the last token only
                x = torch.randn(n, inner).to(torch.float32 if kind.endswith("fp32") else torch.bfloat16)
                calls: list[Callable[[], torch.Tensor]] = [partial(fn, x, *args) for args in copies]
                out.append(Case(kind, n, (outer, inner), count * (1 if head else LAYERS), calls))
    return out


class Limits:
    """Memory read in bytes/s and multiply-adds/s, measured anew in every round."""

    def __init__(self) -> None:
        self.buffer = hugepages.empty((16 * READ_BYTES,), torch.uint8).zero_()
        self.read: list[float] = []
        self.peak: dict[int, list[float]] = {k: [] for k in (INT8, FP32, BF16, INT16)}

    def measure(self, clock: Clock) -> None:
        kernels = cpu.kernels
        assert kernels is not None
        for part in self.buffer.split(READ_BYTES):
            start = clock()
            kernels.read(part.data_ptr(), part.numel())
            self.read.append(part.numel() / (clock() - start))
        for what, rates in self.peak.items():
            for _ in range(3):
                start = clock()
                done = kernels.peak(what, 500_000)
                rates.append(done / (clock() - start))


def report(found: list[Case], limits: Limits, best: bool) -> list[dict]:
    pick = min if best else statistics.median
    pick_rate = max if best else statistics.median
    read, peak = pick_rate(limits.read), {k: pick_rate(v) for k, v in limits.peak.items()}
    print(f"memory read {read / 1e9:.1f} GB/s; multiply-adds, G/s: ", end="")
    print(", ".join(f"{n} {peak[k] / 1e9:.0f}" for n, k in (("int8", 0), ("int16", 3), ("bf16", 2), ("fp32", 1))))
    print(f"\n{'kernel':<11}{'tokens':>7}{'tok/s':>9}{'GB/s':>8}{'GMAC/s':>9}{'of limit':>10}   of limit by shape")
    rows = []
    for kind in dict.fromkeys(c.kind for c in found):
        for tokens in dict.fromkeys(c.tokens for c in found):
            mine = [c for c in found if (c.kind, c.tokens) == (kind, tokens)]
            if not mine:
                continue
            rate = peak[KINDS[PEERS.get(kind, kind)][1]]
            total = sum(pick(c.seconds) * c.count for c in mine)
            ideal = {c.shape: max(c.bytes / read, c.macs / rate) for c in mine}
            row = {
                "kernel": kind,
                "tokens": tokens,
                "tok_s": tokens / total,
                "gb_s": sum(c.bytes * c.count for c in mine) / total / 1e9,
                "gmac_s": sum(c.macs * c.count for c in mine) / total / 1e9,
                "of_limit": sum(ideal[c.shape] * c.count for c in mine) / total,
            }
            rows.append(row)
            shapes = "  ".join(f"{c.shape[0]}x{c.shape[1]} {ideal[c.shape] / pick(c.seconds):.0%}" for c in mine)
            print(
                f"{kind:<11}{tokens:>7}{row['tok_s']:>9.1f}{row['gb_s']:>8.1f}{row['gmac_s']:>9.0f}"
                f"{row['of_limit']:>10.0%}   {shapes}"
            )
    return [{"read": read, "peak": peak, "isa": cpu.instruction_set(), "threads": torch.get_num_threads()}, *rows]


def one_pool(repeats: int) -> None:
    """Our kernel and PyTorch's in turn against each alone: two pools of threads would fight for the cores."""
    w = torch.randn(2048, 2048)
    q, x = (w * 30).to(torch.int8), torch.randn(8, 2048)
    ours, theirs = lambda: ops.linear_w8(x, q, torch.ones(2048), None, "int8"), lambda: F.linear(x, w)

    def seconds(*calls: Callable[[], torch.Tensor]) -> float:
        start = time.perf_counter()
        for _ in range(200):
            for call in calls:
                call()
        return (time.perf_counter() - start) / 200

    rounds = [(seconds(ours), seconds(theirs), seconds(ours, theirs)) for _ in range(repeats + 1)][1:]
    a, b, both = (statistics.median(column) * 1e6 for column in zip(*rounds))
    print(f"ours {a:.0f} us, PyTorch's {b:.0f} us, in turn {both:.0f} us: {both / (a + b):.2f} of their sum")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", help="instruction set instead of the best one")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kinds", default=",".join([*KINDS, *PEERS]))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--best", action="store_true", help="the fastest of the repeats instead of the median")
    parser.add_argument("--one-pool", action="store_true", help="only: our kernels and PyTorch's in turn")
    parser.add_argument("--json", help="write the results there, too")
    args = parser.parse_args()
    if cpu.kernels is None:
        raise SystemExit("the C++ kernels are not built: reinstall surefoot with a C++17 compiler")
    if args.isa:
        cpu.kernels.set_isa(args.isa)
    torch.set_num_threads(args.threads)
    print(f"{cpu.instruction_set()}, {args.threads} threads, {args.repeats} rounds")
    if args.one_pool:
        one_pool(args.repeats)
        return
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    limits = Limits()
    results: list[Case] = []
    # A kind at a time holds memory down; PyTorch's run in the same round as ours of the same type.
    for group in ([k for k in args.kinds.split(",") if "bf16" in k], [k for k in args.kinds.split(",") if "fp32" in k],
                  [k for k in args.kinds.split(",") if k.startswith("w")]):  # fmt: skip
        found = cases(group, tuple(map(int, args.tokens.split(","))))
        for _ in range(args.repeats):
            limits.measure(clock)
            for case in found:
                case.measure(clock)
        for case in found:
            case.calls.clear()
        results += found
    rows = report(results, limits, args.best)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
