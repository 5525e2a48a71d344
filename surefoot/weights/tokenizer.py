"""Tokenizer and chat template of a model folder: by tokenizer.json alone where that is enough, else by transformers.

    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode_chat([{"role": "user", "content": "中国的首都是哪里?"}])
    stream = tokenizer.stream()
    text = "".join(stream.push(i) for i in ids) + stream.flush()      # == tokenizer.decode(ids)

Thread-safe for encoding and rendering: HTTP threads tokenise while the engine detokenises. The fast backend is called
directly, because transformers' layer above it changes truncation settings in place, which fails with "Already borrowed"
when two threads meet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from surefoot.core.errors import InputError, ModelError
from surefoot.weights import template, tokenizer_files
from surefoot.weights.chat import ContentFormat, check_messages, render_chat
from surefoot.weights.detokenize import ByteLevelStream, DecodeStream, WindowStream
from surefoot.weights.jsonfile import read_json_object
from surefoot.weights.messages import one_line
from surefoot.weights.tokenizer_files import TokenizerFiles

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")  # ChatML (Qwen), Llama 3: end an answer even where no config says so
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
# GPT-2's printable stand-ins for bytes, as byte-level tokenizers write them: character -> byte.
# For str.translate; what is no stand-in becomes a character that latin-1 lacks.
BYTE_OF_CHAR = {256 + i: b for i, b in enumerate(_OTHERS)} | dict.fromkeys(_OTHERS, 0x10FFFF)


class Tokenizer:
    """Text to token ids and back. `generation_defaults`: sampling defaults that generation_config.json recommends."""

    def __init__(
        self, folder: Path, files: TokenizerFiles | None, config: dict[str, Any], generation_config: dict[str, Any]
    ) -> None:
        """`files`: None leaves everything to transformers."""
        self.folder = folder
        self._backend = files.backend if files else getattr(self.hf, "backend_tokenizer", None)
        self.special_tokens: dict[str, str] = files.special if files else self.hf.special_tokens_map
        self.chat_template: Any = files.chat_template if files else self.hf.chat_template
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        self.vocab_size = len(self.hf) if self._backend is None else self._backend.get_vocab_size()
        added = self.hf.added_tokens_decoder if self._backend is None else self._backend.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self.bos_token_id = self._named_id("bos_token")
        ends = {i for i, token in added.items() if token.content in END_OF_TURN}
        eos = self._named_id("eos_token")
        self.eos_token_ids = _eos_token_ids(config, generation_config) | ends | (set() if eos is None else {eos})
        names = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        self.generation_defaults = {n: generation_config[n] for n in names if generation_config.get(n) is not None}
        decoders = _decoder_types(self._backend)
        self._byte_level = decoders == ["ByteLevel"]
        self._byte_fallback = "ByteFallback" in decoders

    @cached_property
    def hf(self) -> Any:
        """transformers' tokenizer of the same folder: what the proof compares with, and what strange folders need."""
        return _from_transformers(self.folder)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a model folder; never asks the network, never runs the folder's code."""
        folder = Path(folder)
        if not any(any(folder.glob(pattern)) for pattern in VOCABULARY_FILES):
            raise ModelError(
                f"no tokenizer in {folder}: none of {', '.join(VOCABULARY_FILES)}; "
                "copy the tokenizer files of the model there, or give token ids instead of text"
            )
        configs = [
            read_json_object(folder / name) if (folder / name).is_file() else {}
            for name in ("config.json", "generation_config.json")
        ]
        return cls(folder, tokenizer_files.read(folder), *configs)

    @classmethod
    def try_load(cls, folder: Path) -> Tokenizer | None:
        """None if the folder has no tokenizer (the engine runs on token ids); a broken one is still an error."""
        if any(any(Path(folder).glob(pattern)) for pattern in VOCABULARY_FILES):
            return cls.load(folder)
        return None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text is not valid Unicode: half a surrogate pair at character {error.start}"
            ) from None
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return self.hf.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        if self._backend is not None:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        # The "clean-up" of old configs drops spaces before punctuation: decode(encode(text)) would not be text.
        return self.hf.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """A fresh incremental detokenizer; pushes plus flush give exactly `decode` of all tokens."""
        skipped = self._special if skip_special_tokens else frozenset()

        def is_hidden(token_id: int) -> bool:
            return token_id in skipped or self._piece(token_id) is None

        if self._byte_level:
            return ByteLevelStream(lambda i: b"" if i in skipped else self.token_bytes(i))
        return WindowStream(lambda ids: self.decode(ids, skip_special_tokens), is_hidden, self._is_byte_token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, on its own; b"" for ids beyond the vocabulary."""
        piece = self._piece(token_id)
        if piece is None:
            return b""
        if self._byte_level:
            try:
                return piece.translate(BYTE_OF_CHAR).encode("latin-1")
            except UnicodeEncodeError:  # an added token, written as itself
                return piece.encode()
        if match := BYTE_TOKEN.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace("▁", " ").encode()

    def token_text(self, token_id: int) -> str:
        """A token on its own, for showing: parts of characters appear as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

    def render_chat(self, messages: Sequence[Any], add_generation_prompt: bool = True, **template_kwargs: Any) -> str:
        """The prompt text of a chat. `template_kwargs` reach the template: tools, enable_thinking, date_string, ..."""
        checked = check_messages(messages)
        if not self.has_chat_template:
            raise InputError(
                "this model has no chat template: use plain completion, "
                "or put a chat_template.jinja into its folder (the -Instruct version of a model has one)"
            )
        converted = [self._content_format.convert(message) for message in checked]
        return render_chat(self._render, converted, add_generation_prompt, template_kwargs)

    def encode_chat(
        self, messages: Sequence[Any], add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> list[int]:
        """Rendered and encoded; the template has written the special tokens, so none are added again."""
        return self.encode(
            self.render_chat(messages, add_generation_prompt, **template_kwargs), add_special_tokens=False
        )

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, **kwargs: Any) -> str:
        chosen = self.chat_template
        if isinstance(chosen, dict):  # by name
            chosen = chosen.get("tool_use" if kwargs.get("tools") else "default") or next(iter(chosen.values()))
        return template.render(chosen, messages, add_generation_prompt, **(self.special_tokens | kwargs))

    @cached_property
    def _content_format(self) -> ContentFormat:
        return ContentFormat(self._render)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        if token is None:
            return None
        return self.hf.convert_tokens_to_ids(token) if self._backend is None else self._backend.token_to_id(token)

    def _piece(self, token_id: int) -> str | None:
        if self._backend is not None:
            return self._backend.id_to_token(token_id)
        return self.hf.convert_ids_to_tokens(token_id) if 0 <= token_id < self.vocab_size else None

    def _is_byte_token(self, token_id: int) -> bool:
        piece = self._piece(token_id) if self._byte_fallback else None
        return piece is not None and BYTE_TOKEN.fullmatch(piece) is not None


def _from_transformers(folder: Path) -> Any:
    with _quiet():
        try:
            return _tokenizer_class(folder).from_pretrained(
                str(folder), local_files_only=True, use_fast=True, trust_remote_code=False
            )
        except Exception as error:  # the libraries raise whatever they like
            for name in ("tokenizer_config.json", "tokenizer.json"):
                if (folder / name).is_file():
                    read_json_object(folder / name)  # broken JSON: says where
            reason = one_line(f"{type(error).__name__}: {error}")
            raise ModelError(f"cannot load the tokenizer in {folder} ({reason})") from None


def _tokenizer_class(folder: Path) -> Any:
    """AutoTokenizer, or what it comes to for many folders: finding that out takes it longer than loading."""
    path = folder / "tokenizer_config.json"
    named = read_json_object(path).get("tokenizer_class") if path.is_file() else None
    if named == "PreTrainedTokenizerFast" and (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _eos_token_ids(config: dict[str, Any], generation_config: dict[str, Any]) -> frozenset[int]:
    """Every id that any of the model's configs calls an end."""
    text_config = config.get("text_config")
    sources = [generation_config, config, text_config if isinstance(text_config, dict) else {}]
    found: set[int] = set()
    for source in sources:
        value = source.get("eos_token_id")
        found.update(i for i in (value if isinstance(value, list) else [value]) if type(i) is int)
    return frozenset(found)


def _decoder_types(backend: Any) -> list[str]:
    """The steps of the fast backend's decoder, in order."""
    if backend is None or backend.decoder is None:
        return []
    spec = json.loads(backend.decoder.__getstate__())
    return [part["type"] for part in spec.get("decoders", [spec])]


@contextmanager
def _quiet() -> Iterator[None]:
    """No advice from transformers on stderr while a tokenizer loads; errors still come as exceptions."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
