"""A model reference to a local folder: a path, `canary-…`, `hf:org/name[@revision]`, `modelscope:org/name[@revision]`.

huggingface_hub and modelscope download (with progress bars, resume and their own caches, honouring HF_HOME,
HF_ENDPOINT, MODELSCOPE_CACHE); a copy that is already in their cache is used when the network is not there.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from surefoot import canaries
from surefoot.core.errors import ModelError, OfflineError, SurefootError
from surefoot.weights.messages import one_line, some

Progress = Callable[[str, "float | None"], None]
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
CONFIG_PATTERNS = ["*.json"]
# Model files lie at the top; folders and consolidated.* hold the same weights once more in another format.
IGNORED = ["*/*", "consolidated*"]
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUBS = {"hf": "Hugging Face", "modelscope": "ModelScope"}


def resolve(
    model_ref: str | Path, *, revision: str | None = None, progress: Progress | None = None, config_only: bool = False
) -> Path:
    """The folder that `model_ref` means, downloaded if need be; it has a config.json (`config_only`: little else)."""
    ref = str(model_ref).strip()
    if not ref:
        raise ModelError(
            "the model reference is empty: give a folder, canary-llama, hf:org/name or modelscope:org/name"
        )
    hub, colon, repo = ref.partition(":")
    if colon and hub in HUBS:
        patterns = CONFIG_PATTERNS if config_only else PATTERNS
        return _check_folder(_download(hub, repo, revision, progress, patterns), ref)
    if revision:
        raise ModelError(f"a revision ({revision}) can only be chosen for hf:… and modelscope:… models, not for {ref}")
    if ref.startswith("canary-") and "/" not in ref:
        if ref not in canaries.CANARIES:
            raise ModelError(f"no canary is called {ref}; there are {', '.join(canaries.CANARIES)}")
        return canaries.path(ref)
    return _check_folder(_local(ref), ref)


def _local(ref: str) -> Path:
    path = Path(ref).expanduser()
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except OSError as error:
        raise ModelError(f"cannot look at {one_line(ref)}: {error.strerror or error}") from None
    if exists:
        what = "a GGUF file" if path.suffix == ".gguf" else "a file"
        raise ModelError(
            f"{ref} is {what}: give the folder of a Hugging Face format model (config.json, *.safetensors)"
        )
    if url := re.match(
        r"https?://(?:www\.)?(huggingface\.co|hf-mirror\.com|modelscope\.cn/models)/([\w.-]+/[\w.-]+)", ref
    ):
        hub = "modelscope" if "modelscope" in url[1] else "hf"
        raise ModelError(f"{ref} is a web address: write {hub}:{url[2]}")
    message = f"no such folder: {one_line(ref)}"
    if REPO_ID.fullmatch(ref) and not ref.startswith("."):
        message += f"; to download it write hf:{ref} or modelscope:{ref}"
    raise ModelError(message)


def _check_folder(folder: Path, ref: str) -> Path:
    if (folder / "config.json").is_file():
        return folder
    # The folder above the model's, or a hub cache's models--org--name.
    inner = sorted(p.parent for pattern in ("*", "snapshots/*") for p in folder.glob(f"{pattern}/config.json"))
    hint = f"; did you mean {some([str(p) for p in inner], 3)}?" if inner else ""
    if not inner and any(folder.glob("*.gguf")):
        hint = "; it holds GGUF, which is not supported: get the model's Hugging Face (safetensors) version"
    name = str(folder) if str(folder) == ref else f"{ref} ({folder})"
    raise ModelError(f"not a model folder: {name} has no config.json{hint}")


def _download(hub: str, repo: str, revision: str | None, progress: Progress | None, patterns: list[str]) -> Path:
    repo, at, wanted = repo.partition("@")
    if at and (not wanted or (revision and revision != wanted)):
        raise ModelError(f"contradicting revisions of {hub}:{repo}: @{wanted} and {revision!r}; give one")
    revision = wanted or revision
    if not REPO_ID.fullmatch(repo):
        raise ModelError(f"{hub}:{repo} is not a model name: write {hub}:org/name or {hub}:org/name@revision")
    if progress:
        progress(f"fetching {repo} from {HUBS[hub]}", None)
    fetch = _hf_snapshot() if hub == "hf" else _modelscope_snapshot(repo)
    options: dict[str, Any] = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": IGNORED}
    try:
        return Path(fetch(repo, **options))
    except Exception as error:  # each library and version has its own exceptions; all mean: not fetched
        with contextlib.suppress(Exception):
            folder = Path(fetch(repo, local_files_only=True, **options))
            if progress:
                progress(f"{HUBS[hub]} is out of reach: using the copy in the cache", None)
            return folder
        raise _explain(error, hub, repo, revision) from None


def _hf_snapshot() -> Callable[..., str]:
    from huggingface_hub import snapshot_download

    return snapshot_download


def _modelscope_snapshot(repo: str) -> Callable[..., str]:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise OfflineError(
            f'modelscope:{repo} needs the modelscope library: pip install "surefoot[modelscope]", or use hf:{repo}'
        ) from None
    return snapshot_download


def _explain(error: Exception, hub: str, repo: str, revision: str | None) -> SurefootError:
    """One line that names the ways out. By class name, because the classes moved between library versions."""
    kinds = {cls.__name__ for e in (error, error.__cause__) for cls in type(e).__mro__}
    other = "modelscope" if hub == "hf" else "hf"
    ref = f"{hub}:{repo}" + (f"@{revision}" if revision else "")
    detail = one_line(f"{type(error).__name__}: {error}", 160)
    if kinds & {"GatedRepoError", "AuthenticationError", "PermissionDeniedError"}:
        login = "hf auth login" if hub == "hf" else "modelscope login"
        return ModelError(f"{ref} is gated: accept its licence on {HUBS[hub]} and log in ({login}), then try again")
    if "RevisionNotFoundError" in kinds:
        return ModelError(f"{HUBS[hub]} has no revision {revision!r} of {repo}: leave @{revision} out or name another")
    if kinds & {"RepositoryNotFoundError", "NotExistError"}:
        return ModelError(
            f"{HUBS[hub]} has no model {repo}, or it is private: check the spelling, log in, or try {other}:{repo}"
        )
    if kinds & {"HFValidationError", "InvalidParameter"}:
        return ModelError(f"{ref} is not a model name that {HUBS[hub]} accepts ({detail})")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return ModelError(f"cannot store {ref} in the cache {_cache_folder(hub)}: {error.strerror}")
    mirror = "set HF_ENDPOINT to a mirror (https://hf-mirror.com), " if hub == "hf" else ""
    return OfflineError(
        f"cannot download {ref} ({detail}). Ways out: {mirror}try {other}:{repo}, fill the cache {_cache_folder(hub)} "
        f"on a machine with network and copy it, or copy the model folder here and give its path"
    )


def _cache_folder(hub: str) -> str:
    if hub == "hf":
        from huggingface_hub.constants import HF_HUB_CACHE

        return HF_HUB_CACHE
    try:
        from modelscope.utils.file_utils import get_modelscope_cache_dir

        return str(get_modelscope_cache_dir())
    except Exception:  # another version keeps it elsewhere
        return "~/.cache/modelscope"
