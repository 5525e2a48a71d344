"""Chips as data: what a chip can do, each number with its source. None (or a missing key) means unknown, never zero.

Code asks for capabilities and never for names; the only place that looks at a chip's name or SoC number is `find`.
Units: FLOP/s (dense, a multiply-add counts 2), bytes/s, tokens. Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

ALL_DTYPES = ("float32", "bfloat16", "float16")
NO_BF16 = ("float32", "float16")


@dataclass(frozen=True)
class Capabilities:
    """What a device can do. The engine sizes itself by this.

    dtypes: model dtypes it computes in.
    block_size: default tokens per KV page.  block_alignment: a page size must be a multiple of this.
    graph: kind of captured graph ("cuda", "npu"), None where steps always run eagerly.
    peak_flops: dense peak by dtype name.  memory_bandwidth: bytes/s.  source: where those two come from.
    """

    dtypes: tuple[str, ...] = ALL_DTYPES
    block_size: int = 16
    block_alignment: int = 1
    graph: str | None = None
    peak_flops: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    memory_bandwidth: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Chip:
    """One row: CUDA matches by a part of the device name, NPU by a range of SoC numbers (both ends included)."""

    name: str
    device: str
    match_name: str | None = None
    match_soc: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = ALL_DTYPES
    peak_flops: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    memory_bandwidth: float | None = None
    source: str = ""

    def matches(self, device: str, name: str, soc: int | None) -> bool:
        if device != self.device:
            return False
        if self.match_soc is not None:
            return soc is not None and self.match_soc[0] <= soc <= self.match_soc[1]
        return self.match_name is not None and self.match_name.lower() in name.lower()


# torch_npu 2.13.0, torch_npu/csrc/core/npu/NpuVariables.h (enum SocVersion) and IsBF16Supported: bf16 from 910B1 on.
_SOC = "SoC number and bf16: torch_npu 2.13.0 (NpuVariables.h); peaks: Huawei publishes none for the bare chip"


def _ascend(name: str, first: int, last: int | None = None, dtypes: tuple[str, ...] = ALL_DTYPES) -> Chip:
    return Chip(name, "npu", match_soc=(first, last or first), dtypes=dtypes, source=_SOC)


CHIPS: tuple[Chip, ...] = (
    Chip(
        "NVIDIA H200 (SXM)",
        "cuda",
        match_name="H200",
        peak_flops={"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "int8": 1979e12},
        memory_bandwidth=4.8e12,
        source="NVIDIA H200 datasheet, without sparsity",
    ),
    Chip(
        "NVIDIA H100 (SXM)",
        "cuda",
        match_name="H100 80GB HBM3",
        peak_flops={"bfloat16": 989e12, "float16": 989e12, "float32": 67e12, "int8": 1979e12},
        memory_bandwidth=3.35e12,
        source="NVIDIA H100 datasheet, without sparsity",
    ),
    Chip(
        "NVIDIA A100 80 GB (SXM)",
        "cuda",
        match_name="A100-SXM4-80GB",
        peak_flops={"bfloat16": 312e12, "float16": 312e12, "float32": 19.5e12, "int8": 624e12},
        memory_bandwidth=2.039e12,
        source="NVIDIA A100 datasheet, without sparsity",
    ),
    _ascend("Ascend 910A", 100, 104, NO_BF16),
    _ascend("Ascend 310P", 200, 205, NO_BF16),
    _ascend("Ascend 910B1 (A2)", 220),
    _ascend("Ascend 910B2 (A2)", 221),
    _ascend("Ascend 910B2C (A2)", 222),
    _ascend("Ascend 910B3 (A2)", 223),
    _ascend("Ascend 910B4 (A2)", 224),
    _ascend("Ascend 910B4-1 (A2)", 225),
    _ascend("Ascend 310B", 240, 243, NO_BF16),
    _ascend("Ascend 910_93 (A3)", 250, 256),
    _ascend("Ascend 950", 260),
)


def find(device: str, name: str = "", soc: int | None = None) -> Chip | None:
    """The row of a chip, or None for a chip that nobody has entered yet."""
    return next((chip for chip in CHIPS if chip.matches(device, name, soc)), None)
