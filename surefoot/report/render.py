"""placeholder"""

from pathlib import Path


def render(path: Path, languages):
    return ["README.md"]
