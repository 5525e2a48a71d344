"""The first two checks: does the target turn text into the same bytes and the same token ids as the model's own files?

The reference here is transformers' tokenizer, loaded afresh from the model folder and called directly.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from surefoot.core.errors import InputError
from surefoot.verify.prompts import LONG_TEXT, Prompt, PromptSet
from surefoot.weights.tokenizer import Tokenizer

Evidence = dict[str, Any]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json")


class ReferenceText:
    """The model folder's own tokenizer and template."""

    def __init__(self, folder: Path):
        self.hf = Tokenizer.load(folder).hf
        self.has_template = bool(self.hf.chat_template)

    def render(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja's and the template's own, of any type
            line = " ".join(str(error).split())[:200]
            raise InputError(f"the model's chat template refuses these messages: {line}") from None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.hf(text, add_special_tokens=add_special_tokens)["input_ids"]

    def ids(self, prompt: Prompt) -> list[int]:
        if prompt.messages is not None:
            return self.encode(self.render(prompt.messages), add_special_tokens=False)
        return self.encode(prompt.text or "", add_special_tokens=True)

    def long_ids(self, count: int) -> list[int]:
        """`count` tokens of the mixed text, repeated where the text is shorter."""
        once = self.encode(LONG_TEXT, add_special_tokens=False)
        head = self.encode("", add_special_tokens=True)
        return (head + once * (count // max(len(once), 1) + 1))[:count]


def tokenizer_of(backend: Any) -> Any:
    """The tokenizer that a target really uses, None for a black box or a folder without one."""
    return getattr(getattr(backend, "engine", backend), "tokenizer", None)


def template_evidence(reference: ReferenceText | None, target: Any, prompts: PromptSet) -> Evidence:
    chats = [p for p in prompts.prompts if p.messages is not None]
    if reference is None or target is None or not chats:
        return {"not_possible": "no chat template" if reference is not None else "the model has no tokenizer"}
    items = []
    for prompt in chats:
        ours, theirs = target.render_chat(prompt.messages), reference.render(prompt.messages or [])
        a, b = theirs.encode("utf-8", "replace"), ours.encode("utf-8", "replace")
        item: Evidence = {"name": prompt.name, "reference": _sha(a), "target": _sha(b)}
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            item |= {"at": at, "shows": f"{_excerpt(b, at)} instead of {_excerpt(a, at)}"}
        items.append(item)
    return {"items": items}


def tokens_evidence(reference: ReferenceText | None, target: Any, prompts: PromptSet) -> Evidence:
    if reference is None or target is None:
        return {"not_possible": "the model has no tokenizer"}
    items = []
    for prompt in prompts.prompts:
        ours = target.encode_chat(prompt.messages) if prompt.messages is not None else target.encode(prompt.text)
        theirs = reference.ids(prompt)
        item: Evidence = {"name": prompt.name, "reference": _ids_sha(theirs), "target": _ids_sha(ours)}
        if ours != theirs:
            item["shows"] = _difference(prompt.name, theirs, ours, reference.hf.bos_token_id)
        items.append(item)
    return {"items": items}


def _difference(name: str, reference: list[int], target: list[int], bos: int | None) -> str:
    if bos is not None and (target.count(bos) != reference.count(bos)):
        return f"{target.count(bos)} BOS tokens instead of {reference.count(bos)} in {name!r}"
    pairs = enumerate(zip(reference, target))
    at = next((i for i, (x, y) in pairs if x != y), min(len(reference), len(target)))
    return f"{target[at : at + 4]} instead of {reference[at : at + 4]} at token {at} of {name!r}"


def same_tokenizer(reference: ReferenceText, target: Any) -> None:
    """Two tokenizers of different size cannot be compared at all."""
    if target is not None and len(reference.hf) != target.vocab_size:
        raise InputError(
            f"two different tokenizers: the reference's has {len(reference.hf)} tokens, the target's "
            f"{target.vocab_size}; both sides must be loaded from the same model"
        )


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that decide how text becomes tokens, the config and the generation config."""
    names = (*TOKENIZER_FILES, "chat_template.jinja", "config.json", "generation_config.json")
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names if (folder / n).is_file()}


def _excerpt(data: bytes, at: int) -> str:
    return repr(data[at : at + 24].decode("utf-8", "replace"))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _ids_sha(ids: list[int]) -> str:
    return _sha(",".join(map(str, ids)).encode())
