"""Every `npu::` operator that Surefoot calls, with its kernel status: `python -m emulated_npu.report` from tests/.

Read from the sources of `ops/npu`, so that none is forgotten; tests/test_npu_ops.py runs each of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import surefoot.ops.npu
from emulated_npu.attention import KERNELS
from emulated_npu.wheel import RELEASES, contract
from surefoot.analyze.registry import Status, load

SOURCES = Path(surefoot.ops.npu.__file__).parent


@dataclass(frozen=True)
class Row:
    """meta: the newest wheel has a Meta kernel. same: the older release has this schema. emulated: it can be run."""

    operator: str
    status: Status
    meta: bool
    same: bool
    emulated: bool


def rows() -> list[Row]:
    registry, (new, old) = load(), map(contract, RELEASES)
    found = []
    for name in called():
        same = new.schemas.get(name) == old.schemas.get(name) is not None
        status = registry.status(f"npu::{name}")
        found.append(Row(f"npu::{name}", status, name in new.meta, same, name in KERNELS))
    return found


def called() -> list[str]:
    """Names after `torch.ops.npu.`, and the `.out` overload that a captured graph takes."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(SOURCES.glob("*.py")))
    names = set(re.findall(r"torch\.ops\.npu\.(\w+)", text))
    overloads = {f"{name}.out" for name in names if "fused.out(" in text and name == "npu_fused_infer_attention_score"}
    return sorted(names | overloads)


def main() -> None:
    print(f"{'operator':64}{RELEASES[0]:16}{'Meta kernel':13}same schema in {RELEASES[1]}")
    for row in rows():
        print(f"{row.operator:64}{row.status!s:16}{'yes' if row.meta else 'no':13}{'yes' if row.same else 'no'}")


if __name__ == "__main__":
    main()
