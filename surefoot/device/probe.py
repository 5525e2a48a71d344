"""Ask this machine's PyTorch what it can do, in a process of its own.

With torch_npu installed and CANN not found, even `import torch` fails, and a broken driver may hang or crash the
process that touches it. A doctor must outlive its patients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

CORE = """
import json, sys
facts = {}
import torch
facts["torch"] = torch.__version__
facts["cuda_build"] = torch.version.cuda
facts["threads"] = torch.get_num_threads()
facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
"""
PARTS = {
    "cpu": """
import warnings
warnings.simplefilter("ignore")
from surefoot.ops.cpu import instruction_set
facts["kernels"] = instruction_set()
""",
    "cuda": """
facts["cuda_devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
""",
    "npu": """
import torch_npu
facts["npu_devices"] = [torch_npu.npu.get_device_name(i) for i in range(torch_npu.npu.device_count())]
facts["soc"] = int(torch_npu.npu.get_soc_version()) if facts["npu_devices"] else None
""",
}
END = "\nprint('FACTS ' + json.dumps(facts))\n"


def probe(part: str, timeout: float = 120.0) -> dict[str, Any]:
    """Facts about PyTorch and "cpu", "cuda" or "npu"; {"error": one line} where they cannot be had."""
    # torch_npu is imported by `import torch` itself unless told otherwise; only its own part wants it.
    environment = os.environ | ({} if part == "npu" else {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})
    try:
        done = subprocess.run(
            [sys.executable, "-c", CORE + PARTS[part] + END],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout:.0f} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith("FACTS "):
            return json.loads(line.removeprefix("FACTS "))
    if done.returncode < 0:
        return {"error": f"the process died of signal {-done.returncode}"}
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
