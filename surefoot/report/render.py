"""From a run folder to README.md, report.html and plots.

Templates can print a recorded value only through the filters `n` (number with unit) and `s` (text), which leave its
place beside it (`data-record` in HTML). The words around them come from the catalogue.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from surefoot.core.errors import SurefootError
from surefoot.report import features, plots, records, style
from surefoot.report.records import At, Records, known, place, value
from surefoot.report.texts import Texts
from surefoot.report.units import show

TEMPLATES = Path(__file__).with_name("templates")
SHORT_HASH = 12


class HtmlPrinter:
    """Recorded values as HTML that knows where they come from."""

    def number(self, at: At, unit: str = "") -> Markup:
        raw = value(at)
        if raw is None:
            return Markup('<span class="none">{}</span>').format(show(None))
        where = place(at)
        return Markup('<data value="{}" data-unit="{}" data-record="{}" title="{}">{}</data>').format(
            raw, unit, where, where, show(raw, unit)
        )

    def text(self, at: At, most: int | None = None) -> Markup:
        raw = value(at)
        if raw is None:
            return Markup('<span class="none">{}</span>').format(show(None))
        where, words = place(at), words_of(raw)
        cut = words if most is None or len(words) <= most else words[:most]
        return Markup('<span data-record="{}" title="{}">{}</span>').format(where, where, cut)


class MarkdownPrinter:
    """The same values as Markdown text. `printed` keeps (text, place) of each, for whoever checks the page."""

    def __init__(self) -> None:
        self.printed: list[tuple[str, str]] = []

    def number(self, at: At, unit: str = "") -> str:
        return self._print(show(value(at), unit), at)

    def text(self, at: At, most: int | None = None) -> str:
        words = words_of(value(at))
        return self._print(words if most is None else words[:most], at)

    def _print(self, text: str, at: At) -> str:
        text = " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
        if known(at):
            self.printed.append((text, place(at)))
        return text


def words_of(raw: Any) -> str:
    if isinstance(raw, list):
        return ", ".join(map(words_of, raw))
    if isinstance(raw, dict):
        return ", ".join(f"{k} {words_of(v)}" for k, v in raw.items())
    return show(raw)


def _code(words: str) -> Markup:
    """`this` in the report's own words as <code>this</code>."""
    parts = str(escape(words)).split("`")
    return Markup("".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)))


def most(items: Iterable[At], *keys: str) -> At | None:
    """The item whose value at these keys is the largest."""

    def at(item: At) -> float:
        for key in keys:
            item = item[key]
        return value(item) if known(item) else float("-inf")

    return max(items, key=at, default=None)


def overall(stages: At) -> str:
    """The worst level of any stage; one that failed or was not reached counts as bad."""
    levels = [value(s["level"]) if s["state"] == "done" else "bad" for k, s in records.pairs(stages) if k != "report"]
    return next((level for level in ("bad", "warn") if level in levels), "good")


def environment(printer: HtmlPrinter | MarkdownPrinter) -> jinja2.Environment:
    html = isinstance(printer, HtmlPrinter)
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    env.filters |= {"n": printer.number, "s": printer.text, "file": lambda at: place(at).partition("#")[0]}
    env.filters["code"] = _code
    env.globals |= {
        "known": known,
        "raw": value,
        "pairs": records.pairs,
        "find": records.find,
        "most": most,
        "overall": overall,
        "features": features.features,
        "limits": features.limits,
        "short": SHORT_HASH,
    }
    return env


def render(folder: Path, languages: Sequence[str]) -> list[str]:
    """Write everything; returns the files by their names in the folder."""
    found = Records(folder)
    if not known(found["manifest"]["stages"]):
        raise SurefootError(f"{folder} is not a run folder: it has no manifest.json")
    (folder / "plots").mkdir(exist_ok=True)
    drawings = {language: _draw(folder, found, language, languages[0]) for language in languages}
    pages = {"report.html": html(found, languages, drawings)}
    for language in languages:
        pages[readme_name(language, languages)] = markdown(found, language, languages, list(drawings[language]))[0]
    for name, text in pages.items():
        _write(folder / name, text)
    return [*pages, *sorted(f"plots/{p.name}" for p in (folder / "plots").iterdir())]


def readme_name(language: str, languages: Sequence[str]) -> str:
    return "README.md" if language == languages[0] else f"README.{language}.md"


def html(found: Records, languages: Sequence[str], drawings: dict[str, dict[str, str]]) -> str:
    env = environment(HtmlPrinter())
    return env.get_template("report.html.j2").render(
        languages=[Texts(language) for language in languages],
        r=found,
        plots={k: {name: Markup(svg) for name, svg in v.items()} for k, v in drawings.items()},
        css=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
    )


def markdown(
    found: Records, language: str, languages: Sequence[str], drawn: list[str]
) -> tuple[str, list[tuple[str, str]]]:
    """The page, and what of the records was printed on it."""
    printer = MarkdownPrinter()
    suffix = "" if language == languages[0] else f".{language}"
    page = (
        environment(printer)
        .get_template("README.md.j2")
        .render(
            t=Texts(language),
            r=found,
            plots=drawn,
            suffix=suffix,
            other=[readme_name(x, languages) for x in languages if x != language],
        )
    )
    return page, printer.printed


def _draw(folder: Path, found: Records, language: str, first: str) -> dict[str, str]:
    """Every plot as a file (SVG, and PNG in the first language) and as SVG to be put into a page."""
    drawn = {}
    suffix = "" if language == first else f".{language}"
    for name, figure in plots.draw(found, Texts(language)):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        svg = buffer.getvalue()
        drawn[name] = style.inline(svg, f"{name}-{language}")
        _write(folder / "plots" / f"{name}{suffix}.svg", style.standalone(svg))
        if not suffix:
            _png(folder / "plots" / f"{name}.png", figure)
    return drawn


def _png(path: Path, figure: Any) -> None:
    from matplotlib import colors

    plain = {marker: colour for marker, _, colour in style.COLOURS.values()}
    for artist in figure.findobj():
        for name in ("color", "facecolor", "edgecolor", "markeredgecolor", "markerfacecolor"):
            getter, setter = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            if getter is None or setter is None:
                continue
            now = getter()
            if isinstance(now, str) and now in plain:
                setter(plain[now])
            elif not isinstance(now, str) and len(now) and colors.is_color_like(now):
                found = plain.get(colors.to_hex(now))
                if found:
                    setter(colors.to_rgba(found, now[3] if len(now) == 4 else None))
    figure.savefig(path, dpi=150, facecolor="white")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
