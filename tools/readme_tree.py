"""The file tree in the READMEs: each folder with what it is for, and the files in it. `make tree` refreshes the files.

    surefoot/core/  -- the words every room shares
        batch.py config.py errors.py ...

The text after `--` is written by hand and kept; a new folder gets its package's docstring. `__init__.py` is left out.
tests/test_structure.py fails where a README's tree is not the real one.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh.md")
BEGIN, END = "<!-- tree -->\n```text\n", "```\n<!-- /tree -->"
SKIP_FOLDERS = {"__pycache__", "build", "dist", "runs", ".git"}
SHOWN_HIDDEN = {".ci", ".gitignore", ".pre-commit-config.yaml"}
SKIP_SUFFIXES = {".pyc", ".so", ".log", ".partial"}


def real_tree(root: Path = ROOT) -> dict[str, list[str]]:
    """Folder -> its files, for all folders that hold any; "./" is the repository itself."""
    tree: dict[str, list[str]] = {}
    folders = [root]
    while folders:
        folder = folders.pop()
        entries = [e for e in sorted(folder.iterdir()) if _shown(e)]
        files = [e.name for e in entries if e.is_file() and e.name != "__init__.py"]
        if files or (folder / "__init__.py").exists():
            tree["./" if folder == root else f"{folder.relative_to(root)}/"] = files
        folders += [e for e in entries if e.is_dir()]
    return dict(sorted(tree.items()))


def _shown(entry: Path) -> bool:
    if entry.name.startswith("."):
        return entry.name in SHOWN_HIDDEN
    return entry.name not in SKIP_FOLDERS and entry.suffix not in SKIP_SUFFIXES and not entry.name.endswith(".egg-info")


def parse(readme: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """(folder -> files, folder -> purpose) as a README says it."""
    block = readme.split(BEGIN, 1)[1].split(END, 1)[0]
    tree: dict[str, list[str]] = {}
    purpose: dict[str, str] = {}
    folder = ""
    for line in block.splitlines():
        head = re.fullmatch(r"(\S+/)(?:\s+--\s+(.*))?", line)
        if head:
            folder = head.group(1)
            tree[folder], purpose[folder] = [], head.group(2) or ""
        elif line.strip():
            tree[folder] += line.split()
    return tree, purpose


def render(tree: dict[str, list[str]], purpose: dict[str, str]) -> str:
    lines = []
    for folder, files in tree.items():
        lines.append(f"{folder}  -- {purpose.get(folder) or _docstring(folder)}".rstrip(" -"))
        if files:
            lines += textwrap.wrap(" ".join(files), 100, initial_indent="    ", subsequent_indent="    ",
                                   break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return "\n".join(lines) + "\n"


def _docstring(folder: str) -> str:
    init = ROOT / folder / "__init__.py"
    text = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) if init.exists() else None
    return (text or "").split("\n")[0].rstrip(".")


def main() -> None:
    tree = real_tree()
    for name in READMES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        before, rest = text.split(BEGIN, 1)
        _, after = rest.split(END, 1)
        path.write_text(before + BEGIN + render(tree, parse(text)[1]) + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
