"""JSON objects out of a model folder, with one clear line for whatever is wrong with the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surefoot.core.errors import ModelError


def parse_json_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`; `where` names it in the error."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{where} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; fetch the file again"
        ) from None
    except ValueError as error:  # e.g. a number of more digits than Python takes
        raise ModelError(f"{where} cannot be read: {error}; fetch the file again") from None
    except RecursionError:
        raise ModelError(f"{where} is nested too deeply to be read: fetch the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{where} must be a JSON object {{...}}, but it is a {type(value).__name__}")
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text (byte {error.start}): fetch the file again") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    if text.startswith("version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in the folder it came from")
    return parse_json_object(text, str(path))
