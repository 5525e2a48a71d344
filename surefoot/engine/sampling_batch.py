"""What the requests of one step ask of the sampler, as tensors: host lists in, one copy per dtype to the device.

Only what is in use is built: a step of greedy requests without penalties or log-probabilities builds nothing.

Penalties, logit_bias and min_tokens all change a few logits of a row, so they travel as one sparse list of edits,
(row, token id, repetition factor, shift), each pair of row and token at most once. The table behind it grows with the
output and is never rebuilt, so a step costs the tokens that are new and not the length of the prompt.

Randomness is one uniform number per row, a hash of (seed, index of the output token). A draw therefore depends on
nothing else: not on batch neighbours, chunk sizes or preemption.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from surefoot.core.errors import InputError
from surefoot.core.request import Request
from surefoot.core.sampling import SamplingParams

MAX_CANDIDATES = 1024
MIN_TEMPERATURE = 1e-5
MIN_TOP_P = 1e-9


@dataclass(frozen=True)
class Edits:
    """E changes of single logits: x -> (x / repetition if x > 0 else x * repetition) - shift. All tensors are [E]."""

    rows: torch.Tensor
    ids: torch.Tensor
    repetition: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True)
class Draw:
    """n rows that draw at random and filter alike; each tensor is [n, 1]. `rows` [n] is None when it is every row.

    num_candidates: how many of the most likely tokens hold everything that can be kept; 0 when nothing bounds it.
    """

    rows: torch.Tensor | None
    uniform: torch.Tensor
    temperature: torch.Tensor
    min_p: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    top_k: torch.Tensor | None = None
    num_candidates: int = 0


@dataclass(frozen=True)
class SamplingBatch:
    """Everything `sampler.sample` needs beside the logits [N, V]. Rows in no `draws` entry are greedy.

    num_logprobs: most alternatives that a row wants reported, None if no row wants log-probabilities.
    logprob_rows: [n] rows that want them; None is every row.
    """

    num_rows: int
    edits: Edits | None = None
    draws: list[Draw] = field(default_factory=list)
    num_logprobs: int | None = None
    logprob_rows: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether every row is greedy and nothing else is wanted."""
        return self.edits is None and not self.draws and self.num_logprobs is None


def build(rows: Sequence[Request], vocab_size: int, device: torch.device | str) -> SamplingBatch:
    """Tensors for the next token of each request, in the order of the logits' rows."""
    upload = _Upload()
    edits = _stage_edits(rows, vocab_size, upload)
    groups: dict[str, list[int]] = {}
    for i, request in enumerate(rows):
        if not request.params.greedy:
            groups.setdefault(_kind(request.params, vocab_size), []).append(i)
    draws = [_stage_draw(rows, members, kind, vocab_size, upload) for kind, members in groups.items()]
    wanted = [i for i, r in enumerate(rows) if r.params.logprobs is not None]
    logprob_rows = upload.ints(wanted) if 0 < len(wanted) < len(rows) else None
    tensors = upload.ship(torch.device(device))
    return SamplingBatch(
        num_rows=len(rows),
        edits=Edits(*(tensors[i] for i in edits)) if edits else None,
        draws=[
            Draw(
                rows=None if d.rows is None else tensors[d.rows],
                num_candidates=d.num_candidates,
                **{name: tensors[i].unsqueeze(-1) for name, i in d.columns.items()},
            )
            for d in draws
        ],
        num_logprobs=max((rows[i].params.logprobs or 0 for i in wanted), default=None),
        logprob_rows=None if logprob_rows is None else tensors[logprob_rows],
    )


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids that the model does not have."""
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        bad = next((t for t in ids if not 0 <= t < vocab_size), None)
        if bad is not None:
            raise InputError(f"{name} names token {bad}: token ids of this model lie in 0..{vocab_size - 1}")


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for the index-th output token of a seed.

    24 bits, because fp32 holds them exactly: more would round to 1.0 now and then and select past the end.
    """
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little") >> 8) / 2**24


