"""Path parity: one engine, one sequence of tokens, every path to its logits; all must lead to the same numbers.

The layers of a model are compared with the reference elsewhere. This is about what stands around them: pages, slots,
chunks, neighbours, caches, preemption, the server. The baseline is the engine itself, on a prompt alone and in one
piece; one long text serves all lengths, because the logits of a beginning must not depend on what follows.

Tolerance: 1e-4 of the range of the logits in fp32. In 16 bits and with quantised layers, twice the most that half a
unit in the last place of the embedding and other orders of summation do to this engine's logits (calibrate.VARIANTS):
at that position for the text, at any position for answers. At most CAP, so that an engine cannot excuse itself by
being noisy.

    findings = path_parity(backend, VerifySettings("canary-llama"))
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from surefoot.backends.base import Backend
from surefoot.backends.native import NativeBackend
from surefoot.core.errors import CapacityError, InputError
from surefoot.core.outputs import Completion
from surefoot.core.sampling import SamplingParams
from surefoot.verify.calibrate import VARIANTS
from surefoot.verify.comparison import Comparison, Kept, difference, spread
from surefoot.verify.enginepaths import beside, chunks, drain, scarce, uncached, until_missed
from surefoot.verify.pathcapture import poison
from surefoot.verify.quantised import is_quantised
from surefoot.verify.shapes import Finding, Progress, VerifySettings

BOUNDARIES = (1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 129, 511, 512, 513, 2047, 2048, 2049)
QUICK_LENGTH = 129
FP32_TOLERANCE = 1e-4
SAFETY = 2.0
CAP = {torch.float32: 0.02, torch.bfloat16: 0.1, torch.float16: 0.02}  # fp32: quantised only
TOP = 20
LEVELS = (1, 8, 32)
Check = Callable[[], "Finding | list[Finding]"]
LOGITS_BYTES = 1 << 30  # of one call's [tokens, vocab] logits


def path_parity(
    backend: Backend,
    settings: VerifySettings,
    progress: Progress | None = None,
    *,
    thorough: bool = False,
    noise: float | None = None,
    text: Sequence[int] | None = None,
    only: Collection[str] | None = None,
) -> list[Finding]:
    """A finding for each path.

    thorough: all boundary lengths that the engine takes, else those up to 129 tokens.
    noise: what two right paths may differ by, of the range; None measures it on this engine (fp32: 1e-4).
    text: the tokens to use, seeded random ones if there are too few.  only: names of the paths to take.
    """
    if not isinstance(backend, NativeBackend):
        return [Finding("parity", "not_possible", f"the {backend.name} backend has one path only")]
    if backend.engine.has_unfinished():
        raise InputError("path parity needs an idle engine: finish or cancel its requests first")
    probe = Paths(backend, settings.seed, thorough, noise, list(text or ()))
    checks = {name: check for name, check in probe.checks().items() if only is None or name in only}
    found: list[Finding] = []
    for i, (name, check) in enumerate(checks.items()):
        if progress is not None:
            progress(f"paths: {name}", i / len(checks))
        poison(backend.engine, len(probe.text))
        found += _guarded(name, check, backend)
    return found


def _guarded(name: str, check: Check, backend: NativeBackend) -> list[Finding]:
    """A path that raises is a path that broke; one for which there is no room was not possible."""
    try:
        found = check()
        return found if isinstance(found, list) else [found]
    except (CapacityError, InputError) as error:
        return [Finding("parity", "not_possible", f"{name}: {error}", {"path": name})]
    except Exception as error:  # whatever a broken path raises is the finding
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return [Finding("parity", "fail", f"{name}: {problem}", {"path": name, "problem": problem})]
    finally:
        drain(backend.engine)


class Paths:
    """The checks of one engine, and the baseline that they share."""

    def __init__(self, backend: NativeBackend, seed: int, thorough: bool, noise: float | None, text: list[int]):
        self.backend, self.engine, self.thorough = backend, backend.engine, thorough
        self.page = self.engine.scheduler.block_pool.block_size
        self.kept = Kept(backend.vocab_size, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.text = self._text(text)
        self._exact: dict[tuple[int, ...], torch.Tensor] = {}
        (self.right,) = self.score([self.text])
        self.spread = spread([self.right])
        self.allowed = self._allowed() if noise is None else torch.full((len(self.text),), max(noise, FP32_TOLERANCE))
        self.tolerance = float(self.allowed.max())

    def checks(self) -> dict[str, Check]:
        """By name, in an order that goes from the plain to the involved."""
        ids = self.text[:QUICK_LENGTH]
        return {
            "repeat": lambda: self.repeat("repeat"),
            "prefill = decode": self.token_by_token,
            "chunked = whole": self.chunked,
            "alone = batched": self.batched,
            "lengths": self.lengths,
            "mixed lengths": self.mixed,
            "prefill beside decodes": self.beside_decodes,
            "causality": lambda: causality_probe(self.backend, ids, self.tolerance),
            "decode alone": self.decode_alone,
            "decode batched": self.decode_batched,
            "decode across boundaries": self.decode_boundaries,
            "prefix miss = hit": self.prefix_cache,
            "before = after preemption": self.preemption,
            "server": self.server,
            "graph = eager": self.graphs,
            "repeat after all others": lambda: self.repeat("repeat after all others"),
        }

    # ---- material

    def _text(self, given: list[int]) -> list[int]:
        engine, rope = self.engine, self.engine.model.rotary.config
        longest = BOUNDARIES[-1] if self.thorough else max(QUICK_LENGTH, 2 * self.page + 1)
        room = (engine.scheduler.block_pool.num_usable - 1) * self.page
        limits = [longest, engine.max_model_len - 1, room, max(2, LOGITS_BYTES // (4 * engine.vocab_size))]
        if rope.depends_on_length:  # beyond it, a beginning's logits do depend on what follows
            limits.append(rope.max_position_embeddings)
        count = min(limits)
        return (given + self.random(max(0, count - len(given))))[:count]

    def random(self, count: int) -> list[int]:
        return torch.randint(0, self.engine.vocab_size, (count,), generator=self.generator).tolist()

    @property
    def boundaries(self) -> list[int]:
        edges = {self.page * n + d for n in (1, 2) for d in (-1, 0, 1)}
        return [n for n in sorted({*BOUNDARIES, *edges}) if 1 <= n <= len(self.text)]

    def ragged(self, count: int, longest: int, output: int) -> list[list[int]]:
        """Pieces of the text that begin at different places, 1 to `longest` tokens, with room for the output."""
        longest, text = min(longest, self.engine.max_model_len - output, len(self.text)), self.text
        lengths = [1 + i * (max(longest, 1) - 1) // max(1, count - 1) for i in range(count)]
        return [[text[(7 * i + j) % len(text)] for j in range(n)] for i, n in enumerate(lengths)]

    def _allowed(self) -> torch.Tensor:
        """Tolerance at each position of the text, of the range; beyond QUICK_LENGTH the largest one before it."""
        dtype, count = getattr(torch, self.engine.info.dtype), len(self.text)
        if dtype == torch.float32 and not is_quantised(self.engine.model):
            return torch.full((count,), FP32_TOLERANCE)
        ids, most = self.text[:QUICK_LENGTH], torch.zeros(min(count, QUICK_LENGTH))
        for seed, variant in enumerate(VARIANTS):
            with variant.apply(self.engine.model, seed):
                (moved,) = self.score([ids])
            most = most.maximum(difference(self.right[: len(ids)], moved) / self.spread)
        most = SAFETY * most.clamp(min=float(most.median()))
        most = torch.cat([most, most.max().expand(count - len(most))])
        return most.clamp(FP32_TOLERANCE, CAP.get(dtype, CAP[torch.bfloat16]))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """Kept logits of sequences that run together."""
        return [self.kept.rows(logits) for logits in self.engine.score(sequences)]

    def same(self, compared: Comparison, beginning: list[int], what: str) -> None:
        """A beginning of the text, scored alone, against the baseline."""
        compared.logits(self.right[: len(beginning)], self.score([beginning])[0], what, self.allowed)

    def comparison(self, path: str) -> Comparison:
        return Comparison(path, self.tolerance, self.spread, self.page)

    def exact(self, done: Completion) -> torch.Tensor:
        """Log-probabilities [N, vocab] of an answer's tokens, from a whole prefill of prompt and answer alone."""
        ids = (*done.prompt_token_ids, *done.token_ids)
        if ids not in self._exact:
            (logits,) = self.engine.score([ids[:-1]])
            self._exact[ids] = logits[len(done.prompt_token_ids) - 1 :].log_softmax(-1)
        return self._exact[ids]

    def judged(self, path: str, answers: Sequence[Completion], wanted: int, **facts: Any) -> Finding:
        compared = self.comparison(path)
        compared.facts = facts
        for done in answers:
            room = self.engine.max_model_len - len(done.prompt_token_ids)
            exact = self.exact(done) if done.token_ids else torch.empty(0)
            compared.answer(exact, done, min(wanted, room))
        return compared.finding()

    # ---- paths of scoring

    def repeat(self, name: str) -> Finding:
        """Twice the same, to the bit on a CPU; elsewhere kernels may add in any order, within the tolerance."""
        compared = self.comparison(name)
        self.same(compared, self.text, f"{len(self.text)} tokens")
        return compared.finding(must_be_bitwise=self.engine.info.device.startswith("cpu"))

    def token_by_token(self) -> Finding:
        compared = self.comparison("prefill = decode")
        count = min(len(self.text), 520 if self.thorough else QUICK_LENGTH)
        with chunks(self.engine, 1):
            self.same(compared, self.text[:count], f"{count} tokens, one at a time")
        return compared.finding()

    def chunked(self) -> Finding:
        compared = self.comparison("chunked = whole")
        for size in (7, self.page, 64):
            with chunks(self.engine, size):
                self.same(compared, self.text, f"{len(self.text)} tokens, {size} at a time")
        return compared.finding()

    def batched(self) -> Finding:
        """Sequences of one length, each alone and all together."""
        compared = self.comparison("alone = batched")
        length = min(48, len(self.text))
        group = [(self.text + self.text)[11 * i :][:length] for i in range(min(4, self._fitting(length)))]
        alone = [self.score([s])[0] for s in group]
        for i, (right, got) in enumerate(zip(alone, self.score(group))):
            compared.logits(right, got, f"{i + 1} of {len(group)} in a batch")
        return compared.finding()

    def lengths(self) -> Finding:
        compared = self.comparison("lengths")
        for n in self.boundaries:
            self.same(compared, self.text[:n], f"{n} tokens alone")
        compared.facts["lengths"] = self.boundaries
        return compared.finding()

    def mixed(self) -> Finding:
        """All lengths in one batch, cut into chunks so that pieces of several requests meet in a step."""
        compared = self.comparison("mixed lengths")
        for group in self._groups(self.boundaries):
            for size in (64, 10):
                with chunks(self.engine, size):
                    for n, got in zip(group, self.score([self.text[:n] for n in group])):
                        what = f"{n} tokens in a batch of {len(group)} lengths"
                        compared.logits(self.right[:n], got, what, self.allowed)
        return compared.finding()

    def beside_decodes(self) -> Finding:
        compared = self.comparison("prefill beside decodes")
        lengths = [n for n in self.boundaries if n <= 65][-4:]
        with beside(self.engine, self.ragged(3, 20, 8)), chunks(self.engine, self.page):
            for n, got in zip(lengths, self.score([self.text[:n] for n in lengths])):
                compared.logits(self.right[:n], got, f"{n} tokens beside 3 decodes", self.allowed)
        return compared.finding()

    def _groups(self, lengths: list[int]) -> Iterator[list[int]]:
        """Lengths that together fit into the pages and into LOGITS_BYTES; the shortest join the longest."""
        budget = LOGITS_BYTES // (4 * self.engine.vocab_size)
        usable = self.engine.scheduler.block_pool.num_usable
        group: list[int] = []
        for n in sorted(lengths, reverse=True):
            pages = sum(-(-m // self.page) for m in [*group, n])
            if group and (sum(group) + n > budget or pages > usable or len(group) >= self.engine.config.max_num_seqs):
                yield group
                group = []
            group.append(n)
        yield group

    def _fitting(self, length: int) -> int:
        """Sequences of this length whose logits fit into LOGITS_BYTES."""
        return max(1, LOGITS_BYTES // (4 * self.engine.vocab_size * length))

    # ---- paths of generating

    def greedy(self, count: int) -> SamplingParams:
        return SamplingParams(max_tokens=count, ignore_eos=True, logprobs=TOP)

    def decode_alone(self) -> Finding:
        count = 24
        with uncached(self.engine):
            answers = [self.engine.generate([p], self.greedy(count))[0] for p in self.ragged(3, 33, count)]
        return self.judged("decode alone", answers, count)

    def decode_batched(self) -> Finding:
        count = 24
        with uncached(self.engine):
            answers = self.engine.generate(self.ragged(8, 33, count), self.greedy(count))
        return self.judged("decode batched", answers, count)

    def decode_boundaries(self) -> Finding:
        """Prompts that end at a boundary, and the tokens that step over it."""
        count = 3
        prompts = [self.text[:n] for n in self.boundaries]
        with uncached(self.engine):
            answers = self.engine.generate(prompts, self.greedy(count))
        return self.judged("decode across boundaries", answers, count, lengths=self.boundaries)

    def prefix_cache(self) -> Finding:
        """A prompt that nothing is cached of, the same again, one that goes on, and one that branches off."""
        name, count = "prefix miss = hit", 8
        if not self.engine.scheduler.prefix_caching:
            return Finding("parity", "not_possible", f"{name}: {self.engine.info.prefix_caching}", {"path": name})
        length = 3 * self.page + 5
        fresh = (self.random(length) for _ in itertools.count())
        miss = until_missed(self.engine, fresh, self.greedy(count))
        prompt = list(miss.prompt_token_ids)
        followers = [prompt, prompt + miss.token_ids + self.random(2), prompt[: 3 * self.page] + self.random(4)]
        answers = [miss] + [self.engine.generate([p], self.greedy(count))[0] for p in followers]
        hits = [done.num_cached_tokens for done in answers]
        found = self.judged(name, answers, count, cached_tokens=hits)
        if found.status == "pass" and not any(hits[1:]):
            return Finding("parity", "not_possible", f"{name}: no request found anything in the cache", found.details)
        return found

    def preemption(self) -> Finding:
        """Four requests that each need a second page soon, and one page to spare."""
        name, count = "before = after preemption", 12
        length, scheduler = max(1, self.page - 3), self.engine.scheduler
        pages = scheduler.block_pool.pages
        prompts = [self.random(length) for _ in range(4)]
        before = scheduler.num_preemptions
        with scarce(self.engine, max(len(prompts) * pages(length) + 1, pages(length + count))):
            answers = self.engine.generate(prompts, self.greedy(count))
        happened = scheduler.num_preemptions - before
        if not happened:
            return Finding("parity", "not_possible", f"{name}: no preemption could be forced", {"path": name})
        return self.judged(name, answers, count, preemptions=happened)

    def graphs(self) -> Finding:
        """The same greedy answers with captured decode steps and without, to the bit where a graph replays them."""
        name, count, runner = "graph = eager", 24, self.engine.runner
        if runner.graphs is None:
            why = "switched off" if self.engine.config.graph == "off" else "this engine runs eagerly"
            return Finding("parity", "not_possible", f"{name}: {why}", {"path": name})
        prompts, before = self.ragged(8, 33, count), runner.graphs.replays
        with uncached(self.engine):
            replayed = self.engine.generate(prompts, self.greedy(count))
            steps = runner.graphs.replays - before
            with runner.eagerly():
                eager = self.engine.generate(prompts, self.greedy(count))
        found = self.judged(name, [*replayed, *eager], count, replayed_steps=steps)
        found.details["tokens_the_same"] = [a.token_ids for a in replayed] == [b.token_ids for b in eager]
        if found.status == "pass" and not steps:
            return Finding("parity", "not_possible", f"{name}: no decode step was replayed", found.details)
        return found

    def server(self) -> list[Finding]:
        """The prefix cache is on here, as users have it."""
        from surefoot.verify.throughserver import answers_of

        count = 8
        rounds = {level: self.ragged(max(8, level), 40, count) for level in LEVELS}
        answers = answers_of(self.engine, rounds, self.greedy(count))
        return [self.judged(f"server, {level} at a time", answers[level], count) for level in LEVELS]


def causality_probe(backend: Backend, token_ids: Sequence[int], tolerance: float = FP32_TOLERANCE) -> Finding:
    """Changing a token must change no logit before it, and must change the logits at its place."""
    ids = list(token_ids)
    if len(ids) < 2:
        return Finding("parity", "not_possible", "causality: needs two tokens or more", {"path": "causality"})
    kept = Kept(backend.vocab_size)
    (right,) = [kept.rows(logits) for logits in backend.score([ids])]
    compared = Comparison("causality", tolerance, spread([right]), page=len(ids))
    places = sorted({len(ids) * k // 6 for k in range(1, 6)} | {1, len(ids) - 1})
    for place in (p for p in places if p > 0):
        changed = [*ids[:place], (ids[place] + 1) % backend.vocab_size, *ids[place + 1 :]]
        (got,) = [kept.rows(logits) for logits in backend.score([changed])]
        compared.logits(right[:place], got[:place], f"token {place} changed")
        if torch.equal(right[place], got[place]):
            compared.broken(f"token {place} was changed and its logits stay the same bits")
    return compared.finding()
