"""report: README.md, report.html and the plots, from the records of the folder."""

from __future__ import annotations

from surefoot.bringup.stages.base import GOOD, Record, Work


def run_report(work: Work) -> Record:
    from surefoot.report.render import render

    work.progress("drawing and writing", None)
    return {"format": "surefoot-report/1", "files": render(work.path, work.settings.languages)}


def report_outcome(record: Record) -> tuple[str, str]:
    return GOOD, f"{', '.join(record['files'][:3])}"
