"""A report as a browser's parser sees it, and whether its recorded values are what the records say."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from surefoot.report.records import look_up
from surefoot.report.render import words_of
from surefoot.report.units import show

VOID = {"meta", "link", "input", "br", "img", "use", "path"}


class Page(HTMLParser):
    """The text of a page by what stands around it. printed: (text, attributes) of recorded values; loose: the rest."""

    def __init__(self, html: str):
        super().__init__()
        self.printed: list[tuple[str, dict]] = []
        self.loose: list[str] = []
        self.attributes: list[tuple[str, dict]] = []
        self.plots: dict[str, list[str]] = {}
        self._open: list[tuple[str, dict]] = []
        self.feed(html)
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop()[0] == tag

    def handle_data(self, data):
        inside = [tag for tag, _ in self._open]
        recorded = next((a for _, a in reversed(self._open) if "data-record" in a), None)
        if recorded is not None:
            self.printed.append((data, recorded))
        elif "svg" in inside:
            source = next(a["data-records"] for _, a in self._open if "data-records" in a)
            self.plots.setdefault(source, []).append(data.strip())
        elif "style" not in inside and "title" not in inside:
            self.loose.append(data)


def check_recorded(folder: Path, page: Page) -> None:
    """Every value that is marked as recorded reads as its record does now."""
    for text, attributes in page.printed:
        recorded = look_up(folder, attributes["data-record"])
        if "data-unit" in attributes:
            assert text == show(recorded, attributes["data-unit"])
            assert float(attributes["value"]) == recorded
        else:
            assert words_of(recorded).startswith(text)
