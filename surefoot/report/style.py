"""Colours and fonts of the plots, and how a matplotlib SVG becomes one that follows the page's light or dark mode.

Plots are drawn in marker colours: `inline` replaces them by CSS variables of the page, `standalone` by plain ones.
"""

from __future__ import annotations

import re
from typing import Any

# marker colour in the drawing -> (CSS variable of the page, colour in a plot file)
COLOURS = {
    "ink": ("#010101", "var(--ink)", "#1f2328"),
    "soft": ("#020202", "var(--soft)", "#59636e"),
    "grid": ("#030303", "var(--line)", "#d8dee4"),
    "a": ("#040404", "var(--a)", "#0f62c0"),
    "b": ("#050505", "var(--b)", "#c2410c"),
    "c": ("#060606", "var(--c)", "#117a50"),
    "d": ("#070707", "var(--d)", "#8250df"),
    "paper": ("#080808", "var(--paper)", "#ffffff"),
}
INK, SOFT, GRID, PAPER = (COLOURS[n][0] for n in ("ink", "soft", "grid", "paper"))
SERIES = tuple(COLOURS[n][0] for n in "abcd")
MARKERS = ("o", "s", "^", "D")
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'PingFang SC', 'Microsoft YaHei', 'Noto Sans CJK SC', sans-serif"


CHINESE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei", "SimHei")


def settings() -> Any:
    """matplotlib's rcParams. Chinese in a PNG needs a font of the machine; an SVG leaves the choice to its reader."""
    from matplotlib.font_manager import fontManager

    installed = set(fontManager.get_font_names())
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "surefoot",
        "font.family": ["DejaVu Sans", *(name for name in CHINESE if name in installed)],
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlepad": 10,
        "axes.edgecolor": SOFT,
        "axes.labelcolor": INK,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "text.color": INK,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
    }


def inline(svg: str, name: str) -> str:
    """For a page: no prolog, no fixed size, the page's colours and fonts, ids of its own."""
    svg = svg[svg.index("<svg") :]
    for marker, css, _ in COLOURS.values():
        svg = svg.replace(marker, css)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' xmlns:xlink="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'font(?:-family)?: ?([^;"]*?)px [^;"]*', rf"font: \1px {FONTS}", svg)
    svg = re.sub(r"(<svg [^>]*?) width=\"[^\"]*\"", r"\1", svg, count=1)
    svg = re.sub(r"(<svg [^>]*?) height=\"[^\"]*\"", r"\1", svg, count=1)
    for old in set(re.findall(r'\bid="([^"]+)"', svg)):
        svg = re.sub(rf'(id="|#){re.escape(old)}(?=["\)])', rf"\g<1>{name}-{old}", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1)


def standalone(svg: str) -> str:
    """For a file: plain colours on white."""
    for marker, _, colour in COLOURS.values():
        svg = svg.replace(marker, colour)
    return svg.replace("<defs>", '<rect width="100%" height="100%" fill="#ffffff"/><defs>', 1)
