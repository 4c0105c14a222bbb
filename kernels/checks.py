"""Checks of a launcher's tensors before it launches: InputError for all that its kernel can't take.

A model's weights may lie in any order, as ``torch.channels_last`` or views of others: see `weights` and `norm_weights`.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.ops.operands import GuidanceArgs, Linear, Norm, Patches, Quantised, StepIndex, Update

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Weights = TypeVar("Weights", Linear, Patches)


def weights(operand: Weights) -> Weights:
    """Return the weights contiguous: those in another order as copies, which live as long as the launch."""
    return type(operand)(*(tensor.contiguous() for tensor in operand))


def norm_weights(operand: Norm) -> Norm:
    """Return the norm with its own weight and bias contiguous; its modulation may have strides."""
    if operand.weight is None and operand.bias is None:
        return operand
    own = (None if tensor is None else tensor.contiguous() for tensor in (operand.weight, operand.bias))
    return Norm(operand.shift, operand.scale, operand.eps, *own)


def stream(h: Tensor, *others: Tensor) -> tuple[int, int, int]:
    """Return (R, T, D) of the residual stream; all others must be its like: shape, dtype, device, contiguous."""
    if h.dtype not in DTYPES:
        raise InputError(f"dtype {h.dtype} is none of {_names(DTYPES)}; the torch operations take it")
    if h.ndim != 3 or not h.numel():
        raise InputError(f"h of shape {tuple(h.shape)} is not (rows, tokens, channels), one or more of each")
    for tensor in (h, *others):
        alike(tensor, h, h.shape)
    rows, tokens, width = h.shape
    return rows, tokens, width


def alike(tensor: Tensor, h: Tensor, shape: Sequence[int]) -> None:
    """Raise InputError unless an operand has this shape, is contiguous, and has h's dtype and device."""
    if tensor.shape != torch.Size(shape):
        raise InputError(f"an operand of shape {tuple(tensor.shape)} does not fit; it must be {tuple(shape)}")
    if not tensor.is_contiguous():
        raise InputError(f"an operand with strides {tensor.stride()} is not contiguous; pass .contiguous()")
    if tensor.dtype != h.dtype:
        raise InputError(f"an operand is {tensor.dtype}, but the residual stream is {h.dtype}; convert one of them")
    same_device(tensor, h)


def quantised(rows: Quantised, h: Tensor) -> None:
    """Raise InputError unless rows are h's in float8_e4m3fn with a float32 scale each, contiguous, on h's device."""
    wanted = (h.shape, torch.float8_e4m3fn), (h.shape[:2], torch.float32)
    for tensor, (shape, dtype) in zip(rows, wanted, strict=True):
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise InputError(
                f"an operand of shape {tuple(tensor.shape)}, {tensor.dtype} and strides {tensor.stride()} does not "
                f"fit; it must be {tuple(shape)} {_names([dtype])}, contiguous"
            )
        same_device(tensor, h)


def heads(out: Tensor, *others: Tensor) -> None:
    """Raise InputError unless all are (N, heads, T, d) of one dtype and device, out with features side by side."""
    if out.dtype not in DTYPES:
        raise InputError(f"dtype {out.dtype} is none of {_names(DTYPES)}; the torch operations take it")
    if out.ndim != 4 or not out.numel() or out.stride(3) != 1:
        raise InputError(
            f"an output of shape {tuple(out.shape)} and strides {out.stride()} does not fit; it must be (rows, heads, "
            "tokens, features), one or more of each, with features side by side"
        )
    for tensor in others:
        if tensor.shape != out.shape or tensor.dtype != out.dtype:
            raise InputError(
                f"an operand of shape {tuple(tensor.shape)} and {tensor.dtype} does not fit; it must be "
                f"{tuple(out.shape)} {_names([out.dtype])}"
            )
        same_device(tensor, out)


def choice(indices: Tensor, h: Tensor) -> int:
    """Return the number k of h's tokens that indices (R, k) int32, contiguous, on h's device, name in each row."""
    rows, tokens, _ = h.shape
    k = indices.shape[1] if indices.ndim == 2 else 0
    if not 1 <= k <= tokens or len(indices) != rows or indices.dtype != torch.int32 or not indices.is_contiguous():
        raise InputError(
            f"a choice of shape {tuple(indices.shape)}, {indices.dtype} and strides {indices.stride()} does not fit; "
            f"it must be ({rows}, 1 to {tokens}) int32, contiguous"
        )
    same_device(indices, h)
    return k


def same_device(tensor: Tensor, h: Tensor) -> None:
    """Raise InputError unless an operand is on h's device."""
    if tensor.device != h.device:
        raise InputError(f"an operand is on {tensor.device}, but the residual stream on {h.device}; move one of them")


def vectors(h: Tensor, *tables: Tensor) -> tuple[int, int]:
    """Return the strides of a step and of a condition in modulation tables (S, U, D), the same for all of them."""
    for table in tables:
        if table.ndim != 3 or table.shape[2] != h.shape[2] or table.stride(2) != 1:
            raise InputError(
                f"a modulation table of shape {tuple(table.shape)} and strides {table.stride()} does not fit; "
                f"it must be (steps, conditions, {h.shape[2]}) with channels side by side"
            )
        if table.dtype != h.dtype:
            raise InputError(f"a modulation table is {table.dtype}, but the residual stream is {h.dtype}; convert one")
        same_device(table, h)
    strides = {table.stride()[:2] for table in tables}
    if len(strides) != 1:
        raise InputError(f"modulation tables have strides {sorted(strides)}; pass views of one table")
    step, condition = strides.pop()
    return step, condition


