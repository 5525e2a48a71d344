"""`surefoot proof check|show|diff`: read a proof without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

File = Annotated[Path, typer.Argument(metavar="FILE", help="A proof.json.", show_default=False)]
Other = Annotated[Path, typer.Argument(metavar="OTHER", help="Another proof.json.", show_default=False)]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Check, show or compare proofs, without the model.",
)


@app.command("check", short_help="Recompute the verdict from the raw numbers.")
def check(file: File) -> None:
    """Recompute findings and verdict from the numbers in the file; exit code 1 if anything was altered or cut off."""
    from surefoot.verify.proof import Proof

    proof = Proof.load(file)
    complaints = proof.check()
    for complaint in complaints:
        print(f"{file}: {complaint}")
    if complaints:
        raise typer.Exit(1)
    what = "partial evidence, " if proof.partial else ""
    print(f"{file}: sound; {what}{len(proof.findings)} findings recomputed, verdict {proof.verdict}")


@app.command("show", short_help="Print a proof.")
def show(file: File) -> None:
    """Print the verdict, the checks, the module at fault and its cause."""
    from surefoot.verify import report_text
    from surefoot.verify.proof import Proof

    print("\n".join(report_text.lines(Proof.load(file))))


@app.command("diff", short_help="What differs between two proofs.")
def diff(file: File, other: Other) -> None:
    """Print what differs between two proofs; exit code 1 if their verdicts do."""
    from surefoot.verify import report_text
    from surefoot.verify.proof import Proof

    a, b = Proof.load(file), Proof.load(other)
    print("\n".join(report_text.diff(a, b) or ["no difference"]))
    if a.verdict != b.verdict:
        raise typer.Exit(1)
