"""Triton's interpreter, made honest about its numbers, and quicker.

It keeps bfloat16 as raw bits in uint16 and computes with those as if they were integers, and it truncates where a GPU
rounds to nearest even. Here conversions and dot products are right, and any other bfloat16 arithmetic is an error. Of
float8 (e4m3) it truncates as well, is wrong about the smallest, and returns NaN where a GPU stays at the largest: here
conversions from and to float32 are right, and all else is an error.

As compiled code does (seen in the PTX of Triton 3.7.1 and 3.9.0), an FMA rounds once, a maximum or minimum of a NaN is
the other operand unless a kernel asks for NaN, and a sum of float16 is rounded to float16 at each addition.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits -> float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 -> bfloat16 bits, to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


UNCOUNTABLE = {tl.bfloat16: "bfloat16", tl.float8e4nv: "float8"}  # kept as bits
# The 127 numbers of e4m3 from 0 on, by their bits: 3 of mantissa, 4 of exponent with bias 7; the one after them is NaN.
FLOAT8 = np.array([(bits % 8 + 8 * (bits > 7)) * 2.0 ** (max(bits // 8, 1) - 10) for bits in range(127)], np.float32)
BETWEEN = (FLOAT8[1:] + FLOAT8[:-1]) / 2


def widen8(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """e4m3 bits -> float32, exactly."""
    return np.array([*FLOAT8, np.nan, *-FLOAT8, np.nan], np.float32)[bits]


def narrow8(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 -> e4m3 bits as a GPU does: to nearest, ties to even, at most the largest; NaN stays NaN."""
    size = np.abs(values)
    bits = np.searchsorted(BETWEEN, size)  # of the lower one where it lies between two
    is_tie = size == BETWEEN[np.minimum(bits, len(BETWEEN) - 1)]
    bits = np.where(np.isnan(values), 127, bits + (is_tie & (bits % 2 == 1)))
    return (bits + 128 * np.signbit(values)).astype(np.uint8)


