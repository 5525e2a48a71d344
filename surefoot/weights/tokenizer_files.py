"""A model folder's tokenizer from its tokenizer.json alone, for folders where transformers would come to the same.

transformers costs a second to import, and for Qwen it builds the tokenizer anew from its vocabulary, which costs more.
Whatever it would change about what tokenizer.json says (tokens to add, another class's rules) is left to it: `read`
gives None then. The proof compares texts and ids of both.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surefoot.core.errors import ModelError
from surefoot.weights.jsonfile import read_json_object
from surefoot.weights.messages import one_line

if TYPE_CHECKING:
    import tokenizers

# Classes that keep tokenizer.json as it is, or build its equal.
CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend", "Qwen2Tokenizer", "Qwen2TokenizerFast"}
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
# Settings under which transformers changes the tokenizer that it has read.
CHANGING = ("add_prefix_space", "split_special_tokens", "fix_mistral_regex", "from_slow")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a tokenizer consists of. special: special tokens by name, as chat templates know them."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]
    chat_template: str | None


def read(folder: Path) -> TokenizerFiles | None:
    """None: this folder needs transformers. ModelError: a file is broken."""
    path = folder / "tokenizer_config.json"
    if not (folder / "tokenizer.json").is_file() or not path.is_file():
        return None
    config = read_json_object(path)
    if config.get("tokenizer_class") not in CLASSES or any(config.get(key) for key in CHANGING):
        return None
    if "added_tokens_decoder" not in config:
        if (folder / "added_tokens.json").exists():
            return None
        if (folder / "special_tokens_map.json").is_file():
            config |= read_json_object(folder / "special_tokens_map.json")
    if (folder / "additional_chat_templates").exists() or isinstance(config.get("chat_template"), list):
        return None
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    by_name = {**config, **extra} if isinstance(extra, dict) else config
    special = {key: _content(token) for key, token in by_name.items() if key.endswith("_token") and _content(token)}
    wanted = [*special.values(), *map(_content, extra.values() if isinstance(extra, dict) else extra)]
    backend = _backend(folder / "tokenizer.json")
    if not _holds(backend, config, wanted):
        return None
    return TokenizerFiles(backend, special, _template(folder, config))


def _content(token: Any) -> str:
    """Of a token that is a string or an object; "" for anything else (add_bos_token is a flag)."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if not path.is_file():
        return config.get("chat_template")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path} ({one_line(str(error))}): fetch the file again") from None


def _backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # whatever the library raises
        read_json_object(path)  # broken JSON: says where
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ModelError(f"cannot load the tokenizer in {path.parent} ({reason})") from None


def _holds(backend: tokenizers.Tokenizer, config: dict[str, Any], special: list[str]) -> bool:
    """Whether the backend has every token that the other files name, just as they say it."""
    added = backend.get_added_tokens_decoder()
    named = {token.content for token in added.values() if token.special}
    for key, token in (config.get("added_tokens_decoder") or {}).items():
        ours = added.get(int(key)) if key.isdecimal() else None
        if ours is None or any(getattr(ours, flag) != token.get(flag, getattr(ours, flag)) for flag in FLAGS):
            return False
    regex = config.get("pretokenize_regex")
    splits = regex is None or json.dumps(regex) in _pre_tokenizer(backend)
    return splits and named.issuperset(special) and backend.post_processor is not None


def _pre_tokenizer(backend: tokenizers.Tokenizer) -> str:
    """Its settings as JSON, in Python's spelling."""
    return "" if backend.pre_tokenizer is None else json.dumps(json.loads(backend.pre_tokenizer.__getstate__()))
