"""The proof of a server that is a black box: every check that its API leaves possible; the others are named.

    findings = verify_endpoint(reference, HttpBackend(url), VerifySettings("DIR"))

Token ids come from /tokenize, from the ids that a server names, or at least from its count of them. Logits come from
log-probabilities of the prompt if the server gives them (teacher-forced, the same tokens for both sides), else from
those of its greedy answers, which the reference is then given as they are. A server that tells neither can be refuted,
by a greedy token that the reference would not choose, but not proven: its logits stay unseen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from surefoot.backends.base import Backend
from surefoot.backends.http import Answer, EndpointError, HttpBackend
from surefoot.backends.http_logprobs import TokenNames
from surefoot.core.errors import InputError
from surefoot.core.outputs import TokenLogprob
from surefoot.core.sampling import SamplingParams
from surefoot.verify import gate, prompts, texts
from surefoot.verify.continuation import greedy
from surefoot.verify.measure import Measurer
from surefoot.verify.pack import unpack_index
from surefoot.verify.prompts import LONG_TEXT, Prompt
from surefoot.verify.shapes import CHECKS, Finding, Progress, VerifySettings
from surefoot.verify.told import Choices, Told, logits_evidence
from surefoot.weights.checkpoint import Checkpoint
from surefoot.weights.hub import resolve

LEVELS = (1, 8, 32)
PARITY_TOKENS = 8
HIDDEN = "a server over HTTP shows no modules, weights or settings: only what comes out of it can be judged"


def verify_endpoint(
    reference: Backend, target: HttpBackend, settings: VerifySettings, progress: Progress | None = None
) -> list[Finding]:
    """A finding for each check, in order; after the first that fails the others are not reached.

    If the server dies on the way, the EndpointError carries the findings until then.
    """
    work = Endpoint(reference, target, settings, progress)
    found: list[Finding] = []
    for check in CHECKS:
        if any(f.status == "fail" for f in found):
            found.append(Finding(check, "not_reached", "an earlier check failed"))
            continue
        try:
            found += work.check(check)
        except EndpointError as error:
            found.append(Finding(check, "undecided", f"not finished: {error}"))
            raise EndpointError(f"{error} (during the check of {check})", found) from error
    return found


class Endpoint:
    """One server under examination."""

    def __init__(
        self, reference: Backend, target: HttpBackend, settings: VerifySettings, progress: Progress | None = None
    ):
        self.reference, self.target, self.settings, self.progress = reference, target, settings, progress
        self.folder = resolve(settings.model)
        tokenizer = texts.tokenizer_of(reference)
        target.vocab_size = target.vocab_size or reference.vocab_size
        target.eos_token_ids = reference.eos_token_ids
        target.names = TokenNames(tokenizer, reference.vocab_size)
        self.text = texts.ReferenceText(self.folder) if tokenizer is not None else None
        self.tick("finding out what the server supports")
        self.can = target.abilities
        if not (self.can.token_ids or self.can.text or self.can.messages):
            raise EndpointError(f"{target.url} answers neither completions nor chats ({target.refusal})")
        self.asked = [p for p in self._prompts() if self._askable(p)]
        self.dtype = self._dtype()
        self.measurer = Measurer(reference, self._expected(), target, self.dtype, self.tick)  # type: ignore[arg-type]
        self.choices = Choices(self.measurer)
        self.told: list[Told] = []

    def check(self, name: str) -> list[Finding]:
        self.tick(name)
        checks: dict[str, Callable[[], Finding | list[Finding]]] = {
            "template": self.template,
            "tokens": self.tokens,
            "logits": self.logits,
            "sampler": self.sampler,
            "parity": self.parity,
        }
        if name not in checks:
            return [Finding(name, "not_possible", HIDDEN)]
        found = checks[name]()
        return found if isinstance(found, list) else [found]

    def tick(self, what: str) -> None:
        if self.progress is not None:
            self.progress(what, None)

    # ---- material

    def _prompts(self) -> list[Prompt]:
        settings, limit = self.settings, self._limit()
        if self.text is None:
            if not self.can.token_ids:
                raise InputError("the model folder has no tokenizer and the server takes no token ids: nothing to ask")
            return prompts.random_ids(self.reference.vocab_size, settings.long_tokens, settings.seed).prompts
        template = self.text.has_template
        asked = prompts.read_file(settings.prompts, template) if settings.prompts else prompts.built_in(template)
        for prompt in asked.prompts:
            prompt.ids = self.text.ids(prompt)
            if not 0 < len(prompt.ids) < limit:
                raise InputError(f"prompt {prompt.name!r} has {len(prompt.ids)} tokens, the model takes {limit}")
        return asked.prompts

    def _askable(self, prompt: Prompt) -> bool:
        return self.can.messages if prompt.messages is not None else self.can.token_ids or self.can.text

    def _limit(self) -> int:
        limits = (getattr(self.reference, "max_model_len", None), self.target.max_model_len)
        return min((n for n in limits if n), default=1 << 30) - 1

    def _dtype(self) -> torch.dtype:
        """As the server says, else as the settings say, else the checkpoint's."""
        from surefoot.engine.load import checkpoint_dtype

        said = str(self.target.card.get("dtype") or self.settings.dtype).removeprefix("torch.")
        dtype = getattr(torch, said, None)
        return dtype if isinstance(dtype, torch.dtype) else checkpoint_dtype(Checkpoint(self.folder).config)

    def _expected(self) -> Backend:
        if self.dtype == torch.float32:
            return self.reference
        from surefoot.verify.sides import expected_backend

        self.tick("loading the reference in the server's dtype")
        return expected_backend(self.settings, self.dtype)

    # ---- token ids

    def template(self) -> Finding:
        """By the token ids of chats: the text that a server renders is not shown."""
        chats = [p for p in self.asked if p.messages is not None]
        if not chats:
            return Finding("template", "not_possible", "there are no chats among the prompts")
        return self._same_ids("template", chats, "chat")

    def tokens(self) -> Finding:
        plain = [p for p in self.asked if p.text is not None]
        if not plain:
            return Finding("tokens", "not_possible", "there are no plain prompts, or no tokenizer")
        return self._same_ids("tokens", plain, "text")

    def _same_ids(self, check: str, asked: list[Prompt], what: str) -> Finding:
        wrong: list[dict[str, Any]] = []
        counted = 0
        for prompt in asked:
            shown = self._ids_of(prompt)
            if shown is None:
                return Finding(
                    check, "not_possible", f"the server shows neither token ids nor their number for a {what}"
                )
            counted += isinstance(shown, int)
            if shown != (len(prompt.ids) if isinstance(shown, int) else prompt.ids):
                wrong.append({"name": prompt.name, "reference": prompt.ids, "target": shown})
        details = {"prompts": len(asked), "only_counted": counted, "wrong": wrong}
        if wrong:
            line = f"{len(wrong)} of {len(asked)} {what}s become other tokens: {_difference(wrong[0])}"
            return Finding(check, "fail", line, details)
        if counted:
            return Finding(check, "pass", f"{len(asked)} {what}s have as many tokens (ids are not shown)", details)
        return Finding(check, "pass", f"{len(asked)} {what}s have the same token ids", details)

    def _ids_of(self, prompt: Prompt) -> list[int] | int | None:
        """The server's token ids of a prompt, or only their number."""
        can, target, ids = self.can, self.target, {"return_token_ids": True}
        if prompt.messages is not None:
            if can.tokenize_chat:
                return target.tokenize(prompt.messages)
            answer = target.chat(prompt.messages, 1, ids if can.return_token_ids else None)
        else:
            assert prompt.text is not None
            if can.tokenize:
                return target.tokenize(prompt.text)
            answer = target.ask(prompt.text, 1, ids if can.return_token_ids else None)
        return answer.prompt_token_ids or answer.prompt_tokens

    # ---- logits

    def logits(self) -> Finding:
        source = self._listen()
        if not self.told:
            return self._greedy_only()
        raw = logits_evidence(self.measurer, self.told, self.tick)
        (found,) = gate.examine("logits", {"logits": raw})
        found.summary = f"{found.summary} ({source})"
        found.details |= {"source": source, "dtype": str(self.dtype).removeprefix("torch."), "raw": raw}
        found.details["sequences"] = [t.token_ids for t in self.told]
        found.details["tokens"] = len(unpack_index(raw["position"]))
        return found

    def _listen(self) -> str:
        """Fill `told`; returns where it comes from."""
        can, count = self.can, self.settings.continuation_tokens
        if can.prompt is not None:
            limit, ids = self._limit(), [p.ids for p in self.asked]
            self.tick("the reference's answers")
            sequences = greedy(self.reference, self.target, ids, count, limit)
            long = min(self.settings.long_tokens, limit)
            sequences.append(self.text.long_ids(long) if self.text else (ids[0] * long)[:long])
            for i, scores in enumerate(self.target.score_logprobs(sequences)):
                self.tick(f"log-probabilities {i + 1}/{len(sequences)}")
                self.told.append(Told(scores.token_ids, scores.entries))
            return "log-probabilities of prompts"
        for prompt in self.asked:
            self.tick(f"answers with log-probabilities: {prompt.name[:30]}")
            entries = self._answer(prompt, count).logprobs or []
            before: list[Any] = [None] * len(prompt.ids)
            self.told.append(Told(prompt.ids + [e.token_id for e in entries], before + list(entries)))
        self.told = [t for t in self.told if t.places]
        return "log-probabilities of the server's own answers"

    def _answer(self, prompt: Prompt, count: int, logprobs: bool = True) -> Answer:
        """A greedy answer: to token ids if the server takes them, else to the chat or the text."""
        can = self.can
        if can.token_ids:
            named = {"return_token_ids": True} if can.return_token_ids else {}
            return self.target.ask(prompt.ids, count, named | ((can.output or {}) if logprobs else {}))
        if prompt.messages is not None:
            return self.target.chat(prompt.messages, count, can.chat if logprobs else None)
        return self.target.ask(prompt.text or "", count, can.output if logprobs else None)

    def _greedy_only(self) -> Finding:
        """No log-probabilities at all: the tokens of greedy answers must be the reference's own choices."""
        line = "the server gives no log-probabilities, of prompts or of answers: its logits cannot be proven"
        if self.text is None:
            return Finding("logits", "not_possible", line)
        count = self.settings.continuation_tokens
        self.tick("greedy answers")
        got = [self._answer(p, count, logprobs=False) for p in self.asked]
        self.choices.calibrate([p.ids + self._read(a) for p, a in zip(self.asked, got)][:4])
        wrong, judged = self._wrong(self.asked, got)
        details = {"source": "greedy answers", "tokens": judged, "wrong": wrong, "slack": self.choices.slack}
        if wrong:
            return Finding("logits", "fail", f"greedy answers that the reference would not give: {wrong[0]}", details)
        line += f" ({judged} greedy tokens are the reference's own choices)"
        return Finding("logits", "not_possible", line, details)

    def _wrong(self, asked: list[Prompt], got: list[Answer]) -> tuple[list[str], int]:
        """Greedy answers with a token that the reference would not choose even with noise; number of tokens judged."""
        wrong, judged = [], 0
        for prompt, answer in zip(asked, got):
            self.tick(f"judging the answer to {prompt.name[:30]}")
            ids = self._read(answer)
            made = (answer.raw.get("usage") or {}).get("completion_tokens")
            if answer.token_ids or made in (len(ids), len(ids) + 1):  # + 1: the token that stopped it has no text
                (lost,) = self.choices.lost([prompt.ids], [ids])
                at = int((lost > 0).nonzero()[0]) if (lost > 0).any() else None
                judged += len(ids)
            else:  # the text does not say which tokens it was made of
                at, certain = self._astray(prompt, answer.text)
                judged += certain
            if at is not None:
                wrong.append(f"token {at} of the answer to {prompt.name!r}")
        return wrong, judged

    def _astray(self, prompt: Prompt, text: str) -> tuple[int | None, int]:
        """Where a text leaves the reference's greedy one although the reference is certain; tokens until then."""
        params = SamplingParams(max_tokens=self.settings.continuation_tokens)
        ids = self.reference.generate([prompt.ids], params)[0].token_ids
        for n in range(1, len(ids) + 1):
            so_far = self.target.names.text_of(ids[:n]).lstrip()
            if so_far.endswith("\ufffd") or text.lstrip().startswith(so_far):
                continue
            margin = self.choices.margins(prompt.ids, ids[:n])[-1]
            return (n - 1 if margin > 0 else None), n - 1
        return None, len(ids)

    # ---- sampler

    def sampler(self) -> Finding:
        """Asked for temperature 0 and nothing else, the server must take its likeliest token, and do it again.

        Prompts are doubled where token ids can be sent, so that a repetition penalty has something to act on; behind
        text that the model does not know margins are small, and sampling shows.
        """
        asked, by_ids = self.asked[:3], self.can.token_ids
        if by_ids:
            asked = [Prompt(p.name, ids=p.ids + p.ids) for p in asked]
        if self.text is not None and (by_ids or self.can.text):
            asked.append(Prompt("mixed text", text=LONG_TEXT[:150], ids=self.text.encode(LONG_TEXT[:150], True)))
        first, again = ([self._answer(p, 16, logprobs=by_ids) for p in asked] for _ in range(2))
        for prompt, a, b in zip(asked, first, again):
            if (a.token_ids, a.text) != (b.token_ids, b.text):
                line = f"two greedy answers to {prompt.name!r} differ: something samples in spite of temperature 0"
                return Finding("sampler", "fail", line, {"first": a.text, "second": b.text})
        entries = [(p.name, i, e) for p, a in zip(asked, first) for i, e in enumerate(a.logprobs or [])]
        wrong = [(name, i, e) for name, i, e in entries if e.rank > 1]
        if wrong:
            name, step, entry = wrong[0]
            line = f"greedy decoding took rank {entry.rank} at step {step} behind {name!r}: a penalty or a bias is on"
            return Finding("sampler", "fail", line, {"wrong": len(wrong), "steps": len(entries)})
        told = f"{len(entries)} greedy steps took the likeliest token; " if entries else ""
        return Finding(
            "sampler", "pass", f"{told}{len(asked)} greedy answers are the same twice", {"steps": len(entries)}
        )

    # ---- parity

    def parity(self) -> list[Finding]:
        """The same requests 1, 8 and 32 at a time. Prefill = decode and the like cannot be told apart from outside."""
        unseen = "chunks, pages, preemption and graphs cannot be chosen from outside"
        found = [Finding("parity", "not_possible", f"engine paths: {unseen}", {"path": "engine paths"})]
        if self.settings.skip_parity:
            return [*found, Finding("parity", "not_possible", "left out on request")]
        asked = [self.asked[i % len(self.asked)] for i in range(max(LEVELS))]
        alone: list[Answer] = []
        for level in LEVELS:
            self.tick(f"{level} requests at a time")
            answers = list(self.target.map(lambda p: self._answer(p, PARITY_TOKENS), asked, level))
            alone = alone or answers
            found.append(self._same_answers(level, asked, alone, answers))
        return found

    def _same_answers(self, level: int, asked: list[Prompt], alone: list[Answer], got: list[Answer]) -> Finding:
        """Tokens as when asked alone, unless noise explains the choice; log-probabilities within the noise."""
        path = f"{level} requests at a time"
        if not self.choices.slack:
            self.choices.calibrate([p.ids for p in self.asked[:4]])
        other = [(p, a) for p, a, b in zip(asked, got, alone) if (a.token_ids, a.text) != (b.token_ids, b.text)]
        wrong, _ = self._wrong([p for p, _ in other], [a for _, a in other])
        worst = max((_apart(a.logprobs, b.logprobs) for a, b in zip(alone, got)), default=0.0)
        details = {"path": path, "other_answers": len(other), "wrong": wrong, "worst_logprob_difference": worst}
        if wrong:
            return Finding("parity", "fail", f"{path}: {wrong[0]} is not the one that comes alone", details)
        if worst > self.choices.slack:
            line = f"{path}: a log-probability differs by {worst:.2g} from that of the same request alone"
            return Finding("parity", "fail", f"{line}, noise explains {self.choices.slack:.2g}", details)
        near = f", {len(other)} of them differ at near ties" if other else ""
        return Finding("parity", "pass", f"{path}: {len(got)} answers as when asked alone{near}", details)

    def _read(self, answer: Answer) -> list[int]:
        """Token ids of an answer; where the server names none, those of its text."""
        return answer.token_ids or self.target.names.ids_of(answer.text)


def _apart(alone: list[TokenLogprob] | None, got: list[TokenLogprob] | None) -> float:
    """Largest difference of the log-probabilities of the tokens that two answers begin with alike."""
    worst = 0.0
    for x, y in zip(alone or [], got or []):
        if x.token_id != y.token_id:
            break
        worst = max(worst, abs(x.logprob - y.logprob))
    return worst


def _difference(wrong: dict[str, Any]) -> str:
    right, got = wrong["reference"], wrong["target"]
    if isinstance(got, int):
        return f"{got} tokens instead of {len(right)} in {wrong['name']!r}"
    at = next((i for i, (a, b) in enumerate(zip(right, got)) if a != b), min(len(right), len(got)))
    return f"{got[at : at + 4]} instead of {right[at : at + 4]} at token {at} of {wrong['name']!r}"
