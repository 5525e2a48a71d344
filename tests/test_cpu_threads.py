"""The kernels' thread pool: sizes that change, several callers at once, forked processes; the bits stay the same."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from surefoot import ops
from surefoot.ops import cpu

pytestmark = pytest.mark.skipif(cpu.kernels is None, reason="the C++ kernels are not built")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def operands(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1024, generator=generator), torch.randn(512, 1024, generator=generator)


def test_the_pool_grows_and_shrinks(threads):
    x, w = operands()
    threads(1)
    wanted = ops.linear(x, w)
    for n in (2, 4, 1, 3, 2, 4):
        threads(n)
        assert all(torch.equal(ops.linear(x, w), wanted) for _ in range(20))


GROW = """
import os, torch
from surefoot.ops.cpu import kernels
counts = []
for n in (1, 2, 5):
    torch.set_num_threads(n)
    kernels.peak(0, 1000)
    counts.append(len(os.listdir("/proc/self/task")))
assert counts[1] > counts[0] and counts[2] >= counts[1] + 3, counts
"""


def test_several_python_threads_at_once(threads):
    """The GIL is released: concurrent calls share neither a loop of the pool nor scratch memory."""
    threads(3)
    cases = [operands(seed) for seed in range(4)]
    wanted, wrong = [ops.linear(*case) for case in cases], []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(50) if not torch.equal(ops.linear(*cases[i]), wanted[i]))

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


FORK = """
import os, torch
from surefoot.ops.cpu import kernels
torch.set_num_threads(3)
kernels.peak(0, 1000)
child = os.fork()
kernels.peak(0, 1000)
if child == 0:
    os._exit(0 if len(os.listdir("/proc/self/task")) >= 3 else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_set_num_threads_makes_workers():
    run(GROW)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs fork and /proc")
def test_a_forked_process_has_workers_of_its_own():
    run(FORK)
