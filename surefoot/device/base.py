"""The seam between Surefoot and a device library: the few things an engine asks of a device besides tensors.

A subclass imports its library inside its methods, so that importing this module costs nothing and a machine without the
library gets one clear line instead of an ImportError.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from surefoot.core.errors import DeviceError
from surefoot.device.chips import Capabilities
from surefoot.device.graphs import Graph

if TYPE_CHECKING:
    import torch


class Timer:
    """Times a block on the host clock: `with device.timer() as t: ...`, then `t.seconds`. Device timers override it."""

    def __init__(self) -> None:
        self._begin = self._end = 0.0

    def __enter__(self) -> Timer:
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Elapsed time of the block; waits for the device where it must."""
        return self._end - self._begin


class Device:
    """One device. `type` is "cpu", "cuda" or "npu"; `index` counts from 0; `capabilities` is the chip's row of data;
    `notes` says what about it is not as one would expect. `captures_on_use`: capturing a step computes it, too, so the
    first step of a size is the capture and nothing is captured before."""

    type: str = "cpu"
    captures_on_use: bool = False

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.capabilities = Capabilities()
        self.notes: list[str] = []

    def __str__(self) -> str:
        return self.type if self.type == "cpu" else f"{self.type}:{self.index}"

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device(str(self))

    def name(self) -> str:
        """The product's name, as the driver or the system reports it."""
        raise NotImplementedError

    def memory(self) -> tuple[int, int]:
        """(free, total) bytes that a process may use right now."""
        raise NotImplementedError

    def peak_memory(self) -> int | None:
        """Most bytes that this process held on the device since `reset_peak_memory`; None where nothing tells."""
        return None

    def reset_peak_memory(self) -> bool:
        """Count `peak_memory` anew. False: cannot be done, it counts from the start of the process."""
        return False

    def synchronize(self) -> None:
        """Wait until all work given to the device is done. A CPU has nothing to wait for."""

    def seed(self, n: int) -> None:
        """Seed the device's default random generator."""
        import torch

        torch.manual_seed(n)

    def empty_cache(self) -> None:
        """Give cached, unused memory back to the system."""

    def loading(self) -> contextlib.AbstractContextManager[None]:
        """Around the loading of an engine: memory may be handled otherwise meanwhile than afterwards."""
        return contextlib.nullcontext()

    def timer(self) -> Timer:
        """A context manager that times the work given to the device within it."""
        return Timer()

    def no_graphs(self) -> str | None:
        """Why this device cannot capture graphs; None if it can."""
        return None if self.capabilities.graph else f"{self} has no graphs"

    def graph_pool(self) -> Any:
        """Memory that several graphs share for what they need only while they run; None where there is none."""
        return None

    def capture(self, fn: Callable[[], Any], pool: Any = None) -> Graph:
        """Run `fn` once to warm up, then record its device calls into a graph."""
        raise DeviceError(f"{self.no_graphs()}: use --graph off")

    def supports(self, dtype: torch.dtype) -> bool:
        return _short(dtype) in self.capabilities.dtypes

    def default_dtype(self, checkpoint_dtype: torch.dtype) -> torch.dtype:
        """The dtype that "auto" means: the checkpoint's if the device computes in it, else float16, else float32."""
        import torch

        if self.supports(checkpoint_dtype):
            return checkpoint_dtype
        return torch.float16 if self.supports(torch.float16) else torch.float32

    def resolve_dtype(self, requested: str, checkpoint_dtype: torch.dtype) -> tuple[torch.dtype, str | None]:
        """The dtype in effect for a request such as "auto" or "bfloat16", and a note where it is not the obvious one.

        An explicit dtype that the device cannot compute in is refused: requested and effective never differ silently.
        """
        import torch

        if requested == "auto":
            chosen = self.default_dtype(checkpoint_dtype)
            if chosen == checkpoint_dtype:
                return chosen, None
            return (
                chosen,
                f"{self} does not compute in the checkpoint's {_short(checkpoint_dtype)}: using {_short(chosen)}",
            )
        dtype: torch.dtype = getattr(torch, requested)
        if not self.supports(dtype):
            known = ", ".join(self.capabilities.dtypes)
            raise DeviceError(
                f"{self} ({self.name()}) does not compute in {requested}: choose --dtype auto or one of {known}"
            )
        return dtype, None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
