"""Chips as data: what a chip can do, each number with its source. None (or a missing key) means unknown, never zero.

Code asks for capabilities and never for names; the only place that looks at a chip's name or SoC number is `find`.
Units: FLOP/s (dense, a multiply-add counts 2), bytes/s, tokens. Torch-free.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

ALL_DTYPES = ("float32", "bfloat16", "float16")
NO_BF16 = ("float32", "float16")


@dataclass(frozen=True)
class Capabilities:
    """What a device can do. The engine sizes itself by this.

    dtypes: model dtypes it computes in.
    block_size: default tokens per KV page.  block_alignment: a page size must be a multiple of this.
    graph: kind of captured graph ("cuda", "npu"), None where steps always run eagerly.
    graph_streams: most streams that captured graphs may hold together, None for no such limit.
    peak_flops: dense peak by dtype name.  memory_bandwidth: bytes/s.  source: where those two come from.
    """

    dtypes: tuple[str, ...] = ALL_DTYPES
    block_size: int = 16
    block_alignment: int = 1
    graph: str | None = None
    graph_streams: int | None = None
    peak_flops: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    memory_bandwidth: float | None = None
    source: str | None = None


@dataclass(frozen=True)
class Chip:
    """One row: CUDA matches by a part of the device name, NPU by a range of SoC numbers (both ends included).

    aliases: what people call it, for `lookup`.  memory: bytes that the device has.  power: watts that it may draw.
    source: where peak_flops and memory_bandwidth come from; memory_source and power_source: the same for those two.
    """

    name: str
    device: str
    match_name: str | None = None
    match_soc: tuple[int, int] | None = None
    dtypes: tuple[str, ...] = ALL_DTYPES
    peak_flops: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    memory_bandwidth: float | None = None
    source: str = ""
    aliases: tuple[str, ...] = ()
    memory: int | None = None
    memory_source: str = ""
    power: float | None = None
    power_source: str = ""

    def matches(self, device: str, name: str, soc: int | None) -> bool:
        if device != self.device:
            return False
        if self.match_soc is not None:
            return soc is not None and self.match_soc[0] <= soc <= self.match_soc[1]
        return self.match_name is not None and self.match_name.lower() in name.lower()


# torch_npu 2.13.0, torch_npu/csrc/core/npu/NpuVariables.h (enum SocVersion) and IsBF16Supported: bf16 from 910B1 on.
_SOC = "SoC number and bf16: torch_npu 2.13.0 (NpuVariables.h)"
_NONE = f"{_SOC}; peaks: Huawei publishes none for the bare chip"
_CLOUDMATRIX = "Huawei CloudMatrix384 (arXiv 2506.12708): a package of two such dies has"
_950 = "keynote of Huawei Connect, Shanghai, 2025-09-18; it gives FP8 and FP4 peaks only (1 and 2 PFLOP/s)"
_NPU_SMI = "total of the HBM-Usage column of npu-smi"
GB, GIB = 10**9, 1 << 30


def _ascend(name: str, alias: str, first: int, last: int | None = None, **numbers: Any) -> Chip:
    return Chip(name, "npu", match_soc=(first, last or first), aliases=(alias,), **({"source": _NONE} | numbers))


def _nvidia(
    name: str, match: str, fp16: float, fp32: float, int8: float, bandwidth: float, memory: int, power: float
) -> Chip:
    alias = name.split()[1]
    sheet = f"NVIDIA {alias} datasheet"
    return Chip(
        name,
        "cuda",
        match_name=match,
        peak_flops={"bfloat16": fp16, "float16": fp16, "float32": fp32, "int8": int8},
        memory_bandwidth=bandwidth,
        source=f"{sheet}, without sparsity",
        aliases=(alias,),
        memory=memory,
        memory_source=sheet,
        power=power,
        power_source=f"{sheet}, maximum thermal design power",
    )


CHIPS: tuple[Chip, ...] = (
    _nvidia("NVIDIA H200 (SXM)", "H200", 989e12, 67e12, 1979e12, 4.8e12, 141 * GB, 700),
    _nvidia("NVIDIA H100 (SXM)", "H100 80GB HBM3", 989e12, 67e12, 1979e12, 3.35e12, 80 * GB, 700),
    _nvidia("NVIDIA A100 80 GB (SXM)", "A100-SXM4-80GB", 312e12, 19.5e12, 624e12, 2.039e12, 80 * GB, 400),
    _ascend(
        "Ascend 910A",
        "910A",
        100,
        104,
        dtypes=NO_BF16,
        peak_flops={"float16": 256e12, "int8": 512e12},
        memory_bandwidth=4 * 307.2e9,
        source=f"{_SOC}; peaks: Huawei's talk on DaVinci, Hot Chips 31 (2019); bandwidth: an upper limit, four"
        " HBM2 stacks (Linley Newsletter, 2019-10-08) of at most 307 GB/s each (JEDEC JESD235B)",
        memory=32 * GIB,
        memory_source=_NPU_SMI,
        power=350,
        power_source="Hot Chips 31 (2019); Huawei says that 310 W were measured",
    ),
    _ascend(
        "Ascend 310P",
        "310P",
        200,
        205,
        dtypes=NO_BF16,
        peak_flops={"float16": 70e12, "int8": 140e12},
        memory_bandwidth=204e9,
        source=f"{_SOC}; half of Huawei's Atlas 300I Duo, a card of two chips (product page: 140 TFLOP/s, 280 TOP/s,"
        " 408 GB/s)",
    ),
    _ascend("Ascend 910B1 (A2)", "910B1", 220, memory=64 * GIB, memory_source=_NPU_SMI),
    _ascend("Ascend 910B2 (A2)", "910B2", 221, memory=64 * GIB, memory_source=_NPU_SMI),
    _ascend("Ascend 910B2C (A2)", "910B2C", 222, memory=64 * GIB, memory_source=_NPU_SMI),
    _ascend("Ascend 910B3 (A2)", "910B3", 223, memory=64 * GIB, memory_source=_NPU_SMI),
    _ascend("Ascend 910B4 (A2)", "910B4", 224, memory=32 * GIB, memory_source=_NPU_SMI),
    _ascend("Ascend 910B4-1 (A2)", "910B4-1", 225, memory=64 * GIB, memory_source=_NPU_SMI),
    _ascend("Ascend 310B", "310B", 240, 243, dtypes=NO_BF16),
    # The device that software sees is one die: half a package of the 910C.
    _ascend(
        "Ascend 910_93 (A3)",
        "910C",
        250,
        256,
        peak_flops={"bfloat16": 376e12, "float16": 376e12, "int8": 752e12},
        memory_bandwidth=1.6e12,
        source=f"{_SOC}; {_CLOUDMATRIX} 752 TFLOP/s, 1,504 TOP/s and 3.2 TB/s",
        memory=64 * GIB,
        memory_source=f"{_CLOUDMATRIX} 128 GB",
    ),
    _ascend("Ascend 950", "950", 260, source=f"{_SOC}; which of 950PR and 950DT it is the number does not say"),
    Chip(
        "Ascend 950PR",
        "npu",
        memory_bandwidth=1.6e12,
        source=_950,
        aliases=("950PR",),
        memory=128 * GB,
        memory_source=_950,
    ),
    Chip(
        "Ascend 950DT",
        "npu",
        memory_bandwidth=4e12,
        source=_950,
        aliases=("950DT",),
        memory=144 * GB,
        memory_source=_950,
    ),
)


def find(device: str, name: str = "", soc: int | None = None) -> Chip | None:
    """The row of a chip, or None for a chip that nobody has entered yet."""
    return next((chip for chip in CHIPS if chip.matches(device, name, soc)), None)


def lookup(said: str) -> Chip | None:
    """The row that a person means by "H200", "910B4" or "Ascend 910C"; None if there is none, or several could be."""
    key = _key(said)
    return next((chip for chip in CHIPS if key in {_key(chip.name), *map(_key, chip.aliases)}), None)


def _key(name: str) -> str:
    plain = re.sub(r"\(.*?\)|nvidia|huawei|ascend|-?sxm\d?", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", plain)
