"""Surefoot, transformers and llama.cpp on the same shape, in one run, interleaved: `make bench-peers`.

    python benchmarks/bench_peers.py MODEL --prepare                 # the files; minutes, once
    python benchmarks/bench_peers.py MODEL -o results.json           # everything
    python benchmarks/bench_peers.py MODEL --groups int8 --cases decode-8 --repeats 7 -o results.json
    python benchmarks/bench_peers.py --show results.json             # Markdown tables of the newest runs

MODEL is a folder with a config.json (llama.cpp: Llama family only); weights are random at the true shape. Each peer is
a process of its own and waits while another one is measured. A group compares equal weight bits: every matrix, the
output layer included, at those bits. Of a peer with several settings (transformers in bf16 and fp32) the one that was
fastest in the warm-up round is measured. Then the peers take turns, `--repeats` times, and the machine's limits are
measured in every turn; ratios are taken pair by pair.

decode-1, decode-8   median seconds of 8 steps after prompts of 32: forward pass, greedy choice, tokens on the host
prefill-512          one prompt of 512 up to its first token
load                 a fresh process, files in the page cache: from the call that loads to the first token of a prompt
                     of 32; imports are measured beside it, they are no part of it
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from peers import table

HERE = Path(__file__).parent
PROMPT = 32
# case: (command, tokens that one measurement brings out or takes in)
CASES: dict[str, tuple[dict, int]] = {
    "decode-1": ({"do": "decode", "batch": 1}, 1),
    "decode-8": ({"do": "decode", "batch": 8}, 8),
    "prefill-512": ({"do": "prefill", "tokens": 512}, 512),
    "load": ({"do": "prefill", "tokens": PROMPT}, 1),
}
# group: (Surefoot's folder, llama.cpp's format). Q4_0 multiplies by 8-bit activations, as w4a8 does.
GROUPS = {
    "int8": ("w8a8", "Q8_0"),
    "int4": ("w4a16", "Q4_0"),
    "int4-a8": ("w4a8", "Q4_0"),
    "bf16": ("full", "F16"),
}
BEST_FORMATS = ("F16", "BF16", "Q4_0", "Q4_K_M")  # beside the group's own, where llama.cpp's best is asked for


class Peer:
    """A worker process. `family`: peers of one family are settings of the same program."""

    def __init__(self, family: str, setting: str, options: dict):
        self.family, self.name = family, f"{family} {setting}".strip()
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "peers" / "worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.loaded = self.ask({"do": "load", **options})
        self.start_s = time.perf_counter() - begin - self.loaded["seconds"]

    def ask(self, command: dict) -> dict:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended while it was asked {command}; its error is above")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.stdout.close()  # type: ignore[union-attr]


Specs = list[tuple[str, str, dict]]  # family, setting, options of `load`; Surefoot first


def peers_of(group: str, case: str, files: Path, args: argparse.Namespace) -> Specs:
    folder, ftype = GROUPS[group]
    common = {"threads": args.threads}
    native = {"peer": "native", "model": str(files / folder), "dtype": "bfloat16", **common}
    specs: Specs = [("surefoot", f"{folder}{', graph' * (g == 'full')}", {**native, "graph": g}) for g in args.graph]
    if (files / f"{ftype}.gguf").exists():
        gguf = {"peer": "llama.cpp", **common}
        specs.append((f"llama.cpp {ftype}", "", {"gguf": str(files / f"{ftype}.gguf"), **gguf}))
        if (group, case) == ("int8", "prefill-512"):
            specs += [("llama.cpp best", f, {"gguf": str(files / f"{f}.gguf"), **gguf}) for f in args.best]
    hf = {"peer": "transformers", "model": str(files / "full"), **common}
    specs += [("transformers", dtype, {**hf, "dtype": dtype}) for dtype in args.dtypes]
    return [spec for spec in specs if spec[0] == "surefoot" or any(spec[0].startswith(f) for f in args.families)]


def fastest(peers: list[Peer], seconds: list[float]) -> list[Peer]:
    """One peer of each family; the others are closed."""
    best: dict[str, tuple[float, Peer]] = {}
    for peer, took in zip(peers, seconds):
        if peer.family not in best or took < best[peer.family][0]:
            best[peer.family] = (took, peer)
    kept = [peer for _, peer in best.values()]
    for peer in peers:
        if peer not in kept:
            peer.close()
    return kept


def measure(specs: Specs, case: str, repeats: int) -> dict:
    """Warm up, keep the best setting of each family, then take turns."""
    command, _ = CASES[case]
    peers = [Peer(*spec) for spec in specs]
    about = {peer.name: peer.ask({"do": "about"}) for peer in peers[:1]}
    warm = [ask_case(peer, command, -1) for peer in peers]
    warmup = dict(zip((peer.name for peer in peers), warm))
    peers = fastest(peers, warm)
    about |= {peer.name: peer.ask({"do": "about"}) for peer in peers[1:]}
    seconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    limits = []
    for repeat in range(repeats):
        limits.append(peers[0].ask({"do": "limits"}))
        for peer in peers:
            seconds[peer.name].append(ask_case(peer, command, repeat))
            progress(f"{case}: turn {repeat + 1} of {repeats}, {peer.name}")
    for peer in peers:
        peer.close()
    families = {peer.name: peer.family for peer in peers}
    return {"seconds": seconds, "families": families, "warmup": warmup, "limits": limits, "about": about}


def ask_case(peer: Peer, command: dict, repeat: int) -> float:
    extra = {"seed": repeat + 1} if command["do"] == "prefill" else {}
    return peer.ask(command | extra)["seconds"]


def measure_load(specs: Specs, repeats: int) -> dict:
    """A fresh process for every number; the first round warms the page cache."""
    command, _ = CASES["load"]
    seconds: dict[str, list[float]] = {}
    families: dict[str, str] = {}
    parts: dict[str, list[dict]] = {}
    for repeat in range(-1, repeats):
        for spec in specs:
            family, setting, options = spec
            peer = Peer(family, setting, options | ({"lazy": True} if options["peer"] == "native" else {}))
            first = ask_case(peer, command, repeat)
            if repeat >= 0:
                families[peer.name] = peer.family
                seconds.setdefault(peer.name, []).append(peer.loaded["seconds"] + first)
                part = {"start_s": peer.start_s, **peer.loaded, "first_token_s": first}
                parts.setdefault(peer.name, []).append(part)
            progress(f"load: turn {repeat + 1} of {repeats}, {peer.name}")
            peer.close()
    return {"seconds": seconds, "families": families, "parts": parts}


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def machine() -> dict:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), cpu)
    return {"cpu": cpu, "logical_cpus": os.cpu_count(), "load_average": os.getloadavg()[0], "os": platform.platform()}


def append(output: Path, record: dict) -> None:
    """After every case, so that an end halfway loses nothing."""
    runs = json.loads(output.read_text()) if output.exists() else []
    partial = output.with_suffix(".partial")
    partial.write_text(json.dumps([*runs, record], indent=1))
    partial.rename(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--families", nargs="+", default=["llama.cpp", "transformers"])
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], help="of transformers; the faster counts"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--graph", nargs="+", default=["auto"], help="Surefoot's setting: auto, full; the faster counts"
    )
    parser.add_argument("--best", nargs="*", default=BEST_FORMATS, help="llama.cpp's formats for its best prefill")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(".cache/peers"), help="where the model files are kept")
    parser.add_argument("--prepare", action="store_true", help="make the model files and end")
    parser.add_argument("--show", type=Path, help="print the tables of a results file and end")
    parser.add_argument("-o", "--output", type=Path, default=Path("peers.json"), help="results are added to it")
    args = parser.parse_args()
    if args.show:
        return print(table.render(json.loads(args.show.read_text())))
    if args.model is None:
        parser.error("which MODEL?")
    from peers.files import prepare

    files = prepare(args.model, args.cache)
    if args.prepare:
        return None
    for group in args.groups:
        for case in args.cases:
            specs = peers_of(group, case, files, args)
            head = {"model": args.model.name, "group": group, "case": case, "tokens": CASES[case][1]}
            head |= {"threads": args.threads, "at": time.strftime("%Y-%m-%dT%H:%M:%S"), "machine": machine()}
            found = measure_load(specs, args.repeats) if case == "load" else measure(specs, case, args.repeats)
            append(args.output, head | found)
            progress("")
            print(table.line(head | found), flush=True)
    return None


if __name__ == "__main__":
    main()
