"""The proof as a document: what was compared with what, the raw numbers, the verdict, and a seal over all of it.

    proof = Proof.load(Path("proof.json"));  proof.verdict;  complaints = proof.check()

`check` recomputes the findings and the verdict from the raw numbers in the file, and the seal. The seal is a plain
SHA-256, not a signature: it shows damage and edits of the file, not who made it; whoever needs that signs the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from surefoot.core.errors import InputError
from surefoot.verify.shapes import Finding, Verdict

FORMAT = "surefoot-proof/1"
EXIT_CODES: dict[str, int] = {"proven": 0, "refuted": 1, "undecided": 3}
RTOL = 1e-6  # between recomputed and stored numbers: another machine's libm may differ in the last bits


class Proof:
    """A sealed JSON document; `data` is its content."""

    def __init__(self, data: dict[str, Any]):
        self.data = data

    @property
    def verdict(self) -> Verdict:
        return self.data["verdict"]

    @property
    def partial(self) -> bool:
        return bool(self.data.get("partial"))

    @property
    def findings(self) -> list[Finding]:
        return [Finding(**f) for f in self.data["findings"]]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def finding(self, check: str) -> Finding | None:
        return next((f for f in self.findings if f.check == check), None)

    # ---- on disk

    def save(self, path: Path) -> None:
        """Seal and write, in one step as far as readers can see."""
        self.data = jsonable(self.data)
        self.data["seal"] = seal(self.data)
        text = json.dumps(self.data, ensure_ascii=False, indent=1, allow_nan=False)
        handle, name = tempfile.mkstemp(dir=path.parent or Path("."), prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: Path) -> Proof:
        """Read a proof; anything that is not one is an InputError in one line."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None
        except ValueError as error:
            raise Damaged(f"{path} is cut off or damaged: not valid JSON ({error})") from None
        if not isinstance(data, dict) or not str(data.get("format", "")).startswith("surefoot-proof/"):
            raise InputError(f"{path} is not a proof: it has no format surefoot-proof/...")
        if data["format"] != FORMAT:
            raise InputError(f"{path} has format {data['format']}, this version reads {FORMAT}")
        missing = [k for k in ("verdict", "findings", "evidence", "seal", "prompts") if k not in data]
        if missing:
            raise Damaged(f"{path} is incomplete: it lacks {', '.join(missing)}")
        return cls(data)

    # ---- offline check

    def check(self) -> list[str]:
        """What is wrong with the document; empty when its verdict follows from its numbers and nothing was altered."""
        from surefoot.verify.gate import decide
        from surefoot.verify.judge import RULES
        from surefoot.verify.prompts import digest

        wrong = []
        if seal(self.data) != self.data["seal"]:
            wrong.append("the seal does not fit the content: the file was altered after it was written")
        try:
            if digest(self.data["prompts"]["sequences"]) != self.data["prompts"]["sha256"]:
                wrong.append("the token ids do not have the hash that the proof states")
            verdict, findings = decide(self.data["evidence"])
        except (InputError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            return [*wrong, f"the evidence is damaged and cannot be judged: {' '.join(str(error).split())}"]
        if jsonable(RULES) != self.data.get("rules"):
            wrong.append("the proof was judged by other rules than this version's: make it again")
        if verdict != self.verdict:
            wrong.append(f"the numbers say {verdict}, the file says {self.verdict}")
        stored = {i: f for i, f in enumerate(self.data["findings"])}
        for i, finding in enumerate(findings):
            if not same(jsonable(finding.as_dict()), stored.get(i)):
                wrong.append(f"the finding on {finding.check} does not follow from the numbers")
        if len(findings) != len(stored):
            wrong.append(f"{len(stored)} findings are stored, the numbers give {len(findings)}")
        return wrong


class Damaged(InputError):
    """The file is a proof that was altered or cut off: a failed check, not a wrong argument."""

    exit_code = 1


def seal(data: dict[str, Any]) -> str:
    """SHA-256 over the canonical JSON (sorted keys, no spaces, UTF-8) of everything but the seal."""
    content = {k: v for k, v in data.items() if k != "seal"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def jsonable(value: Any) -> Any:
    """Plain JSON: tuples become lists, numpy scalars numbers, infinities and NaN text."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def same(a: Any, b: Any) -> bool:
    """Equal but for the last bits of floats; text may differ, it is made of those numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("summary", "text"))
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)) and not isinstance(b, bool):
        return math.isclose(a, b, rel_tol=RTOL, abs_tol=1e-300)
    return a == b
