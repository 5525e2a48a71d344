"""A torch_npu without CANN: the part of `torch_npu.npu` that the device seam calls, and a record of the calls."""

from __future__ import annotations

import contextlib
import types


class FakeNpu(types.ModuleType):
    """Two NPUs of one chip; `calls` lists what was set up and asked for, in order."""

    def __init__(self, soc: int = 223, name: str = "Ascend910B3", bf16: bool = True):
        super().__init__("torch_npu")
        self.__spec__ = types.SimpleNamespace()
        self.calls: list[tuple] = []
        record = self.calls.append

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.at = 0

            def record(self):
                record(("record",))
                self.at = len(calls)

            def synchronize(self):
                record(("event synchronize",))

            def elapsed_time(self, end):
                return 250.0 * (end.at - self.at)

        @contextlib.contextmanager
        def device(i):
            record(("enter", i))
            yield
            record(("leave", i))

        class Config:
            def __setattr__(self, key, value):
                record((key, value))

        calls = self.calls
        self.npu = types.SimpleNamespace(
            Event=Event,
            config=Config(),
            device=device,
            device_count=lambda: 2,
            empty_cache=lambda: record(("empty_cache",)),
            get_device_name=lambda i: f"{name} #{i}",
            get_soc_version=lambda: soc,
            is_available=lambda: True,
            is_bf16_supported=lambda: bf16,
            manual_seed=lambda n: record(("seed", n)),
            mem_get_info=lambda i: (10, 100),
            memory_allocated=lambda i: 4,
            memory_reserved=lambda i: 7,
            set_compile_mode=lambda jit_compile: record(("jit_compile", jit_compile)),
            set_device=lambda i: record(("set_device", i)),
            synchronize=lambda i: record(("synchronize", i)),
        )
