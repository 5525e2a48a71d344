"""What a device library has a kernel for: facts read from a release of torch_npu, shipped as data.

`tools/read_npu_registry.py` makes the data from the release's wheel (read, never imported) and the dispatcher of the
same PyTorch. An operator name is the dispatcher's, "aten::add.Tensor" or "npu::npu_rms_norm".
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from surefoot.core.errors import InputError

DATA = Path(__file__).parent / "data"
NEWEST = "2.13"


class Status(str, Enum):
    """How an operator runs. UNKNOWN is never read as supported."""

    FUSED = "native fused"
    NATIVE = "native"
    COMPOSITE = "composite"
    FALLBACK = "CPU fallback"
    UNSUPPORTED = "unsupported"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


# One kernel for what is many operators elsewhere; all of `npu::` and `atb::` are such kernels too.
FUSED_ATEN = frozenset({"aten::scaled_dot_product_attention", "aten::_addmm_activation", "aten::native_layer_norm"})


@dataclass(frozen=True)
class Registry:
    """aten operators by how the dispatcher serves them for NPU tensors; names in the first five sets lack "aten::".

    kernels: has an NPU kernel.  implicit, explicit: made of other operators (CompositeImplicit-, ExplicitAutograd).
    fallbacks: has a CPU kernel only.  other_kernels: NPU kernels of other namespaces, full names.
    schemas: the `npu::` operators.  npu_kernels, npu_meta: those of them with a kernel, with a Meta kernel.
    """

    version: str
    torch: str
    kernels: frozenset[str]
    fallbacks: frozenset[str]
    implicit: frozenset[str]
    explicit: frozenset[str]
    other_kernels: frozenset[str] = frozenset()
    npu_kernels: frozenset[str] = frozenset()
    npu_meta: frozenset[str] = frozenset()
    schemas: dict[str, str] = field(default_factory=dict)

    def status(self, name: str, torch_version: str | None = None) -> Status:
        """How this operator runs. torch_version: the running PyTorch, where it may know operators that this registry's
        PyTorch did not."""
        namespace, _, short = name.partition("::")
        if namespace == "aten":
            return self._aten(short, torch_version)
        if short in (self.npu_kernels if namespace == "npu" else ()) or name in self.other_kernels:
            return Status.FUSED if namespace in ("npu", "atb") else Status.NATIVE
        if namespace == "npu" and short in self.schemas:
            return Status.UNSUPPORTED
        return Status.UNKNOWN

    def _aten(self, short: str, torch_version: str | None) -> Status:
        if short in self.kernels:
            return Status.FUSED if f"aten::{short.partition('.')[0]}" in FUSED_ATEN else Status.NATIVE
        if short in self.implicit or short in self.explicit:
            return Status.COMPOSITE
        if short in self.fallbacks:
            return Status.FALLBACK
        # An operator that this very PyTorch knows and that is in no list has neither a CPU kernel nor parts.
        same = torch_version is not None and _minor(torch_version) == _minor(self.torch)
        return Status.UNSUPPORTED if same else Status.UNKNOWN


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def available() -> list[str]:
    """Releases of torch_npu whose registry is shipped."""
    return sorted(p.stem.removeprefix("torch-npu-") for p in DATA.glob("torch-npu-*.json"))


def load(version: str = NEWEST) -> Registry:
    """The registry of a torch_npu release, "2.13" or "2.13.0", or of a file that tools/read_npu_registry.py wrote."""
    file = Path(version) if version.endswith(".json") else DATA / f"torch-npu-{_minor(version)}.json"
    if not file.is_file():
        raise InputError(
            f"no registry of torch-npu {version}: there is {', '.join(available())}, "
            "and tools/read_npu_registry.py makes one from a wheel"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        sets = {key: frozenset(raw[key]) for key in raw if isinstance(raw[key], list)}
        return Registry(version=raw["version"], torch=raw["torch"], schemas=raw["schemas"], **sets)
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is not a registry: {error}") from None
