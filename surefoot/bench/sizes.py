"""Memory, capacity, and how near a step comes to the peak of the chip. What is not known stays None.

MFU and MBU count what one cannot avoid: 2 FLOPs per weight of the linear layers and token, and for a decode step the
bytes of the weights and of the keys and values read once. Attention's own FLOPs and recurrent states are left out, so
both are lower bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from surefoot.device import Device


@dataclass(frozen=True)
class Work:
    """Weights of linear layers (body: per token, head: per row of logits); bytes read per step and cached token."""

    body: int
    head: int
    weight_bytes: int
    kv_bytes_per_token: float | None

    def prefill_flops(self, batch: int, length: int) -> float:
        return 2.0 * batch * (self.body * length + self.head)

    def decode_flops(self, batch: int) -> float:
        return 2.0 * batch * (self.body + self.head)

    def decode_bytes(self, batch: int, context: float) -> float | None:
        if self.kv_bytes_per_token is None:
            return None
        return self.weight_bytes + batch * context * self.kv_bytes_per_token


def work_of(model: nn.Module, info: dict[str, Any]) -> Work:
    """Count a model's linear layers; works for ours and for transformers'."""
    body = head = 0
    for name, module in model.named_modules():
        inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if isinstance(inputs, int) and isinstance(outputs, int):
            if name.endswith("lm_head"):
                head = inputs * outputs
            else:
                body += inputs * outputs
    return Work(body, head, _read_bytes(model), _kv_bytes_per_token(info))


def _read_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers that every step reads: all but an embedding that is not the head as well."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    head = getattr(getattr(model, "lm_head", None), "weight", None)
    shared = None if head is None else head.data_ptr()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        looked_up = name.endswith("embed_tokens") or hasattr(module, "num_embeddings")
        if looked_up and weight is not None and weight.data_ptr() != shared:
            tensors.pop(weight.data_ptr(), None)
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _kv_bytes_per_token(info: dict[str, Any]) -> float | None:
    if not info.get("num_blocks"):
        return None
    return info["kv_cache_bytes"] / (info["num_blocks"] * info["block_size"])


Peaks = Callable[[str], "dict[str, Any]"]  # dtype or scheme -> flops_per_s, bytes_per_s, source


def peaks(device: Device, info: dict[str, Any], calibrated: Peaks | None = None) -> dict[str, Any]:
    """Peak FLOP/s in what the linear layers compute in, and bytes/s, with their source: a calibration's, else the
    chip's published ones."""
    scheme, dtype = (info.get("quant") or {}).get("scheme"), str(info.get("dtype"))
    if calibrated is not None:
        return calibrated(scheme or dtype)
    known = device.capabilities
    return {
        "flops_per_s": known.peak_flops.get("int8" if scheme in ("w8a8", "w4a8") else dtype),
        "bytes_per_s": known.memory_bandwidth,
        "source": known.source or "unknown for this chip: `surefoot calibrate` measures them",
    }


def share(amount: float | None, seconds: float | None, peak: float | None) -> float | None:
    """amount / seconds as a share of the peak; None where anything is unknown."""
    return amount / seconds / peak if amount and seconds and peak else None


# ---- memory


def capacity(info: dict[str, Any], lengths: list[int]) -> dict[str, Any] | None:
    """What the KV pages hold: tokens, and whole requests of each length (prompt plus output). None: not known."""
    if not info.get("num_blocks"):
        return None
    pages, size = info["num_blocks"] - info.get("num_dummy_blocks", 1), info["block_size"]
    return {
        "kv_tokens": pages * size,
        "requests_of_length": {str(n): pages // -(-n // size) for n in sorted(set(lengths))},
        "max_num_seqs": info["max_num_seqs"],
        "note": "requests by KV pages alone; at most max_num_seqs run at once",
    }


class MemoryWatch:
    """Most memory that was in use: by this process during a point, and on the device between passes as its driver says.

    NOTE: a CPU counts a page of the KV cache when it is first written, so its peak may be below what is allocated.
    """

    def __init__(self, device: Device):
        self.device, self.highest, self.peak = device, 0, device.peak_memory() or 0

    def look(self) -> int | None:
        """Bytes in use on the device now; None on a CPU, whose memory belongs to others too."""
        if self.device.type == "cpu":
            return None
        free, total = self.device.memory()
        self.highest = max(self.highest, total - free)
        return total - free

    def begin(self) -> None:
        """A point begins."""
        self.device.reset_peak_memory()

    def end(self) -> int | None:
        """Most bytes that this process held on the device since `begin`."""
        found = self.device.peak_memory()
        self.peak = max(self.peak, found or 0)
        return found

    def result(self) -> dict[str, Any]:
        return {"device_highest_bytes": self.highest or None, "peak_bytes": self.peak or None, "peak_of": self._what()}

    def _what(self) -> str:
        return (
            "resident memory of the process" if self.device.type == "cpu" else "tensors of this process on the device"
        )
