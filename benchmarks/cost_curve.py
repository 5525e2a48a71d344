"""What a step costs: decode time against context and batch, prefill time against length; fitted, kept, drawn.

    python benchmarks/cost_curve.py MODEL -o results/cost-llama-1b-w8a8 [--contexts 128 512 ...] [--batches 1 8 32]

MODEL is a folder (quantised or not). Every number is a whole `Engine.step()`: schedule, inputs, forward pass, greedy
choice, text. Prefills are real. A decode at a context starts from a cache that is filled with random numbers instead of
computed ones, for its time does not depend on them and 32 prompts of 8,192 tokens would take half an hour; each
request has pages of its own. The cases are measured in turn, `--repeats` rounds; medians are fitted by

    decode(B, C) = a + b B + c B C          prefill(n) = a + b n + c n^2        (seconds; least relative error)

and, with --layers, the time inside the linear and the full attention layers is kept beside it (hooks on the modules, so
not with graphs). Writes OUT.json (raw seconds, fits, machine) and OUT.png.

Cases that OUT.json has already are not measured again, so the whole may be had in parts, each while the machine is
quiet: `--seconds 120` ends after the case that is under way by then, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from bench_peers import machine

from surefoot.core.batch import KVPages
from surefoot.core.config import EngineConfig
from surefoot.core.sampling import SamplingParams
from surefoot.engine.engine import Engine
from surefoot.engine.runner import StepResult
from surefoot.ops.cpu import kernels

# Samples by case: phase -> (batch, context) or (length,) -> seconds of each round (of layers: by kind of layer).
Raw = dict[str, dict[tuple[int, ...], list]]

CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 2, 4, 8, 16, 32)
LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STEPS = 3
FILL = 1 << 20


def fill_cache(engine: Engine) -> None:
    """Random numbers in every page and state, so that nothing is read from the kernel's shared page of zeros."""
    values = torch.randn(FILL)
    for layer in engine.runner.layers:
        for tensor in vars(layer).values():
            flat = tensor.view(-1)
            for part in flat.split(FILL):
                part.copy_(values[: len(part)])
            if not isinstance(layer, KVPages):
                flat.mul_(0.01)


@contextmanager
def pretended(engine: Engine) -> Iterator[None]:
    """Within the block a step computes nothing: its tokens count as computed and token 1 as sampled."""
    run = engine.runner.run
    engine.runner.run = lambda step: StepResult(  # type: ignore[method-assign]
        tokens={item.request.request_id: (1, None) for item in step.items if item.samples}
    )
    try:
        yield
    finally:
        engine.runner.run = run  # type: ignore[method-assign]


def decode(engine: Engine, batch: int, context: int, steps: int = STEPS) -> float:
    """Median seconds of a step in which `batch` requests of about `context` tokens each add one."""
    params = SamplingParams(max_tokens=steps + 3, ignore_eos=True)
    first = context - steps // 2 - 1
    ids = [engine.add_request([1 + i] * first, params) for i in range(batch)]
    with pretended(engine):
        while engine.scheduler.waiting or any(r.num_computed_tokens < first for r in engine.scheduler.running):
            engine.step()
    engine.step()  # the first one finds nothing of the weights in the caches
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        outputs = engine.step()
        times.append(time.perf_counter() - started)
        assert len(outputs) == batch
    for request_id in ids:
        engine.cancel(request_id)
    engine.step()
    return statistics.median(times)


def prefill(engine: Engine, length: int, seed: int) -> float:
    draw = np.random.default_rng(seed)
    engine.add_request(draw.integers(0, engine.vocab_size, length).tolist(), SamplingParams(max_tokens=1))
    started = time.perf_counter()
    while engine.has_unfinished():
        engine.step()
    return time.perf_counter() - started


class LayerClock:
    """Seconds inside the modules called `name`, by forward hooks; of one step at a time."""

    def __init__(self, engine: Engine, names: tuple[str, ...] = ("linear_attn", "self_attn", "mlp", "lm_head")):
        self.seconds: dict[str, float] = {}
        for path, module in engine.model.named_modules():
            name = path.rpartition(".")[2]
            if name in names:
                module.register_forward_pre_hook(lambda *_, name=name: self.begin(name))
                module.register_forward_hook(lambda *_, name=name: self.end(name))
        self.began: dict[str, float] = {}

    def begin(self, name: str) -> None:
        self.began[name] = time.perf_counter()

    def end(self, name: str) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.began[name]

    def take(self, steps: int) -> dict[str, float]:
        found, self.seconds = {k: v / steps for k, v in self.seconds.items()}, {}
        return found


