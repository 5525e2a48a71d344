"""Why the target's prompt or its choice of tokens differs when the model itself is right: templates, BOS, sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from surefoot.core.sampling import SamplingParams
from surefoot.verify.shapes import Cause
from surefoot.weights.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
LLAMA3 = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA2 = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
TEMPLATES = {"ChatML (Qwen)": CHATML, "Llama 3": LLAMA3, "Llama 2": LLAMA2, "plain turns": TURNS}


def render(template: str, messages: Sequence[Any]) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment().from_string(template).render(messages=list(messages))


def prompt_mistakes(tokenizer: Any, messages: Sequence[Any]) -> Iterator[tuple[str, str, list[int]]]:
    """Id, sentence and token ids of every known way to get a chat prompt wrong."""
    right = tokenizer.encode_chat(messages)
    text = tokenizer.render_chat(messages)
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is not None:
        without = right[1:] if right[:1] == [bos] else right
        yield "double_bos", "the prompt begins with two BOS tokens", [bos, bos, *without]
        yield "bos_missing", "the prompt lacks its BOS token", without
    yield "double_bos", "special tokens are added to a rendered prompt", tokenizer.encode(text, add_special_tokens=True)
    open_end = tokenizer.render_chat(messages, False)
    yield "no_generation_prompt", "the assistant's turn is not opened", _ids(tokenizer, open_end)
    yield "prompt_stripped", "white space at the end of the prompt is lost", _ids(tokenizer, text.rstrip())
    plain = "\n".join(m["content"] for m in messages)
    yield "template_not_applied", "the text is sent without the chat template", _ids(tokenizer, plain)
    yield "template_not_applied", "the text is sent without the chat template", tokenizer.encode(plain)
    for name, template in TEMPLATES.items():
        other = render(template, messages)
        for special in (True, False):
            ids = tokenizer.encode(other, add_special_tokens=special)
            yield "other_template", f"the prompt is in another model's template: {name}", ids
            if bos is not None:
                yield "other_template", f"the prompt is in another model's template: {name}", [bos, *ids]
    yield "left_padded", "padding stands before the prompt", [0, *right]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def name_prompt_cause(tokenizer: Any, messages: Sequence[Any], actual: Sequence[int]) -> Cause | None:
    """Which mistake gives these ids for these messages; None if the ids are right or none of the known ones does.

    tokenizer: the reference's.
    """
    if list(actual) == list(tokenizer.encode_chat(messages)):
        return None
    for name, sentence, ids in prompt_mistakes(tokenizer, messages):
        if ids == list(actual):
            return Cause(name, sentence, 0.0)
    return None


# ---- sampling


def settings_tried() -> Iterator[tuple[str, float]]:
    """Penalties that generation configs and servers are known to set."""
    yield from (("repetition", value) for value in (1.02, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5))
    yield from ((kind, value) for kind in ("presence", "frequency") for value in (0.5, 1.0, 1.5, 2.0))


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def edited(logits: torch.Tensor, seen: Sequence[int], produced: Sequence[int], **penalty: float) -> torch.Tensor:
    """Logits [vocab] after the penalties that engines apply by default."""
    out = logits.clone()
    if "repetition" in penalty:
        ids = torch.tensor(sorted({*seen, *produced}))
        values = out[ids]
        out[ids] = torch.where(values > 0, values / penalty["repetition"], values * penalty["repetition"])
    for token in set(produced):
        out[token] -= penalty.get("presence", 0.0) + penalty.get("frequency", 0.0) * list(produced).count(token)
    return out


def sampler_cause(prompt: Sequence[int], tokens: Sequence[int], rows: torch.Tensor) -> Cause | None:
    """Why greedy `tokens` behind `prompt` are not the largest logits; None if they are.

    rows: [len(tokens), vocab], the target's own teacher-forced logits that predict them.
    """
    if all(float(row.max() - row[token]) <= 1e-3 * float(row.std()) for row, token in zip(rows, tokens)):
        return None
    fits: dict[str, list[float]] = {}
    for kind, value in settings_tried():
        best = [int(edited(row, prompt, tokens[:i], **{kind: value}).argmax()) for i, row in enumerate(rows)]
        if best == list(tokens):
            fits.setdefault(kind, []).append(value)
    if fits:
        said = " or ".join(f"{kind}_penalty {_range(values)}" for kind, values in fits.items())
        return Cause("sampling_default", f"a sampling default is applied to a greedy request: {said}", 0.0)
    ranks = [int((row > row[token]).sum()) for row, token in zip(rows, tokens)]
    text = f"tokens are drawn although greedy ones were asked for (ranks up to {max(ranks) + 1})"
    return Cause("sampling_default", text, 0.0)


def probe_sampler(target: Any, prompt: Sequence[int], count: int = 24) -> Cause | None:
    """Ask the target for greedy tokens and hold them against its own logits."""
    (done,) = target.generate([list(prompt)], SamplingParams(max_tokens=count, ignore_eos=True, temperature=0.0))
    (logits,) = target.score([[*prompt, *done.token_ids]])
    return sampler_cause(prompt, done.token_ids, logits[len(prompt) - 1 : -1].float())


def outside_cause(check: str, folder: Path, target: Any, prompts: Sequence[Any]) -> Cause | None:
    """Cause of a failed "template", "tokens" or "sampler" check.

    prompts: with messages or text; for the sampler token ids, each of which is doubled, as the check does it.

    folder: the model's, from which the right tokenizer is read afresh.
    """
    if check == "sampler":
        found = (probe_sampler(target, [*ids, *ids]) for ids in prompts)
        return next((cause for cause in found if cause is not None), None)
    used = getattr(getattr(target, "engine", target), "tokenizer", None)
    if used is None:
        return None
    right = Tokenizer.load(folder)
    for prompt in prompts:
        if prompt.messages is not None:
            cause = name_prompt_cause(right, prompt.messages, used.encode_chat(prompt.messages))
        else:
            cause = _text_cause(right, prompt.text, used.encode(prompt.text))
        if cause is not None:
            return cause
    return None


def _text_cause(tokenizer: Any, text: str, actual: Sequence[int]) -> Cause | None:
    right = tokenizer.encode(text)
    bos = getattr(tokenizer, "bos_token_id", None)
    if list(actual) == right or bos is None:
        return None
    if list(actual) == [bos, *right] and right[:1] == [bos]:
        return Cause("double_bos", "the prompt begins with two BOS tokens", 0.0)
    if list(actual) == right[1:]:
        return Cause("bos_missing", "the prompt lacks its BOS token", 0.0)
    return None
