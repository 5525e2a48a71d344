"""transformers' own config object of a folder, read so that the installed transformers means what the file says.

NOTE: a config.json written by transformers 5 keeps its rope settings in `rope_parameters`. transformers 4 stores that
key and does not use it: the model is then built with the default rope, without a word. A reference like that would
refute sound models.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from surefoot.core.errors import ModelError, first_line


def read_config(folder: str | Path) -> Any:
    """AutoConfig of the folder. ModelError (one line) if this transformers cannot read it."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (KeyError, ValueError) as error:
        raise ModelError(_unreadable(folder, error, transformers.__version__)) from error
    except Exception as error:  # each architecture has its own way to dislike a config
        raise ModelError(f"transformers cannot read {folder}/config.json: {first_line(error)}") from error
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        rope_of_version_4(part)
    return config


def rope_of_version_4(config: Any) -> None:
    """Write `rope_parameters` as the settings that transformers 4 reads; nothing happens under transformers 5."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if not rope or major_version() >= 5:
        return
    if "rope_theta" in rope:
        config.rope_theta = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config.partial_rotary_factor = rope.pop("partial_rotary_factor")
    config.rope_scaling = None if rope.get("rope_type", "default") == "default" else rope


def major_version() -> int:
    return int(importlib.metadata.version("transformers").split(".")[0])


def _unreadable(folder: str | Path, error: Exception, version: str) -> str:
    if "model type" not in str(error) and not isinstance(error, KeyError):
        return f"transformers cannot read {folder}/config.json: {first_line(error)}"
    return (
        f"transformers {version} does not know the model type of {folder}/config.json: "
        f"install a newer one (pip install -U transformers; Qwen3.5 needs 5.2 or newer)"
    )