def norm(h: Tensor, what: Norm, *gates: Tensor) -> tuple[int, int]:
    """Return the strides of a norm's modulation, and of gates; checks its own weight and bias (D,), if it has them."""
    for vector in (what.weight, what.bias):
        if vector is not None:
            alike(vector, h, h.shape[2:])
    return vectors(h, what.shift, what.scale, *gates)


def at(h: Tensor, where: StepIndex) -> None:
    """Raise InputError unless the step and what advances are (1,), each row's condition (R,), int32, on h's device."""
    tensors = [("step", where.step, 1), ("row_of", where.row_of, len(h))]
    if where.advance is not None:
        tensors.append(("advance.to", where.advance.to, 1))
    for name, tensor, size in tensors:
        if tensor.shape != (size,) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise InputError(
                f"{name} of shape {tuple(tensor.shape)} and {tensor.dtype} does not fit; it must be ({size},) int32, "
                "contiguous"
            )
        same_device(tensor, h)


def branch_count(branches: Sequence[Tensor], gates: Sequence[Tensor], most: int) -> None:
    """Raise InputError unless there are as many gates as branches, and no more than a kernel takes."""
    if len(branches) != len(gates) or len(branches) > most:
        raise InputError(
            f"{len(branches)} branches and {len(gates)} gates; give one gate a branch, and at most {most} at once"
        )


def samples(h: Tensor, guide: GuidanceArgs) -> int:
    """Return the number of samples that h's rows are of: half the rows under guidance."""
    if guide.copies not in (1, 2) or len(h) % guide.copies:
        raise InputError(f"{len(h)} rows are not {guide.copies} a sample; it must be 1, or 2 under guidance, of each")
    if not 0 <= guide.channels <= guide.eps_channels:
        raise InputError(f"{guide.channels} guided channels are outside [0, {guide.eps_channels}], those of eps")
    if guide.settings.shape != (2,) or guide.settings.dtype != torch.float32 or not guide.settings.is_contiguous():
        raise InputError(f"settings {guide.settings.shape}, {guide.settings.dtype} must be (2,) float32: scale and b")
    same_device(guide.settings, h)
    return len(h) // guide.copies


def patch_size(h: Tensor, image: Tensor) -> int:
    """The side of the square patches that cut images (N, channels, H, W) into h's tokens."""
    height, width = image.shape[-2:]
    side = math.isqrt(height * width // h.shape[1])
    if image.ndim != 4 or side * side * h.shape[1] != height * width or height % side or width % side:
        raise InputError(f"images of shape {tuple(image.shape)} can't be cut into {h.shape[1]} square patches")
    return side


def latents(image: Tensor, h: Tensor, shape: Sequence[int]) -> None:
    """Raise InputError unless latents or an output are float32 of this shape, contiguous, on h's device."""
    if image.shape != torch.Size(shape) or image.dtype != torch.float32 or not image.is_contiguous():
        raise InputError(
            f"latents of shape {tuple(image.shape)}, {image.dtype} and strides {image.stride()} do not fit; they must "
            f"be {tuple(shape)} float32, contiguous"
        )
    same_device(image, h)


def patches(h: Tensor, embedding: Patches, x: Tensor) -> int:
    """Return the patch size of an embedding; InputError unless it fits latents x (B, C, H, W) and h."""
    patch = patch_size(h, x)
    alike(embedding.weight, h, (h.shape[2], x.shape[1], patch, patch))
    alike(embedding.bias, h, h.shape[2:])
    alike(embedding.positions, h, h.shape[1:])
    return patch


def head(h: Tensor, linear: Linear, guide: GuidanceArgs, image: Tensor) -> tuple[int, int]:
    """Return the patch size and the output's channels: those of eps, and perhaps as many of the variance."""
    patch = patch_size(h, image)
    channels = len(linear.weight) // patch**2
    if channels * patch**2 != len(linear.weight) or channels not in (guide.eps_channels, 2 * guide.eps_channels):
        raise InputError(
            f"{len(linear.weight)} features a token do not fit {guide.eps_channels} eps channels in patches of "
            f"{patch}; there must be {guide.eps_channels * patch**2}, or twice as many with a variance"
        )
    alike(linear.weight, h, (len(linear.weight), h.shape[2]))
    alike(linear.bias, h, linear.weight.shape[:1])
    return patch, channels


def update(what: Update, x: Tensor) -> None:
    """Raise InputError unless a sampler's steps are fit for x (B, C, H, W).

    Coefficients are (S, 6), with a memory (S, 9), noise (S, B, C, H, W) or None, a memory like x; all float32.
    """
    rows, width = what.coefficients, 6 if what.previous is None else 9
    if rows.ndim != 2 or rows.shape[1] != width or rows.dtype != torch.float32:
        raise InputError(f"coefficients of shape {tuple(rows.shape)}, {rows.dtype} must be (S, {width}) float32")
    if not rows.is_contiguous():
        raise InputError(f"coefficients with strides {rows.stride()} are not contiguous; pass .contiguous()")
    same_device(rows, x)
    if what.noise is not None:
        latents(what.noise, x, (len(rows), *x.shape))
    if what.previous is not None:
        latents(what.previous, x, x.shape)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
