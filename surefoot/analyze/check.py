"""From a model reference to its operator coverage: resolve, choose whom to trace, trace, judge."""

from __future__ import annotations

from surefoot.analyze import registry
from surefoot.analyze.coverage import Coverage, cover
from surefoot.core.config import DTYPES
from surefoot.core.errors import InputError, ModelError

THROUGH = ("auto", "native", "transformers")


def check_operators(
    model: str,
    device: str = "npu",
    release: str = registry.NEWEST,
    *,
    through: str = "auto",
    dtype: str = "auto",
    batch: int = 8,
    prompt: int = 512,
) -> Coverage:
    """Which operators `model` needs on `device` and how they run there.

    release: of torch_npu.  through: native, transformers or auto.  batch, prompt: the largest to trace.
    """
    if device.partition(":")[0] != "npu":
        raise InputError(f"operators are known for npu only, not for {device}: there PyTorch itself is the registry")
    if through not in THROUGH:
        raise InputError(f"unknown --through {through!r}: choose one of {', '.join(THROUGH)}")
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    known = registry.load(release)

    from surefoot.models.registry import architecture_of
    from surefoot.weights.hub import resolve
    from surefoot.weights.jsonfile import read_json_object

    folder = resolve(model)
    config = read_json_object(folder / "config.json")
    if through == "auto":
        try:
            architecture_of(config)
            through = "native"
        except ModelError:
            through = "transformers"
    if through == "native":
        from surefoot.analyze.native import trace_engine

        return cover(
            model, "Surefoot's engine", known, trace_engine(config, known, dtype=dtype, batch=batch, prompt=prompt)
        )

    import transformers

    from surefoot.analyze.hf import trace_folder

    *tracers, incomplete = trace_folder(folder, known, dtype=dtype, batch=batch, prompt=prompt)
    return cover(model, f"transformers {transformers.__version__}", known, tracers, incomplete)
