"""Surefoot, transformers and llama.cpp on the same shape, in one run, interleaved: `make bench-peers`.

    python benchmarks/bench_peers.py MODEL [--groups int8 int4 bf16] [--repeats 5] [--threads 2] [-o results.json]

MODEL is a folder with a config.json (Llama family for llama.cpp); weights are random at the true shape. Each peer is a
process of its own and waits while another one is measured. A group compares equal weight bits: every matrix, the output
layer included, at those bits. Decode is the median step of 8 after a prompt of 32; prefill is one prompt of 512 up to
its first token. Every case is warmed up once, then measured in turn, `--repeats` times; ratios are taken pair by pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CASES = [
    ("decode, batch 1", {"do": "decode", "batch": 1}, 1),
    ("decode, batch 8", {"do": "decode", "batch": 8}, 8),
    ("prefill 512", {"do": "prefill", "tokens": 512}, 512),
]
GROUPS = {"int8": ("w8a8", "Q8_0"), "int4": ("w4a16", "Q4_0"), "bf16": (None, "F16")}


class Peer:
    """A worker process and its name."""

    def __init__(self, name: str, options: dict):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "peers" / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        loaded = self.ask({"do": "load", **options})
        self.load_seconds, self.about = loaded["seconds"], loaded["about"]

    def ask(self, command: dict) -> dict:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended while it was asked {command}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def gguf_files(model: Path, cache: Path, formats: list[str]) -> dict[str, Path]:
    sys.path.insert(0, str(HERE / "peers"))
    from gguf_export import export_f16, quantise

    cache.mkdir(parents=True, exist_ok=True)
    files = {name: cache / f"{model.name}-{name}.gguf" for name in {"F16", *formats}}
    if not files["F16"].exists():
        export_f16(model, files["F16"])
    for name in formats:
        if not files[name].exists():
            quantise(files["F16"], files[name], name)
    return files


def measure(peers: list[Peer], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by case and peer; one warm-up round, then the peers take turns."""
    raw: dict[str, dict[str, list[float]]] = {}
    for case, command, _ in CASES:
        raw[case] = {peer.name: [] for peer in peers}
        for repeat in range(-1, repeats):
            for peer in peers:
                extra = {"seed": repeat} if command["do"] == "prefill" else {}
                seconds = peer.ask(command | extra)["seconds"]
                if repeat >= 0:
                    raw[case][peer.name].append(seconds)
    return raw


def table(group: str, raw: dict[str, dict[str, list[float]]]) -> None:
    names = list(next(iter(raw.values())))
    print(f"\n{group}: tokens/s (median), and Surefoot's ratio to each peer, median (min..max) of the pairs")
    for case, _, tokens in CASES:
        ours = raw[case][names[0]]
        cells = [f"{case:16} {names[0]} {tokens / statistics.median(ours):.1f}"]
        for name in names[1:]:
            ratios = sorted(b / a for a, b in zip(ours, raw[case][name]))
            speed = tokens / statistics.median(raw[case][name])
            cells.append(f"{name} {speed:.1f} -> {statistics.median(ratios):.2f}x ({ratios[0]:.2f}..{ratios[-1]:.2f})")
        print(" | ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(".cache/peers"), help="where the GGUF files are kept")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    files = gguf_files(args.model, args.cache, [GROUPS[g][1] for g in args.groups])
    common = {"model": str(args.model), "threads": args.threads}
    results = {}
    for group in args.groups:
        quant, ftype = GROUPS[group]
        peers = [
            Peer(f"surefoot {quant or 'bf16'}", {"peer": "native", **common, "dtype": "bfloat16", "quant": quant}),
            Peer(f"llama.cpp {ftype}", {"peer": "llama.cpp", "gguf": str(files[ftype]), "threads": args.threads}),
            Peer("transformers bf16", {"peer": "transformers", **common, "dtype": "bfloat16"}),
        ]
        raw = measure(peers, args.repeats)
        table(group, raw)
        results[group] = {"raw": raw, "peers": {p.name: {"about": p.about, "load_s": p.load_seconds} for p in peers}}
        for peer in peers:
            peer.close()
    if args.output:
        args.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
