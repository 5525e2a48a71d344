"""How many pages and slots fit: layers declare their state, the planner turns declarations and memory into sizes.

What was requested is honoured or refused with a line that says what would fit; it is never changed silently. What was
not requested is chosen, and a note says so where the choice is less than one would expect. Sizes in bytes and tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from surefoot.core.errors import CapacityError

RECURRENT_BYTES = 4  # fp32 whatever the model dtype: a delta-rule state in 16 bits loses accuracy


@dataclass(frozen=True)
class PagedKVSpec:
    """State of one softmax-attention layer: a key and a value vector per token and KV head."""

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class LinearStateSpec:
    """State of one linear-attention layer: per request, the last inputs of a causal convolution and a matrix per head.

    conv_dim: channels of the convolution.  conv_width: inputs it looks back at, kernel size - 1.
    """

    conv_dim: int
    conv_width: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int


StateSpec = PagedKVSpec | LinearStateSpec


@dataclass(frozen=True)
class CachePlan:
    """Sizes of the cache tensors.

    num_blocks: KV pages, the num_dummy_blocks included.
    kv_bytes = num_blocks * block_size * sum of kv_bytes_per_token.
    num_slots: state slots of running requests and the num_dummy_slots (0 without linear-attention layers).
    num_checkpoints: state rows after them.
    state_bytes = (num_slots + num_checkpoints) * sum of state_bytes_per_slot.
    """

    num_blocks: int
    num_slots: int
    num_checkpoints: int
    max_model_len: int
    kv_bytes: int
    state_bytes: int
    notes: list[str] = field(default_factory=list)
    num_dummy_blocks: int = 1
    num_dummy_slots: int = 1

    @property
    def num_state_rows(self) -> int:
        """First dimension of the state tensors."""
        return self.num_slots + self.num_checkpoints


def kv_bytes_per_token(spec: StateSpec, dtype_bytes: int) -> int:
    """2 (key and value) * num_kv_heads * head_dim * dtype_bytes, for each token; 0 for a linear-attention layer."""
    return 2 * spec.num_kv_heads * spec.head_dim * dtype_bytes if isinstance(spec, PagedKVSpec) else 0


def state_bytes_per_slot(spec: StateSpec, dtype_bytes: int) -> int:
    """conv_dim * conv_width * dtype_bytes + num_v_heads * head_k_dim * head_v_dim * 4, for each request however long;
    0 for a softmax-attention layer."""
    if not isinstance(spec, LinearStateSpec):
        return 0
    conv = spec.conv_dim * spec.conv_width * dtype_bytes
    return conv + spec.num_v_heads * spec.head_k_dim * spec.head_v_dim * RECURRENT_BYTES


@dataclass(frozen=True)
class _Room:
    """What the budget leaves for pages, `pages` without dummies (None: the model has no KV, pages cost nothing)."""

    pages: int | None
    block_size: int
    budget_bytes: int

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def holds(self, pages: int) -> bool:
        return self.pages is None or pages <= self.pages

    @property
    def says(self) -> str:
        tokens = "any number of" if self.pages is None else self.pages * self.block_size
        return f"the memory budget of {format_bytes(self.budget_bytes)} holds {tokens} tokens of KV cache"


def plan(
    specs: Sequence[StateSpec],
    *,
    dtype_bytes: int,
    max_model_len: int | None,
    model_max_len: int,
    max_num_seqs: int,
    block_size: int,
    kv_cache_tokens: int | None,
    num_checkpoints: int,
    budget_bytes: int,
    num_dummy_blocks: int = 1,
    num_dummy_slots: int = 1,
) -> CachePlan:
    """Sizes for the layers' declarations within `budget_bytes`.

    num_dummy_blocks, num_dummy_slots: pages and slots that nobody owns, for padded rows (graphs, buckets).

    `max_model_len` and `kv_cache_tokens` are the requested values or None. Unrequested, max_model_len is the model's,
    reduced to what one sequence can have; KV tokens are max_num_seqs sequences of max_model_len, or what the budget
    holds after the states, and at least one such sequence. A requested kv_cache_tokens is rounded up to whole pages.
    """
    notes: list[str] = []
    page_bytes = block_size * sum(kv_bytes_per_token(spec, dtype_bytes) for spec in specs)
    slot_bytes = sum(state_bytes_per_slot(spec, dtype_bytes) for spec in specs)
    num_slots, num_checkpoints = (num_dummy_slots + max_num_seqs, num_checkpoints) if slot_bytes else (0, 0)
    state_bytes = (num_slots + num_checkpoints) * slot_bytes

    left = budget_bytes - state_bytes
    fixed = (num_dummy_blocks + 1) * page_bytes + num_dummy_slots * slot_bytes
    if left < (num_dummy_blocks + 1) * page_bytes:
        raise CapacityError(_states_too_big(budget_bytes, fixed, slot_bytes, max_num_seqs, num_checkpoints))
    room = _Room(left // page_bytes - num_dummy_blocks if page_bytes else None, block_size, budget_bytes)

    pages = _requested_pages(kv_cache_tokens, room, notes)
    length = _choose_length(max_model_len, model_max_len, pages, room, notes)
    if pages is None:
        wanted = max_num_seqs * room.pages_for(length)
        pages = wanted if room.pages is None else min(wanted, room.pages)
    num_blocks = pages + num_dummy_blocks
    kv_bytes = num_blocks * page_bytes
    dummies = num_dummy_blocks, num_dummy_slots
    return CachePlan(num_blocks, num_slots, num_checkpoints, length, kv_bytes, state_bytes, notes, *dummies)


def _requested_pages(kv_cache_tokens: int | None, room: _Room, notes: list[str]) -> int | None:
    """Pages (without dummies) that the requested KV tokens need, or None if nothing was requested."""
    if kv_cache_tokens is None:
        return None
    pages = room.pages_for(kv_cache_tokens)
    if not room.holds(pages):
        raise CapacityError(f"kv_cache_tokens {kv_cache_tokens} does not fit: {room.says}; ask for that or less")
    if pages * room.block_size != kv_cache_tokens:
        notes.append(
            f"kv_cache_tokens {kv_cache_tokens} rounded up to {pages * room.block_size}, "
            f"whole pages of {room.block_size} tokens"
        )
    return pages


def _choose_length(requested: int | None, model_max_len: int, pages: int | None, room: _Room, notes: list[str]) -> int:
    """max_model_len: the requested one if it is possible, else the longest that is."""
    held = room.pages if pages is None else pages
    if requested is not None:
        if requested > model_max_len:
            raise CapacityError(f"max_model_len {requested} exceeds the model's {model_max_len}: ask for that or less")
        if pages is not None and room.pages_for(requested) > pages:
            raise CapacityError(
                f"kv_cache_tokens cannot hold one sequence of max_model_len {requested}: raise kv_cache_tokens to "
                f"{requested} or lower max_model_len to {pages * room.block_size}"
            )
        if not room.holds(room.pages_for(requested)):
            raise CapacityError(f"max_model_len {requested} does not fit: {room.says}; lower max_model_len to that")
        return requested
    if held is None or held * room.block_size >= model_max_len:
        return model_max_len
    length = held * room.block_size
    why = room.says if pages is None else f"kv_cache_tokens holds {length} tokens"
    notes.append(f"max_model_len reduced from the model's {model_max_len} to {length}: {why}")
    return length


def _states_too_big(budget: int, fixed: int, slot_bytes: int, max_num_seqs: int, num_checkpoints: int) -> str:
    """The error line when states and `fixed` (dummies and one page to use) exceed the budget."""
    need = fixed + (max_num_seqs + num_checkpoints) * slot_bytes
    line = f"the memory budget of {format_bytes(budget)} is too small, the cache needs at least {format_bytes(need)}"
    if not slot_bytes:
        return f"{line}: free memory, or use a smaller model or dtype"
    rows = max(0, budget - fixed) // slot_bytes
    states = f"{max_num_seqs} sequences and {num_checkpoints} state checkpoints"
    if rows < 1:
        return f"{line} for {states}: free memory, not even one sequence fits"
    seqs = min(max_num_seqs, rows - num_checkpoints)
    if seqs >= 1:
        return f"{line} for {states}: lower max_num_seqs to {seqs}"
    seqs = min(max_num_seqs, rows)
    return f"{line} for {states}: lower max_num_seqs to {seqs} and num_state_checkpoints to {rows - seqs}"


def format_bytes(n: int) -> str:
    """1536 -> '1.5 KiB'."""
    if abs(n) < 1024:
        return f"{n} B"
    value, units = n / 1024, ["KiB", "MiB", "GiB", "TiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.1f} {units[0]}"
