"""Weights as they stand in a file: read strictly, whatever a training script wrapped around them.

No file's code ever runs: ``.pt`` files are read with ``weights_only``.
"""

import warnings
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ebcache_fast.errors import InputError

# What training puts around the weights, the best first: a key of the file, or the beginning of every name, as
# torch.compile's _orig_mod and DistributedDataParallel's module are.
WRAPPERS = ("ema", "ema_model", "model", "state_dict", "module", "_orig_mod")
MOST_WRAPPERS = 8  # around one another; a file may even hold itself
COMPUTED_IN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

StateDict = dict[str, Tensor]
Metadata = Mapping[str, str]


def read_weights(path: Path) -> tuple[StateDict, Metadata]:
    """The weights, on the CPU and mapped rather than read where the format can, and the metadata."""
    reader = _READERS.get(path.suffix)
    if reader is None:
        suffixes = " or ".join(_READERS)
        raise InputError(f"{path}: expected the suffix {suffixes}, got {path.suffix!r}; rename it")
    try:
        content, metadata = reader(path)
    except Exception as error:  # foreign bytes make these parsers raise whatever they like
        # Torch hides the unpickler's reason behind a page of advice.
        reason = (error.__suppress_context__ and error.__context__) or error
        raise InputError(
            f"{path} can't be read ({first_line(reason)}); pass an undamaged checkpoint of weights alone"
        ) from None
    return _unwrapped(content, path), metadata


def dtype_of(weights: Iterable[Tensor]) -> torch.dtype:
    """The dtype of most elements, float32 where a model does not compute in it."""
    elements: dict[torch.dtype, int] = defaultdict(int)
    for weight in weights:
        elements[weight.dtype] += weight.numel()
    most = max(elements, key=elements.__getitem__, default=torch.float32)
    return most if most in COMPUTED_IN else torch.float32


def _read_safetensors(path: Path) -> tuple[object, Metadata]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_torch(path: Path) -> tuple[object, Metadata]:
    # The original's training script adds its argparse arguments: plain data.
    with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings(action="ignore"):
        mapped = zipfile.is_zipfile(path)  # else torch's format before 1.6, which can't be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), {}


_READERS: Mapping[str, Callable[[Path], tuple[object, Metadata]]] = {
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
}


def _unwrapped(content: object, path: Path) -> StateDict:
    """The state dict in a checkpoint's content; InputError unless it holds dense floating weights alone."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a state dict, got {_kind(content)}; pass a file that holds one")
    weights = content
    for _ in range(MOST_WRAPPERS):
        weights = _within_one_wrapper(weights)
    for name, value in weights.items():
        if not (isinstance(name, str) and _is_weight(value)):
            raise InputError(
                f"{path}: {shown(name)}: expected dense floating weights, got {_kind(value)}; "
                f"pass a state dict, plain or under one of {', '.join(WRAPPERS)}"
            )
    return dict(weights)


def _within_one_wrapper(weights: dict[Any, Any]) -> dict[Any, Any]:
    """Weights in the best wrapper, under a key of its own or in names that begin with its; all of them without one."""
    for wrapper in WRAPPERS:
        if isinstance(within := weights.get(wrapper), dict):
            return within
    begins = {name.partition(".")[0] if isinstance(name, str) and "." in name else "" for name in weights}
    if not begins or not begins.issubset(WRAPPERS):
        return weights
    best = f"{min(begins, key=WRAPPERS.index)}."
    return {name.removeprefix(best): value for name, value in weights.items() if name.startswith(best)}


def _is_weight(value: object) -> bool:
    """True if it is a dense floating tensor, with memory of its own for every element."""
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
        and not (value.is_nested or value.is_meta)
        and 0 < value.nbytes <= value.untyped_storage().nbytes()
    )


def _kind(value: object) -> str:
    """Name of what is there in the place of a weight, with its dtype and layout if it is a tensor."""
    name = type(value).__name__
    return f"a {name} ({value.dtype}, {value.layout})" if isinstance(value, Tensor) else f"a {name}"


def shown(name: object) -> str:
    """A file's key as it may stand in a message: on one line, not too long."""
    return f"{str(name)!r:.100}"


def first_line(error: BaseException) -> str:
    return f"{next(iter(str(error).splitlines()), type(error).__name__):.300}"
