"""`surefoot audit`: which published numbers cannot be true together; exit code 0 none, 1 at least one is impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surefoot.core.errors import InputError

File = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="Claims as JSON, or the name of a shipped example.", show_default=False),
]
List = Annotated[bool, typer.Option("--list", help="Name the shipped examples.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")]


def audit(file: File = None, list_examples: List = False, as_json: Json = False) -> None:
    """Check performance claims against arithmetic, the chip and each other. docs/estimate.md has the form of FILE.

    \b
    Examples:
      surefoot audit --list
      surefoot audit qwen3.5-0.8b-910b
      surefoot audit claims.json --json
    """
    import json

    from surefoot.analyze import claims as pages

    if list_examples:
        for name, path in pages.examples().items():
            print(f"{name:32}{pages.read(path).title}")
        return
    if file is None:
        raise InputError("give a file of claims, or --list for the shipped examples")
    from surefoot.analyze import audit as checks

    claims = pages.read(file)
    findings = checks.audit(claims)
    if as_json:
        print(json.dumps(checks.as_dict(claims, findings), indent=2, ensure_ascii=False))
    else:
        print(claims.title)
        for finding in findings:
            print(f"  {finding.severity:11}{', '.join(finding.where)}: {finding.statement}")
            if finding.arithmetic != "-":
                print(f"  {'':11}{finding.arithmetic}")
        for note in checks.unchecked(claims):
            print(f"  {'unchecked':11}{note}")
        if not findings:
            print("  nothing contradicts")
    if any(finding.severity == "impossible" for finding in findings):
        raise typer.Exit(1)
