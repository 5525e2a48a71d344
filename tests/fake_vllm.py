"""A stand-in for `vllm serve`: starts, logs and ends as the file `behaviour.json` beside it says.

The test copies this file to an executable named `vllm` whose first line names a Python. It answers /health, /v1/models
and /v1/completions, and has a child, as vLLM has its engine process; both write their ids to `pids`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = (
    "(EngineCore pid=1) INFO [core.py:1] Initializing a V1 LLM engine (v0.99.0) with config: model='x', "
    "dtype=torch.{dtype}, max_seq_len={length}, tensor_parallel_size={tp}, pipeline_parallel_size=1, "
    "quantization=None, enforce_eager={eager}, device_config={device}, seed=0, enable_prefix_caching=True"
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/health":
            self._answer({} if STATE["healthy"] else None)
        else:
            card = {"id": flag("--served-model-name"), "object": "model", "owned_by": "vllm", "max_model_len": 64}
            self._answer({"object": "list", "data": [card]})

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        if BEHAVIOUR.get("dies_when_asked"):
            print("torch.OutOfMemoryError: NPU out of memory", flush=True)
            os._exit(3)
        self._answer({"choices": [{"text": "yes", "finish_reason": "stop"}], "usage": {"prompt_tokens": 1}})

    def _answer(self, body):
        content = json.dumps(body or {}).encode()
        self.send_response(503 if body is None else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def flag(name, default=None):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


def main():
    (HERE / "argv.json").write_text(json.dumps([sys.argv[1:], {k: v for k, v in os.environ.items() if "VLLM" in k}]))
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (HERE / "pids").write_text(f"{os.getpid()} {child.pid}")
    if BEHAVIOUR.get("ignores_sigterm"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: (print("goodbye", flush=True), os._exit(0)))
    if line := BEHAVIOUR.get("dies_with"):
        print("INFO loading\n\x1b[31m" + line + "\x1b[0m\nfurther advice", flush=True)
        os._exit(1)
    told = {"dtype": flag("--dtype", "bfloat16"), "length": flag("--max-model-len", "64"), "device": "cpu"}
    told |= {"tp": flag("--tensor-parallel-size", "1"), "eager": "--enforce-eager" in sys.argv}
    told["dtype"] = "bfloat16" if told["dtype"] == "auto" else told["dtype"]
    print(CONFIG.format(**(told | BEHAVIOUR.get("reports", {}))), flush=True)
    server = ThreadingHTTPServer(("127.0.0.1", int(flag("--port"))), Handler)
    server.daemon_threads = True
    time.sleep(BEHAVIOUR.get("starts_after", 0))
    STATE["healthy"] = not BEHAVIOUR.get("never_healthy")
    server.serve_forever()


BEHAVIOUR = json.loads((HERE / "behaviour.json").read_text())
STATE = {"healthy": False}

if __name__ == "__main__":
    main()
