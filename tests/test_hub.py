"""Model references: each kind finds its folder, and each way to fail gives one line that says what to do.

Downloads run the real huggingface_hub in a process of its own, against a small server that speaks the hub's protocol.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from surefoot import canaries
from surefoot.core.errors import ModelError, OfflineError, SurefootError
from surefoot.weights import hub

SHA = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"not really weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"unwanted",
    "consolidated.safetensors": b"unwanted",
    "original/params.json": b"unwanted",
    "README.md": b"unwanted",
}
WANTED = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}


def line(error: pytest.ExceptionInfo[SurefootError]) -> str:
    message = str(error.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def model_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_local_folder(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "org" / "name")
    assert hub.resolve(str(folder)) == folder
    assert hub.resolve(folder) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.resolve("~/org/name") == folder
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/name").resolve() == folder


@pytest.mark.parametrize("name", canaries.CANARIES)
def test_canaries(name):
    assert hub.resolve(name) == canaries.path(name)


def test_unknown_canary_names_the_known_ones():
    with pytest.raises(ModelError) as error:
        hub.resolve("canary-gpt")
    assert all(name in line(error) for name in canaries.CANARIES)


def test_what_is_no_model_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF")
    snapshot = model_folder(tmp_path / "models--org--name" / "snapshots" / SHA)
    cases = {
        "": r"reference is empty",
        "/no/such/place": r"^no such folder: /no/such/place$",
        "./org/name": r"^no such folder: \./org/name$",
        "org/name": r"^no such folder: org/name; to download it write hf:org/name or modelscope:org/name$",
        "https://huggingface.co/org/name/tree/main": r"write hf:org/name$",
        "https://modelscope.cn/models/org/name": r"write modelscope:org/name$",
        "empty": r"^not a model folder: empty has no config.json$",
        "gguf": r"^not a model folder: .*GGUF, which is not supported",
        "model.gguf": r"is a GGUF file: give the folder",
        "models--org--name": rf"did you mean \S*{snapshot.relative_to(tmp_path)}\?$",
        "x" * 5000: r"cannot look at x+…: File name too long$",
        "hf:": r"is not a model name: write hf:org/name",
        "hf:gpt2": r"hf:gpt2 is not a model name: write hf:org/name or hf:org/name@revision$",
        "hf:org/name@": r"contradicting revisions",
        "modelscope:a/b/c": r"modelscope:a/b/c is not a model name",
    }
    for ref, pattern in cases.items():
        with pytest.raises(ModelError) as error:
            hub.resolve(ref)
        assert re.search(pattern, line(error)), (ref, line(error))


def test_revision_must_make_sense(tmp_path):
    with pytest.raises(ModelError) as error:
        hub.resolve(model_folder(tmp_path / "m"), revision="v2")
    assert "v2" in line(error)
    with pytest.raises(ModelError) as error:
        hub.resolve("hf:org/name@v1", revision="v2")
    assert "contradicting revisions" in line(error)


def fake_modelscope(monkeypatch, snapshot_download):
    module = types.ModuleType("modelscope")
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)


def test_modelscope_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(OfflineError) as error:
        hub.resolve("modelscope:org/name")
    assert 'pip install "surefoot[modelscope]"' in line(error)


def test_modelscope_revision_and_offline_copy(tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "m")
    calls = []

    def snapshot_download(repo, local_files_only=False, **options):
        calls.append((repo, options["revision"], local_files_only))
        if not local_files_only:
            raise ConnectionError("[E1020] Connection failed\nby name resolution")
        return str(folder)

    fake_modelscope(monkeypatch, snapshot_download)
    said = []
    assert hub.resolve("modelscope:org/name@v1", progress=lambda text, _: said.append(text)) == folder
    assert calls == [("org/name", "v1", False), ("org/name", "v1", True)]
    assert "ModelScope" in said[0] and "copy in the cache" in said[1]


class RepositoryNotFoundError(OSError):
    pass


class GatedRepoError(RepositoryNotFoundError):
    pass


class RevisionNotFoundError(OSError):
    pass


class NotExistError(Exception):
    pass


def wrapped() -> Exception:
    """modelscope hides its own error behind one of requests."""
    error = OSError("404")
    error.__cause__ = NotExistError("no")
    return error


@pytest.mark.parametrize(
    ("raised", "kind", "pattern"),
    [
        (
            ConnectionError("refused\nby host"),
            OfflineError,
            r"refused by host\).*hf:org/name.*cache \S+.*give its path",
        ),
        (RuntimeError("who knows"), OfflineError, r"RuntimeError: who knows.*Ways out"),
        (GatedRepoError("401"), ModelError, r"is gated: accept its licence"),
        (RepositoryNotFoundError("404"), ModelError, r"has no model org/name.*try hf:org/name"),
        (wrapped(), ModelError, r"has no model org/name"),
        (RevisionNotFoundError("404"), ModelError, r"has no revision 'v9' of org/name"),
        (OSError(28, "No space left on device"), ModelError, r"cannot store .*No space left on device"),
    ],
)
def test_failed_downloads_name_the_ways_out(monkeypatch, raised, kind, pattern):
    def snapshot_download(*_, **__):
        raise raised

    fake_modelscope(monkeypatch, snapshot_download)
    with pytest.raises(kind) as error:
        hub.resolve("modelscope:org/name@v9")
    assert re.search(pattern, line(error)), line(error)


class FakeHub(BaseHTTPRequestHandler):
    """As much of huggingface.co as a snapshot download asks for."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/org/name/revision/"):
            if path.endswith("/gone"):
                return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in FILES]
            return self.answer(200, json.dumps({"id": "org/name", "sha": SHA, "siblings": siblings}).encode())
        if path.startswith("/api/models/org/name/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES.items()
            ]
            return self.answer(200, json.dumps(tree).encode())
        name = path.removeprefix(f"/org/name/resolve/{SHA}/")
        if name in FILES:
            etag = hashlib.sha1(FILES[name]).hexdigest()
            return self.answer(200, FILES[name], {"ETag": f'"{etag}"', "X-Repo-Commit": SHA})
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


RESOLVE = """
import sys
from surefoot.core.errors import SurefootError
from surefoot.weights.hub import resolve
for ref in sys.argv[1:]:
    try:
        print(resolve(ref))
    except SurefootError as error:
        print(type(error).__name__, error)
"""


def resolve_in_process(home: Path, endpoint: str, *refs: str) -> list[str]:
    env = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *refs], env=env, cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(refs), done.stdout
    return lines


def test_huggingface_download_then_offline(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        fetched, pinned, gone, absent = resolve_in_process(
            tmp_path, endpoint, "hf:org/name", f"hf:org/name@{SHA}", "hf:org/name@gone", "hf:org/other"
        )
    finally:
        server.shutdown()
        server.server_close()
    assert {str(p.relative_to(fetched)) for p in Path(fetched).rglob("*") if p.is_file()} == WANTED
    assert pinned == fetched
    assert gone.startswith("ModelError Hugging Face has no revision 'gone' of org/name")
    assert absent.startswith("ModelError Hugging Face has no model org/other")

    again, other = resolve_in_process(tmp_path, endpoint, "hf:org/name", "hf:org/other")  # nobody listens there now
    assert again == fetched
    assert other.startswith("OfflineError cannot download hf:org/other")
    assert "HF_ENDPOINT" in other and str(tmp_path / "hub") in other and "modelscope:org/other" in other
