"""tools/read_npu_registry.py on a wheel made for the test, and on a real one where it was downloaded."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tools import read_npu_registry as tool

RUNNING = ".".join(torch.__version__.split("+")[0].split(".")[:2])
CODEGEN = """
backend: NPU
supported:
- mm
- func: add.Tensor(Tensor self, Tensor other, *, Scalar alpha=1) -> Tensor
  impl_ns: op_api
- func: _coalesce(Tensor self) -> Tensor
  sparse: op_api
- not_an_operator_of_torch
custom:
- func: npu_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)
- func: npu_two.out(Tensor x, *, Tensor(a!) y, Tensor(b!) z) -> (Tensor(a!), Tensor(b!))
- dispatch:
    CompositeExplicitAutograd: npu_made
  func: npu_made(int[] size) -> Tensor
"""
META = 'm = Library("npu", "IMPL", "Meta")\n@impl(m, "npu_norm")\ndef norm_meta(x):\n    pass\n'
OTHER = """
m = Library("atb", "IMPL", "Meta")
@impl(m, "npu_two")
def f(x):
    pass
_npu_lib.define("npu_print(Tensor input) -> ()")
"""


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "torch_npu.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("torch_npu-9.9.dist-info/METADATA", f"Version: 9.9.0\nRequires-Dist: torch=={RUNNING}.0.*\n")
        z.writestr("torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml", CODEGEN)
        z.writestr("torch_npu/csrc/aten/npu_native_functions.yaml", "supported:\n- view\n")
        z.writestr("torch_npu/op_plugin/meta/_meta_registrations.py", META)
        z.writestr("torch_npu/npu/graphs.py", OTHER)
    return path


def test_what_a_wheel_says(wheel):
    found = tool.registry(tool.read_wheel(wheel))
    assert (found["version"], found["torch"]) == ("9.9.0", f"{RUNNING}.0")
    assert found["kernels"] == ["add.Tensor", "mm", "view"]
    assert "linear" in found["implicit"] and "mul.Tensor" in found["explicit"]
    # What has a kernel on the CPU, none in this wheel, and no parts.
    assert "where.self" in found["fallbacks"] and "mm" not in found["fallbacks"]
    assert found["schemas"] == {
        "npu_made": "npu_made(int[] size) -> Tensor",
        "npu_norm": "npu_norm(Tensor input, Tensor gamma, float epsilon=9.9999999999999995e-07) -> (Tensor, Tensor)",
        "npu_print": "npu_print(Tensor input) -> ()",
        "npu_two.out": "npu_two.out(Tensor x, *, Tensor[] out) -> (Tensor, Tensor)",
    }
    assert found["npu_kernels"] == ["npu_norm", "npu_print", "npu_two.out"] and found["npu_meta"] == ["npu_norm"]


def test_write_then_compare(wheel, tmp_path, monkeypatch, capsys):
    file = tmp_path / f"torch-npu-{RUNNING}.json"
    file.write_text(json.dumps({"other_kernels": ["atb::kept"]}))
    monkeypatch.setattr(sys, "argv", ["x", str(wheel), "--data", str(tmp_path), "--write"])
    tool.main()
    assert json.loads(file.read_text())["other_kernels"] == ["atb::kept"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["x", str(wheel), "--data", str(tmp_path)])
    tool.main()
    assert "equals the wheel" in capsys.readouterr().out
    changed = json.loads(file.read_text())
    changed["kernels"].remove("mm")
    file.write_text(json.dumps(changed))
    with pytest.raises(SystemExit):
        tool.main()
    assert "only in the wheel ['mm']" in capsys.readouterr().out


def test_another_pytorch_is_refused(wheel, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", str(wheel), "--data", str(tmp_path)])
    monkeypatch.setattr(tool.torch, "__version__", "1.0.0")
    with pytest.raises(SystemExit, match="is running: install that one"):
        tool.main()


def test_the_shipped_registry_equals_its_wheel(monkeypatch, capsys):
    wheels = sorted(Path("wheels").glob(f"torch_npu-{RUNNING}.*.whl"))
    if not wheels:
        pytest.skip(f"no wheel here: pip download --no-deps 'torch-npu=={RUNNING}.*' -d wheels")
    monkeypatch.setattr(sys, "argv", ["x", str(wheels[0])])
    tool.main()
    assert "equals the wheel" in capsys.readouterr().out
