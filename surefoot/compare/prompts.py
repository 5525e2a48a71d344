"""What every side is asked: the built-in set of bring-up pages, or a file in the same form.

A question goes through each model's own chat template, a completion is raw text that the model continues. Checks are
what can be known about an answer: see checks.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from surefoot.core.errors import InputError

KINDS = ("question", "completion")
CHECKS = {"contains": list, "number": (int, float), "code": str, "script": str}
CODE_JUDGES = ("fibonacci",)
SCRIPTS = ("han", "latin")


@dataclass(frozen=True)
class Prompt:
    """max_tokens: for this prompt; None takes the run's."""

    id: str
    kind: str
    text: str
    checks: tuple[Mapping[str, Any], ...] = ()
    max_tokens: int | None = None


def data_file(name: str) -> str:
    return (files("surefoot.compare") / "data" / name).read_text(encoding="utf-8")


def built_in() -> list[Prompt]:
    """Five questions, eight English and three Chinese completions."""
    return [_prompt(row, "built in") for row in json.loads(data_file("prompts.json"))]


def read(path: Path) -> list[Prompt]:
    """A JSON list of prompts as in data/prompts.json; id and checks may be left out."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f'{path} must hold a list like [{{"kind": "question", "text": "..."}}]')
    prompts = [_prompt(row, f"{path}, prompt {i}", f"p{i}") for i, row in enumerate(rows, 1)]
    if len({p.id for p in prompts}) < len(prompts):
        raise InputError(f"{path}: two prompts have the same id")
    return prompts


def _prompt(row: Any, where: str, default_id: str = "") -> Prompt:
    if not isinstance(row, dict) or row.get("kind") not in KINDS:
        raise InputError(f'{where}: "kind" must be {" or ".join(KINDS)}')
    text, limit = row.get("text"), row.get("max_tokens")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: "text" must be some text')
    if limit is not None and (type(limit) is not int or limit < 1):
        raise InputError(f'{where}: "max_tokens" must be a positive number')
    checks = row.get("checks", [])
    if not isinstance(checks, list) or not all(_is_check(c) for c in checks):
        raise InputError(
            f'{where}: checks: {{"contains": ["x"]}}, {{"number": 15}}, {{"code": "fibonacci"}}, {{"script": "han"}}'
        )
    return Prompt(str(row.get("id") or default_id), row["kind"], text, tuple(checks), limit)


def _is_check(check: Any) -> bool:
    if not isinstance(check, dict) or len(check) != 1:
        return False
    ((name, value),) = check.items()
    if name not in CHECKS or isinstance(value, bool) or not isinstance(value, CHECKS[name]):  # type: ignore[arg-type]
        return False
    allowed = {"code": CODE_JUDGES, "script": SCRIPTS}.get(name)
    if allowed is not None:
        return value in allowed
    return name != "contains" or (bool(value) and all(isinstance(v, str) and v for v in value))
