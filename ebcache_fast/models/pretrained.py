"""Transformers of diffusers from folders on the disk."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.weights_file import dtype_of

_INDEX, _SCHEDULER = "model_index.json", Path("scheduler") / "scheduler_config.json"
_CONFIG = "config.json"


def load_pretrained(folder: str | os.PathLike[str], **options: Any) -> nn.Module:
    """The transformer that diffusers' ``save_pretrained`` wrote to ``folder``, alone or in its pipeline; in eval mode.

    Nothing is downloaded, and no code of the folder is run. options: as diffusers' ``from_pretrained`` takes them, such
    as ``torch_dtype``. Raises InputError where diffusers is not installed, or the folder holds no such model.
    """
    diffusers = _diffusers()
    found = _transformer_of(folder)
    if found is None:
        raise InputError(f"{folder} has no {_CONFIG}, nor has its transformer/; pass a folder of save_pretrained")
    try:
        name = json.loads((found / _CONFIG).read_text(encoding="utf-8"))["_class_name"]
        kind = getattr(diffusers, name)  # Transformer2DModel too, as older folders call what has classes of its own now
        model = kind.from_pretrained(found, local_files_only=True, **options)
    except Exception as error:  # whatever a damaged file makes of its readers
        raise _unreadable(found, error) from error
    return cast(nn.Module, model.eval())


def stored_dtype(folder: str | os.PathLike[str]) -> torch.dtype:
    """The dtype that a transformer of ``folder`` was saved in, by its safetensors; float32 where there are none."""
    found = _transformer_of(folder)
    weights: list[Tensor] = []
    for path in [] if found is None else sorted(found.glob("*.safetensors")):
        with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:  # whoever loads them will say
            weights += [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    return dtype_of(weights)


def _transformer_of(folder: str | os.PathLike[str]) -> Path | None:
    """Folder of the transformer's files: the folder itself, or that of a pipeline's part; None if neither has any."""
    return next((path for path in (Path(folder), Path(folder) / "transformer") if (path / _CONFIG).is_file()), None)


def load_scheduler(folder: str | os.PathLike[str]) -> Any:
    """The scheduler of the pipeline that ``folder`` is of, the pipeline's own folder or one in it; None without one.

    Raises InputError where diffusers is not installed, or the pipeline's scheduler can't be read.
    """
    here = Path(folder).resolve()
    pipe = next(
        (path for path in (here, here.parent) if (path / _INDEX).is_file() or (path / _SCHEDULER).is_file()), None
    )
    if pipe is None:
        return None
    diffusers = _diffusers()
    config = pipe / _SCHEDULER
    try:
        kind = getattr(diffusers, json.loads(config.read_text(encoding="utf-8"))["_class_name"])
        return kind.from_pretrained(config.parent, local_files_only=True)
    except Exception as error:  # whatever a damaged file makes of its readers
        raise _unreadable(config, error) from error


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise InputError("diffusers is not installed; pip install 'ebcache-fast[diffusers]'") from error
    return diffusers


def _unreadable(path: Path, error: Exception) -> InputError:
    first = (str(error).splitlines() or [""])[0]
    return InputError(f"{path} can't be loaded ({type(error).__name__}: {first}); save it again")
