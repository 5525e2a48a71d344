"""Make `surefoot/analyze/data/torch-npu-X.Y.json` from a torch_npu wheel, which is read as data and never imported.

    pip download --no-deps torch-npu==2.13.0 -d wheels
    python tools/read_npu_registry.py wheels/torch_npu-2.13.0-*.whl --write      # or without --write: compare only

Read from the wheel's text: operators with an NPU kernel (`csrc/aten/*.yaml`), the `npu::` schemas (the same files, and
`_npu_lib.define` in Python), and Meta kernels (`@impl`). Read from the dispatcher of the running PyTorch, which must be
the release that the wheel asks for: which aten operators are composites, and which have a CPU kernel only.
Not in the text: kernels of other namespaces (`atb::`, `c10d::`, ...), which the wheel registers in C++. They were read
once from the loaded library and are carried over from the existing file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
import yaml

DATA = Path(__file__).resolve().parent.parent / "surefoot" / "analyze" / "data"
YAMLS = ("npu_native_functions_by_codegen.yaml", "npu_native_functions.yaml")
META_FILES = ("op_plugin/meta/_meta_registrations.py", "op_plugin/meta/_fake_registrations.py")


def read_wheel(path: Path) -> dict[str, Any]:
    """Version, the yaml files' entries by section, schemas defined in Python, and names with a Meta kernel."""
    with zipfile.ZipFile(path) as wheel:
        files = {n: wheel.read(n).decode("utf-8", "replace") for n in wheel.namelist() if n.endswith((".py", ".yaml"))}
        metadata = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    sections: dict[str, list[dict]] = {}
    for name in YAMLS:
        for section, entries in yaml.safe_load(files[f"torch_npu/csrc/aten/{name}"]).items():
            if isinstance(entries, list):
                sections.setdefault(section, []).extend({"func": e} if isinstance(e, str) else e for e in entries)
    python = "\n".join(files.values())
    return {
        "version": _field(metadata, r"^Version: (\S+)"),
        "torch": _field(metadata, r"^Requires-Dist: torch==([\d.]+?)(?:\.\*)?$"),
        "sections": sections,
        "defined": re.findall(r'_npu_lib\.define\(\s*"([^"]+)"', python),
        "meta": read_meta(files),
    }


def _field(text: str, pattern: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        sys.exit(f"the wheel's METADATA has no line like {pattern}")
    return match.group(1)


def read_meta(files: dict[str, str]) -> set[str]:
    """Names under "npu" that some Python file gives a Meta kernel."""
    found = set()
    for text in files.values():
        libraries = dict(re.findall(r'^(\w+) = Library\("(\w+)", "IMPL", "Meta"\)', text, re.MULTILINE))
        for library, name in re.findall(r'@(?:torch\.library\.)?impl\((\w+), "([^"]+)"\)', text):
            if libraries.get(library) == "npu":
                found.add(name)
        found |= set(re.findall(r'@(?:torch\.library\.)?impl\(_npu_lib, "([^"]+)", "Meta"\)', text))
        found |= set(re.findall(r'register_fake\("npu::([^"]+)"', text))
    return found


def short(func: str) -> str:
    return func.partition("(")[0].strip()


def schema(text: str) -> tuple[str, str]:
    """(name, canonical text) of an `npu::` schema as torch_npu registers it: the argument `self` is called `input`, and
    several outputs of an `.out` form are one list."""
    text = re.sub(r"\bself\b(?=[,)])", "input", text, count=1)
    outputs = re.search(r"((?:, Tensor\(\w!\) \w+){2,})\) -> \((.*)\)$", text)
    if short(text).endswith(".out") and outputs:
        returns = ", ".join(["Tensor"] * outputs.group(1).count("Tensor"))
        text = f"{text[: outputs.start()]}, Tensor[] out) -> ({returns})"
    parsed = torch._C.parse_schema("npu::" + text)
    name = parsed.name.removeprefix("npu::") + (f".{parsed.overload_name}" if parsed.overload_name else "")
    return name, str(parsed).removeprefix("npu::")


def registry(wheel: dict[str, Any]) -> dict[str, Any]:
    """The registry as far as text and the running PyTorch say it."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    aten = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")}
    custom = wheel["sections"]["custom"]
    listed = {
        "aten::" + short(e["func"])
        for section in ("supported", "autograd", "symint")
        for e in wheel["sections"].get(section, [])
        if "sparse" not in e or "impl_ns" in e  # else a kernel for sparse tensors only
    }
    kernels = listed & aten
    implicit = {n for n in aten if has(n, "CompositeImplicitAutograd")}
    explicit = {n for n in aten if _explicit(n)}
    fallbacks = {n for n in aten if has(n, "CPU")} - kernels - implicit - explicit
    schemas = dict(schema(text) for text in [*(e["func"] for e in custom if "(" in e["func"]), *wheel["defined"]])
    factories = {short(e["func"]) for e in custom if "CompositeExplicitAutograd" in e.get("dispatch", {})}
    cut = lambda names: sorted(n.removeprefix("aten::") for n in names)  # noqa: E731
    return {
        "version": wheel["version"],
        "torch": wheel["torch"],
        "source": f"torch_npu {wheel['version']} wheel, and the dispatcher of PyTorch {wheel['torch']}",
        "kernels": cut(kernels),
        "fallbacks": cut(fallbacks),
        "implicit": cut(implicit),
        "explicit": cut(explicit),
        "npu_kernels": sorted(set(schemas) - factories),
        "npu_meta": sorted(wheel["meta"] & set(schemas)),
        "schemas": dict(sorted(schemas.items())),
    }


def _explicit(name: str) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(name, "CompositeExplicitAutograd") or has(name, "CompositeExplicitAutogradNonFunctional")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two registries, a line each."""
    lines = []
    for key, values in new.items():
        before = old.get(key)
        if isinstance(values, list) and set(values) != set(before or []):
            gone, come = sorted(set(before or []) - set(values)), sorted(set(values) - set(before or []))
            lines.append(f"{key}: only in the file {gone[:8]}, only in the wheel {come[:8]}")
        elif isinstance(values, dict):
            other = before or {}
            lines += [f"{key}: {k}" for k in sorted(set(values) | set(other)) if values.get(k) != other.get(k)]
        elif key != "source" and values != before:
            lines.append(f"{key}: {before} -> {values}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--write", action="store_true", help="replace the file; without it, only compare")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the registries")
    args = parser.parse_args()
    wheel = read_wheel(args.wheel)
    running = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    if running != ".".join(wheel["torch"].split(".")[:2]):
        sys.exit(f"this wheel is for PyTorch {wheel['torch']}, and {torch.__version__} is running: install that one")
    new = registry(wheel)
    file = args.data / f"torch-npu-{running}.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    new["other_kernels"] = old.get("other_kernels", [])
    lines = differences(old, new)
    print("\n".join(lines) or f"{file.name} equals the wheel")
    if args.write:
        file.write_text(json.dumps(new, indent=0) + "\n")
        print(f"wrote {file}")
    elif lines:
        sys.exit(1)


if __name__ == "__main__":
    main()
