"""Puts the emulated NPU where PyTorch and the package look for a real one, and takes it away again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any
from unittest import mock

import torch
from fake_torch_npu import FakeNpu
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from emulated_npu import graphs
from emulated_npu.emulator import Emulator
from emulated_npu.wheel import contract, modules
from surefoot.analyze.registry import Registry, load
from surefoot.serve.worker import EngineWorker

FREE, TOTAL = 8 << 30, 64 << 30


class _Module:
    """`torch.npu` as PyTorch's own code asks it."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass


@functools.cache
def _register() -> None:
    """`npu` as PyTorch's PrivateUse1 device. Once per process: PyTorch cannot forget a device."""
    _setup_privateuseone_for_python_backend("npu", _Module())


class _Inline(Executor):
    """Does the work where it is submitted: what PyTorch calls a mode, and so the emulator, belongs to one thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _in_workers(emulator: Emulator) -> contextlib.AbstractContextManager:
    """A server's inference thread is on this machine, too."""
    plain = EngineWorker._main

    def main(worker: EngineWorker, load: Callable[[], Any]) -> None:
        with torch.inference_mode(), emulator:
            plain(worker, load)

    return mock.patch.object(EngineWorker, "_main", main)


@contextlib.contextmanager
def machine(release: str = "2.13.0", registry: Registry | None = None) -> Iterator[Emulator]:
    """A machine with one Ascend 910B3 and this release of torch_npu."""
    _register()
    held = contract(release)
    library = torch.library.Library("npu", "DEF")
    for schema in held.schemas.values():
        with contextlib.suppress(RuntimeError):  # a type that this PyTorch does not have
            library.define(schema)
    fake = FakeNpu()
    fake.npu.mem_get_info = lambda i: (FREE, TOTAL)
    fake.npu.memory_allocated = fake.npu.memory_reserved = lambda i: 0
    graphs.add_to(fake.npu)
    # `torch_npu.npu_rms_norm` is the dispatcher's npu::npu_rms_norm.
    fake.__dict__["__getattr__"] = lambda name: getattr(torch.ops.npu, name)
    emulator = Emulator(held, registry or load())
    inline = mock.patch("surefoot.weights.load.workers", lambda: contextlib.nullcontext(_Inline()))
    try:
        # NOTE: all tensors are inference tensors, because a view of another kind would want a version counter.
        with modules({"torch_npu": fake}), inline, _in_workers(emulator), torch.inference_mode(), emulator:
            yield emulator
    finally:
        library._destroy()
