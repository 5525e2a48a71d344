"""Engine settings: what was asked for. What is in effect stands in `EngineInfo`, filled by the engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from surefoot.core.errors import InputError

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANT_SCHEMES = ("w8a16", "w8a8", "w4a16", "w4a8")
GRAPH_MODES = ("auto", "full", "off")


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine. `None` means: let the planner choose, and report what it chose.

    max_model_len: longest prompt plus output, in tokens.
    max_num_seqs: most requests in one step.  max_num_batched_tokens: most tokens in one step (the prefill budget).
    prefill_chunk_size: most prompt tokens of one request in one step; None leaves only the budget.
    block_size: tokens per KV page.  kv_cache_tokens: total tokens that the KV pages hold.
    num_state_checkpoints: recurrent-state snapshots kept for prefix caching of hybrid models; 0 turns it off there.
    ops: "auto" picks the best registered implementation of each op, "reference" forces the readable one.
    random_weights: seed for random weights instead of a checkpoint.
    quant: quantise the weights while they stream in, by this scheme; a folder that is quantised already needs no flag.
    quant_group_size: inputs that share an int4 scale; None takes the scheme's own.
    quant_lm_head: quantise the output layer too, which is kept otherwise (faster decoding, larger errors).
    graph: "full" captures a whole decode step per batch bucket or fails, "auto" does so where it can, "off" never.
    batch_buckets: sizes to which decode steps are padded; None leaves them to the graphs, and none without graphs.
    token_buckets: sizes to which steps that prefill are padded; None never pads them.
    """

    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    prefill_chunk_size: int | None = None
    block_size: int | None = None
    kv_cache_tokens: int | None = None
    enable_prefix_caching: bool = True
    num_state_checkpoints: int = 8
    ops: str = "auto"
    random_weights: int | None = None
    num_threads: int | None = None
    quant: str | None = None
    quant_group_size: int | None = None
    quant_lm_head: bool = False
    graph: str = "auto"
    batch_buckets: tuple[int, ...] | None = None
    token_buckets: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPES)}")
        if self.ops not in ("auto", "reference"):
            raise InputError(f"ops must be 'auto' or 'reference', got {self.ops!r}")
        if self.quant is not None and self.quant not in QUANT_SCHEMES:
            raise InputError(f"unknown quantisation scheme {self.quant!r}: choose one of {', '.join(QUANT_SCHEMES)}")
        if self.quant is None and (self.quant_group_size is not None or self.quant_lm_head):
            raise InputError("quant_group_size and quant_lm_head belong to quant: say which scheme")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "prefill_chunk_size",
            "block_size",
            "kv_cache_tokens",
            "num_threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.graph not in GRAPH_MODES:
            raise InputError(f"graph must be one of {', '.join(GRAPH_MODES)}, got {self.graph!r}")
        for name in ("batch_buckets", "token_buckets"):
            sizes = getattr(self, name)
            if sizes is not None and (not sizes or sizes[0] < 1 or any(a >= b for a, b in zip(sizes, sizes[1:]))):
                raise InputError(f"{name} must be ascending sizes of at least 1, got {', '.join(map(str, sizes))}")
        if self.num_state_checkpoints < 0:
            raise InputError(f"num_state_checkpoints must be 0 or more, got {self.num_state_checkpoints}")


@dataclass
class EngineInfo:
    """What is in effect: enough that nobody has to read the code to know where a number came from.

    num_blocks: KV pages, of which num_dummy_blocks belong to padded rows.
    graph: "full" or "off"; the notes say why and what it cost.  batch_buckets, token_buckets: empty means no padding.
    quant: scheme, group_size, source ("folder" or "on load"), number of layers, and what was excluded; empty without.
    weights_digest: of the checkpoint, as stored (`weights.fingerprint`); None for random weights.
    """

    model: str
    architecture: str
    device: str
    device_name: str
    dtype: str
    num_parameters: int
    weight_bytes: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    state_bytes: int
    prefix_caching: str
    num_dummy_blocks: int = 1
    num_threads: int = 0
    graph: str = "off"
    batch_buckets: tuple[int, ...] = ()
    token_buckets: tuple[int, ...] = ()
    weights_digest: str | None = None
    quant: dict[str, Any] = field(default_factory=dict)
    ops: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def precision(self) -> str:
        """What a line beside a speed has to say: "bfloat16", or "w8a8 in bfloat16"."""
        return f"{self.quant['scheme']} in {self.dtype}" if self.quant else self.dtype

    def as_dict(self) -> dict:
        return asdict(self)
