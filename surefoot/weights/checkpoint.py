"""A model folder in Hugging Face format: config.json, generation_config.json and safetensors weights.

    checkpoint = Checkpoint(Path("Llama-3.2-1B"))
    checkpoint.names()["model.norm.weight"]      # TensorInfo(dtype, shape, file, ...) from the headers alone
    checkpoint.load("model.norm.weight")         # a view into the memory-mapped file
    checkpoint.read_into("model.norm.weight", t) # a copy into ordinary memory

Which tensor is in which file is checked when the headers are read: an index and its shards must say the same thing.

NOTE: engines hold copies (`read_into`), not views: touching a view after somebody truncated the file kills the process
with SIGBUS, and mapped pages count towards the process's memory on top of whatever they are converted to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from surefoot.core.errors import ModelError
from surefoot.weights.header import TensorInfo, read_header
from surefoot.weights.jsonfile import read_json_object
from surefoot.weights.messages import one_line, some
from surefoot.weights.reader import fill, flat_bytes, opened

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 16 << 20
FOREIGN = {
    ".gguf": "GGUF is not supported: get the model's safetensors version",
    ".bin": "convert them with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)",
    ".pt": "get the model's Hugging Face (safetensors) version",
    ".pth": "get the model's Hugging Face (safetensors) version",
}


class Checkpoint:
    """One model folder. Reading config.json happens here; weights are looked at when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise ModelError(f"not a model folder: {self.folder} has no config.json")
        self.config: dict[str, Any] = read_json_object(self.folder / "config.json")
        generation = self.folder / "generation_config.json"
        self.generation_config: dict[str, Any] = read_json_object(generation) if generation.is_file() else {}

    def names(self) -> dict[str, TensorInfo]:
        """All tensors, in the order in which they lie on disk (file by file, by offset)."""
        return self._tensors

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.names().values())

    @property
    def has_weights(self) -> bool:
        """Whether the folder holds safetensors at all (a folder without them can run on random weights)."""
        return (self.folder / INDEX).is_file() or bool(self._loose_files())

    @cached_property
    def _tensors(self) -> dict[str, TensorInfo]:
        index = None if (self.folder / "model.safetensors").is_file() else self._read_index()
        files = sorted(set(index.values())) if index else [path.name for path in self._loose_files()]
        if not files:
            raise ModelError(self._no_weights_message())
        absent = [file for file in files if not (self.folder / file).is_file()]
        if absent:
            raise ModelError(
                f"{len(absent)} of {len(files)} weight files listed in {INDEX} are absent from {self.folder}: "
                f"{some(absent)}; fetch them again"
            )
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_header(self.folder / file).items():
                if name in tensors:
                    raise ModelError(
                        f"tensor {name} is in both {tensors[name].file.name} and {file} of {self.folder}: "
                        "files of two checkpoints seem to be mixed; fetch the folder again"
                    )
                tensors[name] = info
        if index:
            self._check_index(index, tensors)
        return tensors

    def _loose_files(self) -> list[Path]:
        single = self.folder / "model.safetensors"
        if single.is_file():
            return [single]
        return sorted(p for p in self.folder.glob("*.safetensors") if not p.name.startswith("adapter_"))

    def _read_index(self) -> dict[str, str] | None:
        path = self.folder / INDEX
        if not path.is_file():
            return None
        weight_map = read_json_object(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{path} has no weight_map (tensor name -> file name): fetch it again")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelError(f"{path}: the file of tensor {name} must be a plain file name, not {file!r}")
        return weight_map

    def _check_index(self, index: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
        lacking = [f"{n} (in {file})" for n, file in index.items() if n not in tensors or tensors[n].file.name != file]
        if lacking:
            raise ModelError(
                f"{len(lacking)} tensors that {INDEX} lists are not in their file in {self.folder}: {some(lacking)}; "
                "index and weight files belong to different versions, fetch the folder again"
            )
        unlisted = [f"{name} (in {info.file.name})" for name, info in tensors.items() if name not in index]
        if unlisted:
            raise ModelError(
                f"{len(unlisted)} tensors in the weight files of {self.folder} are not in {INDEX}: {some(unlisted)}; "
                "index and weight files belong to different versions, fetch the folder again"
            )

    def _no_weights_message(self) -> str:
        message = f"no weights in {self.folder}: no *.safetensors file"
        for suffix, advice in FOREIGN.items():
            found = sorted(self.folder.glob(f"*{suffix}"))
            if found:
                return f"{message}, only {some([p.name for p in found], 2)}; {advice}"
        if (self.folder / "adapter_config.json").is_file():
            return f"{message} but a LoRA adapter; merge it into its base model first (peft: merge_and_unload)"
        return f"{message}; copy the weights there (run, serve and bench also take --random-weights SEED)"

    def info(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelError(f"{self.folder} has no tensor {name}") from None

    def load(self, name: str) -> torch.Tensor:
        """The tensor as a view into the mapped file: no memory of its own, pages are read when touched."""
        from safetensors import SafetensorError, safe_open

        info = self.info(name)
        try:
            with safe_open(info.file, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"cannot read {name} from {info.file}: {one_line(error)}") from None

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Copy the tensor's bytes into `out`: contiguous, on the CPU, same dtype and number of elements."""
        info = self.info(name)
        if out.dtype != info.dtype or out.nbytes != info.nbytes:
            raise ValueError(f"{name}: cannot read {info.dtype} {info.shape} into {out.dtype} {tuple(out.shape)}")
        with opened(info.file) as file:
            fill(file, info.offset, [flat_bytes(out)])

    def chunks(
        self, name: str, buffer: torch.Tensor, begin: int = 0, end: int | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index of first element, flat elements) of [begin, end), piece by piece.

        Each piece lives in `buffer` (uint8, CPU) until the next.
        """
        info = self.info(name)
        size = info.dtype.itemsize
        flat = buffer[: buffer.numel() // size * size].view(info.dtype)
        end = info.nbytes // size if end is None else end
        with opened(info.file) as file:
            for at in range(begin, end, flat.numel()):
                piece = flat[: min(flat.numel(), end - at)]
                fill(file, info.offset + at * size, [flat_bytes(piece)])
                yield at, piece

    def rows(self, name: str, max_bytes: int) -> Iterator[torch.Tensor]:
        """Yield a matrix as consecutive rows [n, in] of at most about `max_bytes`; each piece lives until the next."""
        info = self.info(name)
        row_bytes = info.shape[1] * info.dtype.itemsize
        buffer = torch.empty(max(1, max_bytes // row_bytes) * row_bytes, dtype=torch.uint8)
        for _, piece in self.chunks(name, buffer):
            yield piece.view(-1, info.shape[1])

    def digest(self, name: str) -> str:
        """SHA-256 over name, dtype, shape and bytes of one tensor: the same wherever and however it is stored."""
        info = self.info(name)
        sha = hashlib.sha256(f"{name}\0{info.dtype}\0{list(info.shape)}\0".encode())
        for _, piece in self.chunks(name, torch.empty(CHUNK_BYTES, dtype=torch.uint8)):
            sha.update(flat_bytes(piece))
        return sha.hexdigest()

    def content_digest(self) -> str:
        """SHA-256 over the digests of all tensors in the order of their names: sharding does not change it."""
        sha = hashlib.sha256()
        for name in sorted(self.names()):
            sha.update(bytes.fromhex(self.digest(name)))
        return sha.hexdigest()
