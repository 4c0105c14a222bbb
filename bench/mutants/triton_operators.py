"""Mutation operators for Triton's own calls: masks, reductions, casts, dot products, loops."""

import ast
from collections.abc import Iterator

from bench.mutants.edits import Edit, Operator, altered

MASK_AT = {"load": 1, "store": 2, "atomic_add": 2}  # the mask's place among positional arguments
AXIS_AT = {"sum": 1, "max": 1, "min": 1, "argmax": 1, "argmin": 1, "cumsum": 1, "flip": 1}
UNARY = {"exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sqrt_rn", "sigmoid", "erf", "abs", "floor", "cos", "sin"}
NARROWER = {"float64": "float32", "float32": "float16", "int64": "int32"}
RANGES = {"range", "static_range"}


def called(node: ast.AST) -> str:
    """The name of Triton's function that a node calls, else an empty string."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="tl" | "triton"), attr=name)):
            return name
    return ""


def argument(call: ast.Call, name: str, place: int) -> ast.expr | None:
    """An argument by its name or its place."""
    by_name = {keyword.arg: keyword.value for keyword in call.keywords}
    return by_name.get(name, call.args[place] if place < len(call.args) else None)


def drop_mask(node: ast.AST) -> Iterator[Edit]:
    """The mask of a load or store -> ``True``."""
    match node:
        case ast.Call() if called(node) in MASK_AT:
            mask = argument(node, "mask", MASK_AT[called(node)])
            if mask is not None:
                yield mask, ast.Constant(True)


def drop_dot_accumulator(node: ast.AST) -> Iterator[Edit]:
    """``tl.dot(a, b, acc)`` -> ``tl.dot(a, b, None)``."""
    match node:
        case ast.Call() if called(node) == "dot":
            accumulator = argument(node, "acc", 2)
            if accumulator is not None:
                yield accumulator, ast.Constant(None)


def swap_axis(node: ast.AST) -> Iterator[Edit]:
    """``tl.sum(x, axis=0)`` -> ``axis=1`` and back."""
    match node:
        case ast.Call() if called(node) in AXIS_AT:
            match argument(node, "axis", AXIS_AT[called(node)]):
                case ast.Constant(value=0) as axis:
                    yield axis, ast.Constant(1)
                case ast.Constant(value=1) as axis:
                    yield axis, ast.Constant(0)


def swap_reduction(node: ast.AST) -> Iterator[Edit]:
    """``tl.sum`` -> ``tl.max``."""
    match node:
        case ast.Call(func=ast.Attribute() as func) if called(node) == "sum":
            yield func, altered(func, attr="max")


def drop_cast(node: ast.AST) -> Iterator[Edit]:
    """``x.to(dtype)``, ``tl.cast(x, dtype)`` -> ``x``."""
    match node:
        case ast.Call(func=ast.Attribute(value=value, attr="to")):
            yield node, value
        case ast.Call(args=[value, *_]) if called(node) == "cast":
            yield node, value


def narrow_dtype(node: ast.AST) -> Iterator[Edit]:
    """``tl.float32`` -> ``tl.float16``, ``tl.int64`` -> ``tl.int32``: of a cast or of an accumulator."""
    match node:
        case ast.Attribute(value=ast.Name(id="tl"), attr=name) if name in NARROWER:
            yield node, altered(node, attr=NARROWER[name])


def drop_transpose(node: ast.AST) -> Iterator[Edit]:
    """``x.T``, ``tl.trans(x)`` -> ``x``."""
    match node:
        case ast.Attribute(value=value, attr="T") | ast.Call(func=ast.Attribute(attr="trans"), args=[value]):
            yield node, value


def drop_choice(node: ast.AST) -> Iterator[Edit]:
    """``tl.where(c, a, b)`` -> ``a``, ``b``."""
    match node:
        case ast.Call(args=[_, first, second]) if called(node) == "where":
            yield node, first
            yield node, second


def drop_function(node: ast.AST) -> Iterator[Edit]:
    """``tl.exp(x)`` -> ``x``."""
    match node:
        case ast.Call(args=[value, *_]) if called(node) in UNARY:
            yield node, value


def shorten_loop(node: ast.AST) -> Iterator[Edit]:
    """A range without its first step, and without its last."""
    match node:
        case ast.Call(func=ast.Name(id="range")):
            pass
        case ast.Call() if called(node) in RANGES:
            pass
        case _:
            return
    match node.args:
        case [stop]:
            yield node, altered(node, args=[ast.Constant(1), stop])
            yield stop, ast.BinOp(stop, ast.Sub(), ast.Constant(1))
        case [start, stop, *rest]:
            step = rest[0] if rest else ast.Constant(1)
            yield start, ast.BinOp(start, ast.Add(), step)
            yield stop, ast.BinOp(stop, ast.Sub(), step)


def round_down(node: ast.AST) -> Iterator[Edit]:
    """``cdiv(a, b)`` -> ``a // b``."""
    match node:
        case ast.Call(args=[a, b]) if called(node) == "cdiv":
            yield node, ast.BinOp(a, ast.FloorDiv(), b)


TRITON: tuple[Operator, ...] = (
    drop_mask,
    drop_dot_accumulator,
    swap_axis,
    swap_reduction,
    drop_cast,
    narrow_dtype,
    drop_transpose,
    drop_choice,
    drop_function,
    shorten_loop,
    round_down,
)
