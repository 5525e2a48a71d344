"""Large host tensors ask for pages of 2 MiB, and get them where the system gives them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from surefoot.device import hugepages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("shape", [(3,), (0, 4), (1024, 8192)])
def test_a_tensor_like_any_other(shape):
    tensor = hugepages.empty(shape, torch.bfloat16, "cpu").fill_(2)
    assert tensor.shape == torch.Size(shape) and tensor.dtype == torch.bfloat16 and bool((tensor == 2).all())
    assert hugepages.empty(shape, torch.int8, "meta").device.type == "meta"


def test_the_system_is_asked_before_the_memory_is_touched():
    if not ENABLED.is_file() or "[never]" in ENABLED.read_text():
        pytest.skip("this system has no transparent huge pages")
    tensor = hugepages.empty((32 << 20,), torch.uint8)
    address = tensor.data_ptr() + (16 << 20)
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        begin, end = (int(x, 16) for x in block.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            assert " hg" in block[block.index("VmFlags") :]


def test_without_madvise_nothing_changes(monkeypatch):
    monkeypatch.setattr(hugepages, "_madvise", lambda: None)
    assert hugepages.empty((8 << 20,), torch.uint8).numel() == 8 << 20