def fused(x: NDArray[Any], y: NDArray[Any], z: NDArray[Any]) -> NDArray[Any]:
    """``x * y + z`` of float32 or float16, rounded once.

    In float64 the product is exact, and the sum is rounded to odd: where it is inexact, its last bit says so, and the
    second rounding can't take it for a tie. Source: Boldo and Melquiond, "Emulation of a FMA and correctly rounded
    sums: proved algorithms using rounding to odd", 2008.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        product, addend = np.broadcast_arrays(x.astype(np.float64) * y, z.astype(np.float64))
        total = product + addend
        of_addend = total - product
        lost = (product - (total - of_addend)) + (addend - of_addend)  # exactly; NaN beside infinities
        is_even = total.view(np.int64) % 2 == 0
        toward = np.where(lost > 0, np.inf, -np.inf)
        odd = np.where(is_even & (np.abs(lost) > 0), np.nextafter(total, toward), total)
        return odd.astype(np.result_type(x, y, z))


def rounded_sum(values: NDArray[Any], axis: int) -> NDArray[Any]:
    """A sum along a power of two of numbers, the halves added up until one is left, and each addition rounded."""
    while values.shape[axis] > 1:
        first, second = np.split(values, 2, axis)
        with np.errstate(over="ignore", invalid="ignore"):
            values = first + second
    return values


def repair_numbers(patch: pytest.MonkeyPatch) -> None:
    """Patch the interpreter for as long as ``patch`` lasts."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    add_up, extremum = ReduceOps.sum, ReduceOps.min_max

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(src.data), tl.bfloat16)
        if kinds == (tl.float8e4nv, tl.float32):
            return TensorHandle(widen8(src.data), tl.float32)
        if kinds == (tl.float32, tl.float8e4nv):
            return TensorHandle(narrow8(src.data), tl.float8e4nv)
        if not UNCOUNTABLE.keys().isdisjoint(kinds):
            raise NotImplementedError(f"the interpreter can't convert {kinds[0]} to {kinds[1]}; go through float32")
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (TensorHandle(widen(m.data), tl.float32) if m.dtype.scalar == tl.bfloat16 else m for m in (a, b))
        return dot(self, a, b, *rest)

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        refuse(lhs, rhs)
        return binary(self, lhs, rhs, op)

    def unary_op(self: Any, arg: TensorHandle, op: Any) -> TensorHandle:
        refuse(arg)
        return unary(self, arg, op)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        refuse(x, y, z)
        if x.dtype.scalar not in (tl.float32, tl.float16):
            raise NotImplementedError(f"the interpreter has no fma of {x.dtype.scalar}; a kernel computes in float32")
        return TensorHandle(fused(x.data, y.data, z.data), z.dtype.scalar)

    def create_clampf(self: Any, x: TensorHandle, low: TensorHandle, high: TensorHandle, nan: Any) -> TensorHandle:
        keeps_nan = nan == tl.PropagateNan.ALL
        return self.ternary_op(
            x, low, high, np.clip if keeps_nan else lambda x, low, high: np.fmin(np.fmax(x, low), high)
        )

    def reduce_sum(self: Any, operand: Any) -> Any:
        refuse(operand.handle)
        if operand.dtype != tl.float16:
            return add_up(self, operand)
        values, axis = operand.handle.data, self.axis
        total = rounded_sum(values.reshape(-1) if axis is None else values, axis or 0)
        kept = (1,) * values.ndim if axis is None else total.shape
        gone = () if axis is None else np.squeeze(total, axis).shape
        return self.to_tensor(total.reshape(kept if self.keep_dims else gone), operand.dtype)

    def min_max(self: Any, operand: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        without_a_warning = {np.nanmax: np.fmax.reduce, np.nanmin: np.fmin.reduce}  # of nothing but NaN
        return extremum(self, operand, without_a_warning.get(val_reduce_op, val_reduce_op), idx_reduce_op)

    patch.setattr(ReduceOps, "sum", reduce_sum)
    patch.setattr(ReduceOps, "min_max", min_max)
    patch.setattr(InterpreterBuilder, "create_maxnumf", lambda self, x, y: self.binary_op(x, y, np.fmax))
    patch.setattr(InterpreterBuilder, "create_minnumf", lambda self, x, y: self.binary_op(x, y, np.fmin))
    patch.setattr(InterpreterBuilder, "create_clampf", create_clampf)
    patch.setattr(InterpreterBuilder, "create_fma", create_fma)
    patch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    patch.setattr(InterpreterBuilder, "create_fp_to_fp", lambda self, src, dst, _: cast_impl(self, src, dst))
    patch.setattr(InterpreterBuilder, "create_dot", create_dot)
    patch.setattr(InterpreterBuilder, "binary_op", binary_op)
    patch.setattr(InterpreterBuilder, "unary_op", unary_op)


def call_helpers_quickly(patch: pytest.MonkeyPatch) -> None:
    """Patch Triton's language once a launch, and not anew at each call of a nested jit function, which takes ms."""
    launch, done = GridExecutor.__call__, set[frozenset[str]]()

    @cache
    def languages(function: Any) -> frozenset[str]:
        """The modules of Triton's language that a function sees."""
        return frozenset(v.__name__ for v in function.__globals__.values() if v is tl or v is tl.core)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if languages(self.fn) not in done:
            interpreter._patch_lang(self.fn)
            done.add(languages(self.fn))
        return self.rewrite()(*args, **kwargs)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        done.clear()
        launch(self, *args, **kwargs)

    patch.setattr(InterpretedFunction, "__call__", call)
    patch.setattr(GridExecutor, "__call__", launch_anew)


def refuse(*handles: TensorHandle) -> None:
    """Raise for bfloat16 and float8 operands: the interpreter would compute with their bits."""
    for handle in handles:
        if handle.dtype.scalar in UNCOUNTABLE:
            name = UNCOUNTABLE[handle.dtype.scalar]
            raise NotImplementedError(f"the interpreter has no {name} arithmetic; a kernel computes in float32")


@contextmanager
def only_program(x: int, y: int = 0, z: int = 0) -> Iterator[None]:
    """Run this one program of every launch inside: the interpreter would need hours for a huge tensor's grid.

    On a GPU, where nothing is interpreted, all programs run.
    """
    if torch.cuda.is_available():
        yield
        return
    run = GridExecutor.__call__
    place, size = InterpreterBuilder.set_grid_idx, InterpreterBuilder.set_grid_dim

    def run_one(self: Any, *args: Any, **kwargs: Any) -> None:
        self.grid = (1, 1, 1)
        run(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", run_one)
        patch.setattr(InterpreterBuilder, "set_grid_dim", lambda self, *_: size(self, x + 1, y + 1, z + 1))
        patch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, *_: place(self, x, y, z))
        yield