class SamplerState:
    """What the sampler remembers of one request between steps, kept in `Request.sampler_state`."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self.edits = _EditTable(request, vocab_size)

    @classmethod
    def of(cls, request: Request, vocab_size: int) -> SamplerState:
        if request.sampler_state is None:
            request.sampler_state = cls(request, vocab_size)
        return request.sampler_state


class _EditTable:
    """The logits of one request that penalties, bias and min_tokens change, in order of first appearance."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.params
        self.params, self.vocab_size = params, vocab_size
        self.penalised = params.repetition_penalty != 1.0 or bool(params.presence_penalty or params.frequency_penalty)
        self.num_counted = 0
        self.size = 0
        self.position: dict[int, int] = {}
        seen = set(request.prompt_token_ids) if params.repetition_penalty != 1.0 else set()
        banned = _stopping_ids(request) if params.min_tokens else set()
        room = len(seen) + len(banned) + len(params.logit_bias)
        room += min(params.max_tokens, vocab_size) if self.penalised else 0
        self.ids = np.zeros(room, dtype=np.int64)
        self.repetition = np.ones(room, dtype=np.float32)
        self.counts = np.zeros(room, dtype=np.float32)
        self.bias = np.zeros(room, dtype=np.float32)
        for token in seen:
            self._mark_seen(token)
        for token, bias in params.logit_bias.items():
            if (at := self._at(token)) is not None:
                self.bias[at] = bias
        self.banned = [at for token in banned if (at := self._at(token)) is not None]

    def arrays(self, output_token_ids: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """(ids, repetition, shift) before the next token, or None if nothing is to be changed."""
        params = self.params
        banning = bool(self.banned) and len(output_token_ids) < params.min_tokens
        if not (self.penalised or params.logit_bias or banning):
            return None
        if self.penalised:
            for token in output_token_ids[self.num_counted :]:
                if (at := self._mark_seen(token)) is not None:
                    self.counts[at] += 1
            self.num_counted = len(output_token_ids)
        n, counts = self.size, self.counts[: self.size]
        shift = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts - self.bias[:n]
        if banning:
            shift[self.banned] = np.inf
        return self.ids[:n], self.repetition[:n], shift.astype(np.float32)

    def _at(self, token: int) -> int | None:
        """Place of a token in the table; None for an id outside the vocabulary, which has no logit to change."""
        if not 0 <= token < self.vocab_size:
            return None
        at = self.position.setdefault(token, self.size)
        if at == self.size:
            self.ids[at] = token
            self.size += 1
        return at

    def _mark_seen(self, token: int) -> int | None:
        at = self._at(token)
        if at is not None:
            self.repetition[at] = self.params.repetition_penalty
        return at


def _stopping_ids(request: Request) -> set[int]:
    eos = () if request.params.ignore_eos else request.eos_token_ids
    return {*eos, *request.params.stop_token_ids}


class _Upload:
    """Collects arrays, then sends all of one dtype in a single copy. Adding one returns its index in the result."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def ints(self, values: Sequence[int] | np.ndarray) -> int:
        return self._add(np.asarray(values, dtype=np.int64))

    def floats(self, values: Sequence[float] | np.ndarray) -> int:
        return self._add(np.asarray(values, dtype=np.float32))

    def _add(self, array: np.ndarray) -> int:
        self.arrays.append(array)
        return len(self.arrays) - 1

    def ship(self, device: torch.device) -> dict[int, torch.Tensor]:
        result: dict[int, torch.Tensor] = {}
        for dtype in (np.int64, np.float32):
            mine = [i for i, a in enumerate(self.arrays) if a.dtype == dtype]
            if mine:
                flat = torch.from_numpy(np.concatenate([self.arrays[i] for i in mine])).to(device, non_blocking=True)
                result.update(zip(mine, flat.split([len(self.arrays[i]) for i in mine])))
        return result


@dataclass(frozen=True)
class _StagedDraw:
    rows: int | None
    columns: dict[str, int]
    num_candidates: int


def _stage_edits(rows: Sequence[Request], vocab_size: int, upload: _Upload) -> list[int]:
    """Upload indices of rows, ids, repetition, shift; empty if no row has anything to change."""
    parts: list[tuple[np.ndarray, ...]] = []
    for i, request in enumerate(rows):
        arrays = SamplerState.of(request, vocab_size).edits.arrays(request.output_token_ids)
        if arrays is not None and len(arrays[0]):
            parts.append((np.full(len(arrays[0]), i, dtype=np.int64), *arrays))
    if not parts:
        return []
    row, ids, repetition, shift = (np.concatenate(column) for column in zip(*parts))
    return [upload.ints(row), upload.ints(ids), upload.floats(repetition), upload.floats(shift)]


def _kind(params: SamplingParams, vocab_size: int) -> str:
    """How a row finds its filter's threshold. The row alone decides, so that neighbours cannot change its rounding."""
    if 0 < params.top_k <= min(MAX_CANDIDATES, vocab_size):
        return "candidates"
    return "search" if params.top_p < 1.0 or 0 < params.top_k < vocab_size else "whole"


def _stage_draw(
    rows: Sequence[Request], members: list[int], kind: str, vocab_size: int, upload: _Upload
) -> _StagedDraw:
    requests = [rows[i] for i in members]
    params = [r.params for r in requests]
    draws = [uniform(SamplerState.of(r, vocab_size).seed, len(r.output_token_ids)) for r in requests]
    columns = {
        "uniform": upload.floats(draws),
        "temperature": upload.floats([max(p.temperature, MIN_TEMPERATURE) for p in params]),
    }
    top_k = [p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params]
    if any(p.min_p > 0 for p in params):
        columns["min_p"] = upload.floats([p.min_p for p in params])
    if any(p.top_p < 1 for p in params):
        columns["top_p"] = upload.floats([max(p.top_p, MIN_TOP_P) for p in params])
    if any(k < vocab_size for k in top_k):
        columns["top_k"] = upload.ints(top_k)
    everyone = None if len(members) == len(rows) else upload.ints(members)
    return _StagedDraw(everyone, columns, max(top_k) if kind == "candidates" else 0)
