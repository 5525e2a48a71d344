"""What each latency metric means, ours and other tools', computed from the same raw log.

The same word means different things: vLLM's time per output token leaves the first token out, GuideLLM's includes it.
Each `Definition` has its formula, its owner and the function from one request's log to its values in seconds (a gap
metric gives many). Versions that were read: vLLM 02cfb534 (benchmarks/lib/endpoint_request_func.py, serve.py), GuideLLM
0.7 (schemas/request_stats.py), EvalScope 1.x (perf/plugin/api), llama.cpp (tools/llama-bench).

    t0 sent; t1, tn first and last chunk that carries a token; n output tokens (server's usage if it tells);
    k1 tokens in the first such chunk; c1 … cm all chunks with a choice (role and finish included); end last byte
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from surefoot.bench.rawlog import Chunk, RequestLog

Values = list[float]


@dataclass(frozen=True)
class Definition:
    """`metric` as `tool` defines it. `values(log)` in seconds (`unit` "s") or tokens per second ("tok/s")."""

    metric: str
    tool: str
    formula: str
    meaning: str
    values: Callable[[RequestLog], Values]
    unit: str = "s"

    @property
    def key(self) -> str:
        return f"{self.metric}@{self.tool}"


def _choices(log: RequestLog) -> list[Chunk]:
    """Chunks with an entry in `choices`, whether or not they carry a token."""
    return [c for c in log.chunks if c.kind in ("role", "reasoning", "text", "finish", "other")]


def _messages(log: RequestLog) -> list[Chunk]:
    """Everything but [DONE]."""
    return [c for c in log.chunks if c.kind != "done"]


def _gaps(chunks: list[Chunk]) -> Values:
    return [b.time - a.time for a, b in zip(chunks, chunks[1:])]


def _ratio(seconds: float, count: int) -> Values:
    return [seconds / count] if count > 0 else []


# ---- ours


def ttft(log: RequestLog) -> Values:
    first = log.first_token
    return [first.time - log.sent] if first else []


def ttfr(log: RequestLog) -> Values:
    answer = next((c for c in log.chunks if c.kind == "text"), None)
    return [answer.time - log.sent] if answer else []


def e2e(log: RequestLog) -> Values:
    return [log.ended - log.sent]


def tpot(log: RequestLog) -> Values:
    chunks = log.token_chunks
    if not chunks:
        return []
    return _ratio(chunks[-1].time - chunks[0].time, log.num_output_tokens - (chunks[0].tokens or 1))


def itl(log: RequestLog) -> Values:
    return _gaps(log.token_chunks)


# ---- others


def vllm_ttft(log: RequestLog) -> Values:
    chunks = _choices(log)
    return [chunks[0].time - log.sent] if chunks else []


def vllm_e2el(log: RequestLog) -> Values:
    chunks = _choices(log)
    return [chunks[-1].time - log.sent] if chunks else []


def vllm_tpot(log: RequestLog) -> Values:
    chunks = _choices(log)
    return _ratio(chunks[-1].time - chunks[0].time, log.num_output_tokens - 1) if chunks else []


def vllm_itl(log: RequestLog) -> Values:
    return _gaps(_choices(log))


def guidellm_tpot(log: RequestLog) -> Values:
    chunks = log.token_chunks
    return _ratio(chunks[-1].time - log.sent, log.num_output_tokens) if chunks else []


def guidellm_itl(log: RequestLog) -> Values:
    chunks = log.token_chunks
    return _ratio(chunks[-1].time - chunks[0].time, log.num_output_tokens - 1) if chunks else []


def evalscope_latency(log: RequestLog) -> Values:
    messages = _messages(log)
    return [messages[-1].time - log.sent] if messages else []


def evalscope_tpot(log: RequestLog) -> Values:
    first, last = vllm_ttft(log), evalscope_latency(log)
    return _ratio(last[0] - first[0], log.num_output_tokens - 1) if first and last else []


def evalscope_itl(log: RequestLog) -> Values:
    """Gaps that end at a chunk with a choice; the clock also moves at chunks without one."""
    messages, first = _messages(log), _choices(log)[:1]
    return [b.time - a.time for a, b in zip(messages, messages[1:]) if b in _choices(log) and b not in first]


def llama_bench_tg(log: RequestLog) -> Values:
    chunks = log.token_chunks
    if not chunks or chunks[-1].time <= chunks[0].time:
        return []
    return [(log.num_output_tokens - (chunks[0].tokens or 1)) / (chunks[-1].time - chunks[0].time)]


OURS = "surefoot"
DEFINITIONS: tuple[Definition, ...] = (
    Definition("ttft", OURS, "t1 - t0", "time to the first token, thinking included; a role-only chunk is none", ttft),
    Definition("ttfr", OURS, "first answer text - t0", "time to the first token of the answer itself", ttfr),
    Definition("tpot", OURS, "(tn - t1) / (n - k1)", "mean time per token after the first chunk of tokens", tpot),
    Definition("itl", OURS, "t(i+1) - t(i)", "gap between chunks that carry tokens, pooled over requests", itl),
    Definition("e2e", OURS, "end - t0", "until the last byte of the answer", e2e),
    Definition("ttft", "vllm", "c1 - t0", "first chunk with a choice, which may be the role-only one", vllm_ttft),
    Definition("tpot", "vllm", "(cm - c1) / (n - 1)", "(latency - TTFT) / (output tokens - 1)", vllm_tpot),
    Definition("itl", "vllm", "c(i+1) - c(i)", "gap between any chunks with a choice, pooled", vllm_itl),
    Definition(
        "e2e", "vllm", "cm - t0", "until the last chunk with a choice; usage and [DONE] do not count", vllm_e2el
    ),
    Definition("ttft", "guidellm", "t1 - t0", "first chunk that updated the content", ttft),
    Definition("tpot", "guidellm", "(tn - t0) / n", "includes the time to the first token", guidellm_tpot),
    Definition("itl", "guidellm", "(tn - t1) / (n - 1)", "one mean per request, not the single gaps", guidellm_itl),
    Definition("e2e", "guidellm", "end - t0", "until the response is closed", e2e),
    Definition("ttft", "evalscope", "c1 - t0", "first chunk with a choice", vllm_ttft),
    Definition(
        "tpot",
        "evalscope",
        "(last - c1) / (n - 1)",
        "last = last message before [DONE], also a usage-only one",
        evalscope_tpot,
    ),
    Definition("itl", "evalscope", "c(i+1) - message before it", "gap between messages, pooled", evalscope_itl),
    Definition("e2e", "evalscope", "last - t0", "until the last message before [DONE]", evalscope_latency),
    Definition(
        "tg",
        "llama-bench",
        "(n - k1) / (tn - t1)",
        "decode rate; llama-bench averages rates, not times; it runs in process, without sampling and without a server",
        llama_bench_tg,
        "tok/s",
    ),
)

# Metrics that are not one request's: text only, computed in surefoot/bench/metrics.py, engine.py and steps.py.
OTHERS: tuple[tuple[str, str, str], ...] = (
    ("duration", "last end - first sent", "of the measured requests of one point"),
    ("requests/s", "requests without error / duration", ""),
    ("output tokens/s", "sum of n / duration", "requests without error"),
    ("total tokens/s", "(prompt + output tokens) / duration", "prompt tokens as the server counts them"),
    ("goodput", "requests without error within every target / duration", "targets: --goodput ttft:200,tpot:50 (ms)"),
    ("send lag", "sent - scheduled", "how late this client was; not part of any latency"),
    ("load time", "end - begin of loading", "from the reference to an engine that takes requests; disk cache as found"),
    ("prefill time", "sum of the steps of B prompts asked for one token", "a pass of its own: nothing decodes in it"),
    ("prefill tokens/s", "B × P / prefill time", "per pass; includes the head and the choice of the first token"),
    ("decode step", "time of a step in which all B sequences decode", "device synchronised before and after"),
    ("decode tokens/s", "B / decode step", ""),
    ("generation time", "first step begins - last step ends", "B prompts of P, N tokens each, prefill included"),
    ("MFU", "2 × matrix weights × tokens / time / peak FLOP/s", "attention's own FLOPs left out: a lower bound"),
    ("MBU", "(weights + cache read) / decode step / peak bytes/s", "bytes that one step must read at least"),
)


def table() -> list[dict[str, str]]:
    """The definition table as plain records."""
    rows = [
        {"metric": d.metric, "tool": d.tool, "formula": d.formula, "meaning": d.meaning, "unit": d.unit}
        for d in DEFINITIONS
    ]
    return rows + [{"metric": m, "tool": OURS, "formula": f, "meaning": t, "unit": ""} for m, f, t in OTHERS]