def fit(columns: list[list[float]], seconds: list[float]) -> dict:
    """Least squares of the relative error; a coefficient that would be negative is left out."""
    x, y = np.array(columns, float).T, np.array(seconds)
    used = list(range(x.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(x[:, used] / y[:, None], np.ones(len(y)), rcond=None)
        if (found >= 0).all() or len(used) == 1:
            break
        used.pop(int(found.argmin()))
    coefficients = np.zeros(x.shape[1])
    coefficients[used] = found
    errors = np.abs(x @ coefficients / y - 1)
    return {
        "coefficients": coefficients.tolist(),
        "median_relative_error": float(np.median(errors)),
        "largest_relative_error": float(errors.max()),
    }


def cases(engine: Engine, args: argparse.Namespace, raw: Raw) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """What is still to be measured, round by round: phase, (batch, context) or (length,), round."""
    pool = engine.scheduler.block_pool
    room = pool.num_usable * pool.block_size
    grid = [(b, c) for b in args.batches for c in args.contexts if b * (c + 2 * engine.info.block_size) <= room]
    for repeat in range(args.repeats):
        for key in grid:
            if len(raw["decode"].get(key, [])) <= repeat:
                yield "decode", key, repeat
        for length in args.lengths:
            wanted = repeat + 1 if length <= args.repeat_up_to else 1
            if len(raw["prefill"].get((length,), [])) < wanted:
                yield "prefill", (length,), repeat


def measure(engine: Engine, args: argparse.Namespace, raw: Raw) -> bool:
    """Add seconds by case to `raw`; whether all are there now."""
    clock = LayerClock(engine) if args.layers else None
    if args.batches and args.contexts:
        decode(engine, args.batches[0], args.contexts[0])
    if args.lengths:
        prefill(engine, args.lengths[0], 0)
    began = time.perf_counter()
    for phase, key, repeat in cases(engine, args, raw):
        if args.seconds is not None and time.perf_counter() - began > args.seconds:
            return False
        show(f"round {repeat + 1} of {args.repeats}: {phase} {' x '.join(map(str, key))}")
        if clock:
            clock.take(1)
        seconds = decode(engine, *key) if phase == "decode" else prefill(engine, *key, repeat)
        raw[phase].setdefault(key, []).append(seconds)
        if clock and phase == "decode":
            raw["layers"].setdefault(key, []).append(clock.take(STEPS + 1))
    return True


def limits(engine: Engine) -> dict[str, float]:
    """What the machine gives now: bytes read a second (from the cache's pages), int8 multiply-adds a second."""
    if kernels is None:
        return {}
    pages = next(layer.k for layer in engine.runner.layers if isinstance(layer, KVPages))
    reads, peaks = [], []
    for _ in range(5):
        started = time.perf_counter()
        kernels.read(pages.data_ptr(), pages.nbytes)
        reads.append(pages.nbytes / (time.perf_counter() - started))
        started = time.perf_counter()
        done = kernels.peak(0, 500_000)
        peaks.append(done / (time.perf_counter() - started))
    return {"read": statistics.median(reads), "int8": statistics.median(peaks)}


def earlier(path: Path, settings: dict) -> tuple[Raw, list[dict]]:
    """Raw seconds and parts that the file holds; a file of other settings is refused."""
    raw: Raw = {"decode": {}, "prefill": {}, "layers": {}}
    if not path.exists():
        return raw, []
    data = json.loads(path.read_text())
    if data["settings"] != settings:
        raise SystemExit(f"{path} was measured with {data['settings']}, this is {settings}: choose another -o")
    raw["decode"] = {(d["batch"], d["context"]): d["seconds"] for d in data["decode"]}
    raw["prefill"] = {(p["length"],): p["seconds"] for p in data["prefill"]}
    raw["layers"] = {(d["batch"], d["context"]): d["seconds"] for d in data["layers"]}
    return raw, data["parts"]


def show(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def summarise(raw: Raw) -> dict:
    decodes = [
        {"batch": b, "context": c, "seconds": s, "median": statistics.median(s)} for (b, c), s in raw["decode"].items()
    ]
    prefills = [{"length": n, "seconds": s, "median": statistics.median(s)} for (n,), s in raw["prefill"].items()]
    found: dict = {"decode": decodes, "prefill": prefills, "fit": {}}
    if decodes:
        columns = [[1.0] * len(decodes), [d["batch"] for d in decodes], [d["batch"] * d["context"] for d in decodes]]
        found["fit"]["decode"] = fit(columns, [d["median"] for d in decodes])
    if prefills:
        columns = [[1.0] * len(prefills), [p["length"] for p in prefills], [p["length"] ** 2 for p in prefills]]
        found["fit"]["prefill"] = fit(columns, [p["median"] for p in prefills])
    found["layers"] = [
        {"batch": b, "context": c, "seconds": s, "median": {k: statistics.median(x[k] for x in s) for k in s[0]}}
        for (b, c), s in raw["layers"].items()
    ]
    return found


def draw(data: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    a, b, c = data["fit"]["decode"]["coefficients"]
    for batch in sorted({d["batch"] for d in data["decode"]}):
        mine = sorted((d["context"], d["median"] * 1e3) for d in data["decode"] if d["batch"] == batch)
        xs = np.geomspace(mine[0][0], mine[-1][0], 50)
        (line,) = left.plot(xs, (a + b * batch + c * batch * xs) * 1e3, linewidth=1)
        left.plot(*zip(*mine), "o", markersize=4, color=line.get_color(), label=f"batch {batch}")
    left.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="decode step, ms", title="Decode")
    left.legend(fontsize=8)
    if data["prefill"]:
        mine = [(p["length"], p["median"]) for p in data["prefill"]]
        a, b, c = data["fit"]["prefill"]["coefficients"]
        xs = np.geomspace(mine[0][0], mine[-1][0], 50)
        right.plot(xs, a + b * xs + c * xs**2, linewidth=1)
        right.plot(*zip(*mine), "o", markersize=4)
    right.set(xscale="log", yscale="log", xlabel="prompt, tokens", ylabel="prefill, s", title="Prefill")
    for axis in (left.xaxis, left.yaxis, right.xaxis, right.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    left.set_yticks([t for t in (20, 30, 50, 100, 200, 300, 500, 1000) if left.get_ylim()[0] < t < left.get_ylim()[1]])
    figure.suptitle(f"{data['model']}: points are medians, lines the fit", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def load(args: argparse.Namespace) -> Engine:
    longest = max([*args.contexts, *args.lengths]) + 64
    config = EngineConfig(
        dtype="bfloat16",
        num_threads=args.threads,
        graph=args.graph,
        batch_buckets=tuple(args.batches) if args.graph == "full" else None,
        max_num_seqs=max(args.batches, default=1),
        max_model_len=longest,
        kv_cache_tokens=max(args.kv_tokens, longest),
        max_num_batched_tokens=max(args.kv_tokens, longest),  # a pretended prefill is one step
        enable_prefix_caching=False,
    )
    engine = Engine.load(args.model, config)
    fill_cache(engine)
    return engine


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--repeat-up-to", type=int, default=1024, help="longer prefills are measured once")
    parser.add_argument("--seconds", type=float, help="measure no longer than this; the same command then goes on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--graph", choices=["off", "full"], default="off")
    parser.add_argument("--layers", action="store_true", help="time by kind of layer, too")
    parser.add_argument(
        "--kv-tokens", type=int, default=160_000, help="what the cache holds; larger cases are left out"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="without suffix")
    args = parser.parse_args()
    if args.layers and args.graph == "full":
        parser.error("--layers uses hooks, which a captured step passes by: choose --graph off")
    return args


def main() -> None:
    args = arguments()
    path = args.output.with_suffix(".json")
    settings = {"model": args.model, "threads": args.threads, "graph": args.graph, "layers": args.layers}
    raw, parts = earlier(path, settings)
    engine = load(args)
    info = engine.info
    part = {"at": time.strftime("%Y-%m-%d %H:%M"), "commit": commit(), "machine": machine(), "limits": [limits(engine)]}
    complete = measure(engine, args, raw)
    show("")
    part["limits"].append(limits(engine))
    data = {
        "model": f"{Path(args.model).parent.name} {info.quant.get('scheme', info.dtype)}",
        "settings": settings,
        "parts": [*parts, part],
        "quant": info.quant,
        "ops": info.ops,
        **summarise(raw),
    }
    path.write_text(json.dumps(data, indent=1))
    if data["fit"].get("decode"):
        draw(data, args.output.with_suffix(".png"))
    for phase, found in data["fit"].items():
        print(phase, " ".join(f"{x:.3e}" for x in found["coefficients"]), found["median_relative_error"])
    print("complete" if complete else f"{path} holds a part: the same command goes on")


def commit() -> str:
    command, folder = ["git", "rev-parse", "--short", "HEAD"], Path(__file__).parent
    return subprocess.run(command, capture_output=True, text=True, cwd=folder).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
