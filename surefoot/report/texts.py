"""The report's own words, in English and Chinese (templates/en.json, zh.json). What is recorded stays as recorded."""

from __future__ import annotations

import json
from pathlib import Path

from surefoot.report.units import UNKNOWN

FOLDER = Path(__file__).with_name("templates")


class Texts:
    """texts["key"]: the words of one language; a key that it lacks is a bug."""

    def __init__(self, language: str):
        self.language = language
        self.words: dict[str, str] = json.loads((FOLDER / f"{language}.json").read_text(encoding="utf-8"))

    def __getitem__(self, key: str) -> str:
        return self.words[key]

    def of(self, family: str, word: object) -> str:
        """The translation of a recorded word like a status, or the word itself; a dash for what is not known."""
        if word is None:
            return UNKNOWN
        return self.words.get(f"{family}_{str(word).replace(' ', '_')}", str(word))
