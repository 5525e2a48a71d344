"""Power, temperature, load and memory of Ascend NPUs through `npu-smi`, because `torch.npu` has no calls for them.

Two forms are read. The table of `npu-smi info` has two rows a chip, whatever its width:

    | 0     910B3               | OK            | 93.6        40                0    / 0             |  health W C
    | 0                         | 0000:C1:00.0  | 0           0    / 0          3365 / 65536         |  bus AICore MB

The last `used / total` pair of the second row is the memory that models live in: HBM, or DDR on a 310P. An A3 card has
two chips and gives `-` for the second one's power; a 310P gives `NA`. The detailed queries, `npu-smi info -t
common|usages|power|temp -i N`, answer in `key : value` lines. What cannot be read is None and a warning, never an
exception: a benchmark goes on without it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

MEGABYTE = 1 << 20
USUAL_PLACES = ("/usr/local/bin/npu-smi", "/usr/local/sbin/npu-smi", "/usr/local/Ascend/driver/tools/npu-smi")


@dataclass(frozen=True)
class ChipStatus:
    """One chip. card: the NPU ID; chip: its place on the card; device: the number that CANN counts chips by.

    Watts, degrees Celsius, percent, bytes; None where npu-smi does not say.
    """

    card: int
    chip: int
    device: int
    name: str = ""
    health: str = ""
    bus_id: str = ""
    power: float | None = None
    temperature: float | None = None
    aicore: float | None = None
    memory_used: int | None = None
    memory_total: int | None = None


def executable() -> str | None:
    """npu-smi on the path, or where the driver puts it."""
    return shutil.which("npu-smi") or next((p for p in USUAL_PLACES if os.access(p, os.X_OK)), None)


def call(*arguments: str, timeout: float = 20.0) -> str | None:
    """Output of `npu-smi ARGUMENTS`, or None and a warning that says why there is none."""
    program = executable()
    if program is None:
        _warn("npu-smi is not on the path")
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        _warn(f"npu-smi did not answer ({type(error).__name__})")
        return None
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        said = (done.stderr.decode("utf-8", "replace") or text).strip().splitlines()
        _warn(f"npu-smi failed with code {done.returncode}" + (f": {said[0][:200]}" if said else ""))
        return None
    return text


def chips() -> list[ChipStatus] | None:
    """All chips of this machine by `npu-smi info`."""
    text = call("info")
    return None if text is None else parse_table(text)


def status(index: int) -> ChipStatus | None:
    """The chip that this process calls npu:`index`, by the table, or by the detailed queries where that is no table."""
    device, text = physical_device(index), call("info")
    if text is None:
        return None
    found = parse_table(text)
    if found is None:
        return query(device)
    chip = next((c for c in found if c.device == device), None)
    if chip is None:
        _warn(f"npu-smi info lists no device {device}")
        return None
    return chip


def physical_device(index: int, visible: str | None = None) -> int:
    """The device number behind npu:`index` where ASCEND_RT_VISIBLE_DEVICES narrows or reorders the devices."""
    visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES") if visible is None else visible
    numbers = [int(n) for n in re.findall(r"\d+", visible or "")]
    return numbers[index] if index < len(numbers) else index


def version(text: str) -> str | None:
    """Version of npu-smi, which is the driver's, from the head of the table."""
    match = re.search(r"Version:\s*(\S+)", text) or re.search(r"npu-smi\s+v?(\d\S*)", text)
    return match.group(1) if match else None


def parse_table(text: str) -> list[ChipStatus] | None:
    """The chips of an `npu-smi info` table; None and a warning if this is none."""
    found: list[ChipStatus] = []
    first: tuple[int, str, str, str] | None = None
    for cells in _rows(text):
        if head := re.fullmatch(r"(\d{1,6})\s+(\S*[A-Za-z]\S*)", cells[0]):
            first = (int(head.group(1)), head.group(2), cells[1], cells[2])
        elif first and re.fullmatch(r"[0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-9A-Fa-f]", cells[1]):
            if places := re.fullmatch(r"(\d{1,6})(?:\s+(\d{1,6}))?", cells[0]):
                device = places.group(2)
                found.append(_chip(first, int(places.group(1)), int(device) if device else len(found), cells))
            first = None
    if not (result := found):
        _warn("npu-smi info printed no table of chips")
    return result or None


