"""The contract of a torch_npu release, read from its wheel as data: schemas and Meta kernels. torch_npu is never
imported.

The wheel's `op_plugin/meta/_meta_registrations.py` is executed with stand-ins for what it imports, and its kernels are
collected by name instead of being registered, so that two releases can be held side by side in one process.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

WHEELS = Path(__file__).parents[2] / "build" / "torch-npu"
RELEASES = ("2.13.0", "2.9.0.post2")

_YAML = "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml"
_META = "torch_npu/op_plugin/meta/_meta_registrations.py"
# Data types that exist in torch_npu only, by the numbers that its Meta kernels compare with.
_DTYPES = {
    "int4": 285,
    "hifloat8": 290,
    "float8_e5m2": 291,
    "float8_e4m3fn": 292,
    "float8_e8m0fnu": 293,
    "float4_e2m1fn_x2": 296,
    "float4_e1m2fn_x2": 297,
    "uint8": torch.uint8,
}


@dataclass(frozen=True)
class Contract:
    """schemas: "npu_rms_norm" -> its schema as the dispatcher holds it. meta: the release's Meta kernels by name."""

    release: str
    schemas: dict[str, str]
    meta: dict[str, Callable[..., Any]]


def find(release: str) -> Path | None:
    """The downloaded wheel of a release; None where `make test-npu` has not run."""
    return next(iter(sorted(WHEELS.glob(f"torch_npu-{release}-*.whl"))), None)


def missing() -> str | None:
    """Why tests on the emulated NPU cannot run, or None if they can."""
    absent = [release for release in RELEASES if find(release) is None]
    return (
        f"no wheel of torch-npu {' or '.join(absent)} in {WHEELS.relative_to(WHEELS.parents[1])}: make test-npu"
        if absent
        else None
    )


@functools.cache
def contract(release: str) -> Contract:
    path = find(release)
    if path is None:
        raise FileNotFoundError(f"no wheel of torch-npu {release} in {WHEELS}: run make test-npu")
    with zipfile.ZipFile(path) as archive:
        functions = yaml.safe_load(archive.read(_YAML))
        source = archive.read(_META).decode()
    return Contract(release, _schemas(functions), _meta_kernels(source, f"{path.name}/{_META}"))


def _schemas(functions: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for group in ("custom", "custom_autograd"):
        for entry in functions.get(group) or []:
            schema = entry["func"]
            # The code generator calls the tensor that a method belongs to "self"; the dispatcher says "input".
            schema = re.sub(r"(Tensor(?:\([a-z]!\))?\??) self\b", r"\1 input", schema)
            # Several outputs to write into come as one list.
            schema = (
                re.sub(
                    r"(?:Tensor\([a-z]!\) \w+, )+Tensor\([a-z]!\) \w+\) -> .*",
                    "Tensor[] out) -> (Tensor, Tensor)",
                    schema,
                )
                if ".out(" in schema
                else schema
            )
            found[schema.split("(")[0]] = schema
    return found


def _meta_kernels(source: str, name: str) -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}

    class Library:
        def __init__(self, namespace: str, kind: str, key: str = ""):
            self.namespace = namespace

    def impl(library: Library, op: str, *args: Any) -> Callable[..., Any]:
        def collect(kernel: Callable[..., Any]) -> Callable[..., Any]:
            if library.namespace == "npu":
                found[op] = kernel
            return kernel

        return collect

    module = types.ModuleType("meta_of_a_wheel")
    library = types.SimpleNamespace(Library=Library, impl=impl)
    with (
        modules(_stand_ins() | {"torch.library": library}),
        mock.patch.object(torch.ops, "npu", mock.MagicMock(), create=True),
        mock.patch("torch.fx.node.has_side_effect"),
    ):
        exec(compile(source, name, "exec"), module.__dict__)
    return found


@contextlib.contextmanager
def modules(stand_ins: dict[str, Any]) -> Iterator[None]:
    """Importable within the block. NOTE: mock.patch.dict would also forget what else is imported meanwhile."""
    before = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _stand_ins() -> dict[str, types.ModuleType]:
    """What the Meta kernels import from torch_npu: data types, error codes, versions."""

    def module(name: str, **names: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__dict__.update(names)
        return made

    class Codes:
        def __getattr__(self, name: str) -> str:
            return name

    error = module("torch_npu.utils._error_code", ErrCode=Codes(), ops_error=lambda code: f" [{code}]")
    return {
        "torch_npu": module("torch_npu", **_DTYPES),
        "torch_npu.utils": module("torch_npu.utils"),
        "torch_npu.utils._error_code": error,
        "torch_npu.npu": module("torch_npu.npu"),
        "torch_npu.npu.utils": module("torch_npu.npu.utils", get_cann_version=lambda *args: "9.1.0"),
        "torch_npu.npu._backends": module("torch_npu.npu._backends", get_soc_version=lambda: 223),
    }
