"""Weights on disk: the original's ``.pt`` checkpoints and safetensors, read strictly, written whole.

No file's code ever runs: ``.pt`` files are read with ``weights_only``. A file that does not fit is an
InputError before anything is changed.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ebcache_fast.errors import InputError
from ebcache_fast.models.modules import DiT
from ebcache_fast.models.weights_file import Metadata, StateDict, dtype_of, first_line, read_weights, shown
from ebcache_fast.plan.files import replacing


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a checkpoint's weights into ``model``, converted to its dtype.

    path: a ``.pt`` or ``.pth`` with a state dict, or a ``.safetensors``. What training wraps around it is taken off: a
    key such as ``"ema"`` or ``"state_dict"``, and the ``module.`` or ``_orig_mod.`` that DistributedDataParallel and
    torch.compile put before every name. Keys and shapes must equal the model's.

    Raises InputError, and leaves the model as it was, for a file that can't be read, holds anything but dense
    floating weights, or is another model's; the message names the first key that differs.
    """
    weights, _ = read_weights(Path(path))
    _check(weights, model.state_dict(), path)
    model.load_state_dict(weights)


def open_checkpoint(
    make: Callable[[], nn.Module],
    path: str | os.PathLike[str],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model that ``make`` makes, on ``device`` and in evaluation mode, with a checkpoint's weights.

    In ``dtype``; None means that of most of the weights, float32 where nothing is computed in it. Raises InputError as
    `load_checkpoint` does, before any memory is taken.
    """
    with torch.device("meta"):  # no time is spent on values that the file will replace
        model = make()
    weights, _ = read_weights(Path(path))
    _check(weights, model.state_dict(), path)
    model.to(dtype or dtype_of(weights.values())).to_empty(device=device)
    model.load_state_dict(weights)
    return model.eval()


def load_dit(path: str | os.PathLike[str], num_heads: int | None = None) -> DiT:
    """The DiT that a checkpoint is of, in evaluation mode, torch's default dtype and on the default device.

    Its sizes are read from the shapes. ``num_heads`` leaves no trace in them: files of `save_weights` say it,
    for all others it must be given. A file that doesn't say its number of classes is taken to have the null
    label too, as the original's do.

    Raises InputError as `load_checkpoint` does, and where ``num_heads`` is missing or does not fit.
    """
    weights, metadata = read_weights(Path(path))
    try:
        with torch.device("meta"), _WithoutDraws():  # the file's values replace them all
            model = DiT(**_sizes(weights, metadata, num_heads))
    except ValueError as error:
        raise InputError(f"{path}: {first_line(error)}") from None
    _check(weights, model.state_dict(), path)
    device, dtype = torch.get_default_device(), torch.get_default_dtype()
    copies = {name: weight.to(device, dtype, copy=True) for name, weight in weights.items()}
    model.load_state_dict(copies, assign=True)
    return model.eval()


def save_weights(model: DiT, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Write ``model`` to a safetensors file, converted to a floating ``dtype`` if one is given.

    What the shapes don't tell, ``num_heads`` and ``num_classes``, goes into the file's metadata. The file
    appears whole or, with an InputError, not at all; one that was there stays until then.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise InputError(f"{target}: expected the suffix .safetensors, got {target.suffix!r}; rename it")
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"dtype={dtype} can't hold weights; use a floating one, such as torch.float16")
    # Copies, because safetensors refuses tensors that share memory
    weights = {
        name: weight.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)
        for name, weight in model.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "num_heads": str(model.num_heads),
        "num_classes": str(model.y_embedder.num_classes),
    }
    with replacing(target, InputError) as partial:
        try:
            save_file(weights, partial, metadata)
        except SafetensorError as error:  # its wrapping of what the system refused
            raise OSError(first_line(error)) from None


def _check(weights: StateDict, expected: Mapping[str, Tensor], path: object) -> None:
    """Raise InputError naming the first key, in the model's order, that differs in presence or shape."""
    for name in dict.fromkeys([*expected, *weights]):
        wanted, got = (_shape(state.get(name)) for state in (expected, weights))
        if wanted != got:
            raise InputError(
                f"{path}: {shown(name)}: expected {wanted}, got {got}; "
                "pass a checkpoint of this model, or build the model of the checkpoint's sizes"
            )


def _sizes(weights: StateDict, metadata: Metadata, num_heads: int | None) -> dict[str, Any]:
    """The constructor's keywords; ValueError if these are no DiT's weights, or heads or classes don't fit."""
    width, channels, patch, _ = _dimensions(weights, "x_embedder.proj.weight", 4)
    tokens = math.prod(_dimensions(weights, "pos_embed", 3)) // width
    labels, _ = _dimensions(weights, "y_embedder.embedding_table.weight", 2)
    mlp_width, _ = _dimensions(weights, "blocks.0.mlp.fc1.weight", 2)
    patch_out, _ = _dimensions(weights, "final_layer.linear.weight", 2)
    heads = metadata.get("num_heads") if num_heads is None else num_heads
    if heads is None:
        raise ValueError("num_heads is not in the file; pass num_heads=, which is 16 for DiT-XL/2")
    classes = int(metadata.get("num_classes", labels - 1))
    if labels - classes not in (0, 1):
        raise ValueError(f"num_classes: expected {labels} or {labels - 1}, got {classes}; correct the metadata")
    return {
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "num_heads": int(heads),
        # The constructor rounds down: half a row more than the file has comes out as exactly that many.
        "mlp_ratio": (mlp_width + 0.5) / width,
        "class_dropout_prob": 0.1 if labels > classes else 0.0,
        "num_classes": classes,
        "learn_sigma": patch_out > channels * patch**2,
    }


class _WithoutDraws(TorchFunctionMode):
    """Leaves out normal draws, for which torch imports its compiler on the meta device: two seconds."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return None if func is nn.init.normal_ else func(*args, **(kwargs or {}))


def _dimensions(weights: StateDict, name: str, count: int) -> tuple[int, ...]:
    weight = weights.get(name)
    if weight is None or weight.ndim != count:
        raise ValueError(f"{name!r}: expected {count} dimensions, got {_shape(weight)}; pass a DiT's checkpoint")
    return tuple(weight.shape)


def _shape(weight: Tensor | None) -> str:
    return "no such key" if weight is None else f"shape {tuple(weight.shape)}"