def _rows(text: str) -> list[list[str]]:
    """Lines `| a | b | c |` as their three cells; other lines are frames, headings or processes."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if "|" in line]
    return [cells for cells in rows if len(cells) == 3 and all(cells)]


def _chip(first: tuple[int, str, str, str], chip: int, device: int, cells: list[str]) -> ChipStatus:
    card, name, health, readings = first
    power, temperature = (re.split(r"\s+", readings) + ["", ""])[:2]
    pairs = re.findall(r"(\d{1,9})\s*/\s*(\d{1,9})", cells[2])
    used, total = (int(n) * MEGABYTE for n in pairs[-1]) if pairs else (None, None)
    return ChipStatus(
        card=card,
        chip=chip,
        device=device,
        name=name,
        health=health,
        bus_id=cells[1],
        power=number(power),
        temperature=number(temperature),
        aicore=number(cells[2].split()[0]),
        memory_used=used,
        memory_total=total,
    )


def parse_fields(text: str) -> list[dict[str, str]] | None:
    """The chips of a `npu-smi info -t TYPE -i N` answer, each as {key: value}; None and a warning if there is none.

    NOTE: "Chip ID" opens a chip's lines in some answers and closes them in others: a chip ends where a key comes again.
    """
    card: dict[str, str] = {}
    found: list[dict[str, str]] = []
    for line in text.splitlines():
        match = re.fullmatch(r"\s*([A-Za-z][^:]*?)\s*:\s*(.*?)\s*", line)
        if match is None:
            continue
        key, value = match.groups()
        if key in ("NPU ID", "Chip Count"):
            card[key] = value
        elif not found or key in found[-1]:
            found.append({key: value})
        else:
            found[-1][key] = value
    if not (result := [card | chip for chip in found]):
        _warn("npu-smi printed no `key : value` lines")
    return result or None


def reading(fields: dict[str, str], *names: str) -> float | None:
    """The first of these quantities that the fields have, whatever unit follows: reading(f, "Temperature")."""
    for name in names:
        for key, value in fields.items():
            if re.match(rf"(NPU )?{re.escape(name)}\s*(\(|$)", key, re.IGNORECASE):
                return number(value)
    return None


def from_fields(fields: dict[str, str]) -> ChipStatus:
    """One chip from the key-value answers of common, usages, power and temp together."""
    total = reading(fields, "HBM Capacity") or reading(fields, "DDR Capacity")
    rate = reading(fields, "HBM Usage Rate")
    rate = reading(fields, "DDR Usage Rate", "Memory Usage Rate") if rate is None else rate
    card, chip = (reading(fields, name) for name in ("ID", "Chip ID"))
    return ChipStatus(
        card=int(card or 0),
        chip=int(chip or 0),
        device=int(card or 0),
        name=fields.get("Chip Name", ""),
        power=reading(fields, "Real-time Power", "Power Dissipation"),
        temperature=reading(fields, "Temperature"),
        aicore=reading(fields, "Aicore Usage Rate"),
        memory_used=None if rate is None or total is None else int(total * MEGABYTE * rate / 100),
        memory_total=None if total is None else int(total * MEGABYTE),
    )


def query(card: int, chip: int = 0) -> ChipStatus | None:
    """One chip by the detailed queries, for drivers whose table cannot be read."""
    together: dict[str, str] = {}
    for kind in ("common", "usages", "power", "temp"):
        text = call("info", "-t", kind, "-i", str(card))
        for number_of, fields in enumerate((parse_fields(text) if text else None) or []):
            if reading(fields, "Chip ID") in (chip, None) and number_of <= chip:
                together = fields | together
    return from_fields(together) if together else None


def number(text: str) -> float | None:
    """A plain decimal number; None for "-", "NA", "N/A" and everything else."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)", text.strip())
    return float(match.group(1)) if match else None


def driver_version(root: Path = Path("/")) -> str | None:
    """Version of the installed driver by its own file."""
    return version_file(root / "usr/local/Ascend/driver/version.info")


def version_file(path: Path) -> str | None:
    """`Version=24.1.rc2` (any case, `:` or `=`) in one of Ascend's version files."""
    try:
        match = re.search(
            r"^\s*(?:package_)?version\s*[=:]\s*\[?\"?([\w.+-]+)", path.read_text(errors="replace"), re.I | re.M
        )
    except OSError:
        return None
    return match.group(1) if match else None


def _warn(why: str) -> None:
    warnings.warn(f"{why}: no power, temperature or load of the NPU", stacklevel=3)
