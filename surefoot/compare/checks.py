"""Known-answer checks of one answer: it contains a text, states a number, is in a script, or its code runs right.

check(prompt, "中国的首都是北京。")       # [{"check": "contains", "passed": True, "why": "北京"}]
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Mapping
from typing import Any

from surefoot.compare import jail
from surefoot.compare.prompts import Prompt, data_file

WALL_SECONDS = 10.0
BLOCK = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.S | re.I)
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?"
STATED = re.compile(rf"(?:=|≈|等于|等於|结果是|答案是|答案为|是|为|\bis\b|\bequals?\b|:)\s*[*$`\s]*({NUMBER})", re.I)
HAN, LATIN = re.compile(r"[\u3400-\u9fff]"), re.compile(r"[A-Za-z]")


def check(prompt: Prompt, answer: str, run_code: bool = True) -> list[dict[str, Any]]:
    """One result per check of the prompt. passed None: not run."""
    return [_one(check, answer, run_code) for check in prompt.checks]


def _one(check: Mapping[str, Any], answer: str, run_code: bool) -> dict[str, Any]:
    ((name, wanted),) = check.items()
    if name == "contains":
        found = next((w for w in wanted if _holds(answer, w)), None)
        return _result(name, found is not None, found or f"none of {', '.join(wanted)}")
    if name == "number":
        stated = numbers(answer)
        said = ", ".join(f"{n:g}" for n in stated[:5]) or "no number"
        return _result(name, wanted in stated, f"{wanted} is wanted, the answer states {said}")
    if name == "script":
        han, latin = len(HAN.findall(answer)), len(LATIN.findall(answer))
        share = han / (han + latin) if han + latin else 0.0
        right = han + latin > 0 and (share > 0.5) == (wanted == "han")
        return _result(name, right, f"{share:.0%} of its letters are Han")
    if not run_code:
        return {"check": name, "passed": None, "why": "code was not to be run"}
    return {"check": name} | run(code_of(answer), data_file(f"{wanted}.py"))


def _result(name: str, passed: bool, why: str) -> dict[str, Any]:
    return {"check": name, "passed": passed, "why": why}


def _holds(answer: str, wanted: str) -> bool:
    """Words of Latin letters begin at a word's beginning ("AI" is not in "said"); case counts only for short ones."""
    if not wanted.isascii():
        return wanted in answer
    flags = re.I if len(wanted) > 2 else 0
    end = r"\b" if len(wanted) <= 3 else ""
    return re.search(rf"\b{re.escape(wanted)}{end}", answer, flags) is not None


def numbers(answer: str) -> list[float]:
    """The numbers that an answer states as a result; if none is marked so, its last one."""
    text = unicodedata.normalize("NFKC", answer)  # full-width digits and signs
    found = STATED.findall(text) or re.findall(NUMBER, text)[-1:]
    return [float(n.replace(",", "")) for n in found]


def code_of(answer: str) -> str:
    """The fenced blocks of an answer, or from its first line of code on."""
    if blocks := BLOCK.findall(answer):
        return "\n".join(blocks)
    lines = answer.splitlines()
    start = next((i for i, line in enumerate(lines) if re.match(r"(def|import|from|class)\s", line)), None)
    return "" if start is None else "\n".join(lines[start:])


def run(code: str, judge: str) -> dict[str, Any]:
    """Run code and judge in a process with limits (jail.py)."""
    if not code.strip():
        return {"passed": False, "why": "the answer holds no code"}
    word = secrets.token_hex(8)  # so that code which prints and leaves is not taken for judged
    with tempfile.TemporaryDirectory(prefix="surefoot-code-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", jail.__file__, word],
                input=json.dumps({"code": code, "judge": judge}).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=WALL_SECONDS,
                start_new_session=True,
            )
        except subprocess.TimeoutExpired:
            return {"passed": False, "why": f"not done after {WALL_SECONDS:g} s"}
    _, found, said = done.stdout.decode("utf-8", "replace").partition(word)
    if not found:
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
        return {"passed": False, "why": f"the process ended with {how} before it was judged (limits: see jail.py)"}
    return json.loads(said)
