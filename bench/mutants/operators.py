"""Mutation operators for any Python code: each gives the edits that it can make at one node."""

import ast
from collections.abc import Iterator, Mapping

from bench.mutants.edits import Edit, Operator, altered

ARITHMETIC: Mapping[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Add, ast.FloorDiv),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult, ast.Mod),
    ast.Mod: (ast.FloorDiv,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
}
COMPARISONS: Mapping[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
EXTREMA = {"max": "min", "min": "max", "maximum": "minimum", "minimum": "maximum"}
NUDGE = 1.01  # a factor that a tolerance should see


def swap_arithmetic(node: ast.AST) -> Iterator[Edit]:
    """``a + b`` -> ``a - b``, ``a * b``; ``acc += x`` -> ``acc -= x``; likewise the other operators."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            for other in ARITHMETIC.get(type(op), ()):
                yield node, altered(node, op=other())


def drop_operand(node: ast.AST) -> Iterator[Edit]:
    """``a + b`` -> ``a``, ``b``: a term of an index, a factor, a condition of a mask; ``a - b`` -> ``a``."""
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Mult() | ast.BitAnd() | ast.BitOr(), right=right):
            yield node, left
            yield node, right
        case ast.BinOp(left=left):
            yield node, left
        case ast.BoolOp(values=[left, right]):
            yield node, left
            yield node, right
        case ast.BoolOp(values=values):
            for k in range(len(values)):
                yield node, altered(node, values=[*values[:k], *values[k + 1 :]])


def swap_factors(node: ast.AST) -> Iterator[Edit]:
    """``a * s + b * t`` -> ``a * t + b * s``, ``a * s + b`` -> ``a + b * s``: strides that changed places."""
    match node:
        case ast.BinOp(left=ast.BinOp(op=ast.Add(), right=first) as rest, op=ast.Add(), right=second):
            swapped = _swapped(first, second)
            if swapped:
                yield node, altered(node, left=altered(rest, right=swapped[0]), right=swapped[1])
        case ast.BinOp(left=first, op=ast.Add(), right=second):
            swapped = _swapped(first, second)
            if swapped:
                yield node, altered(node, left=swapped[0], right=swapped[1])


def _swapped(first: ast.expr, second: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """Two terms with their last factors exchanged; None where neither has one."""
    match first, second:
        case ast.BinOp(left=a, op=ast.Mult(), right=s), ast.BinOp(left=b, op=ast.Mult(), right=t):
            return altered(first, left=a, right=t), altered(second, left=b, right=s)
        case ast.BinOp(left=a, op=ast.Mult()), _:
            return a, altered(first, left=second)
        case _, ast.BinOp(left=b, op=ast.Mult()):
            return altered(second, left=first), b
    return None


def swap_broadcast(node: ast.AST) -> Iterator[Edit]:
    """``x[:, None]`` -> ``x[None, :]`` and back."""
    match node:
        case (
            ast.Subscript(slice=ast.Tuple(elts=[ast.Slice(), ast.Constant(value=None)] as axes) as at)
            | ast.Subscript(slice=ast.Tuple(elts=[ast.Constant(value=None), ast.Slice()] as axes) as at)
        ):
            yield node, altered(node, slice=altered(at, elts=axes[::-1]))


def change_comparison(node: ast.AST) -> Iterator[Edit]:
    """``a < b`` -> ``a <= b`` and back, ``==`` and ``!=``, ``is`` and ``is not``; one of a chain at a time."""
    match node:
        case ast.Compare(ops=ops):
            for k, op in enumerate(ops):
                if type(op) in COMPARISONS:
                    yield node, altered(node, ops=[*ops[:k], COMPARISONS[type(op)](), *ops[k + 1 :]])


def reset_accumulator(node: ast.AST) -> Iterator[Edit]:
    """``acc += x`` -> ``acc = x``."""
    match node:
        case ast.AugAssign(target=target, value=value):
            yield node, ast.copy_location(ast.Assign(targets=[target], value=value), node)


def drop_statement(node: ast.AST) -> Iterator[Edit]:
    """``acc += x``, a call whose result goes nowhere (a store), ``raise``: left out."""
    match node:
        case ast.AugAssign() | ast.Expr(value=ast.Call()) | ast.Raise():
            yield node, ast.Pass()


def keep_stale(node: ast.AST) -> Iterator[Edit]:
    """``self.x = y``, ``table[k] = y``, ``del table[k]``: left out, so that what was there stays."""
    match node:
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.Delete(targets=[ast.Subscript()]):
            yield node, ast.Pass()


def change_integer(node: ast.AST) -> Iterator[Edit]:
    """``n`` -> ``n + 1``, ``n - 1``."""
    match node:
        case ast.Constant(value=int(value)) if type(value) is int:
            yield node, ast.Constant(value + 1)
            yield node, ast.Constant(value - 1)


def change_float(node: ast.AST) -> Iterator[Edit]:
    """``0.0`` -> ``1.0``; ``c`` -> half of it, and 1 % more; ``float("-inf")`` -> ``0.0``."""
    match node:
        case ast.Constant(value=float(value)):
            yield from ((node, ast.Constant(new)) for new in ((value / 2, value * NUDGE) if value else (1.0,)))
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value=str())]):
            yield node, ast.Constant(0.0)


def flip_boolean(node: ast.AST) -> Iterator[Edit]:
    """``True`` -> ``False`` and back."""
    match node:
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)


def negate_condition(node: ast.AST) -> Iterator[Edit]:
    """``if c`` -> ``if not c``; ``if not c`` -> ``if c``; so too conditional expressions and while."""
    match node:
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            match test:
                case ast.UnaryOp(op=ast.Not(), operand=operand):
                    yield test, operand
                case _:
                    yield test, ast.UnaryOp(ast.Not(), test)


def swap_logic(node: ast.AST) -> Iterator[Edit]:
    """``a and b`` -> ``a or b`` and back."""
    match node:
        case ast.BoolOp(op=ast.And()):
            yield node, altered(node, op=ast.Or())
        case ast.BoolOp(op=ast.Or()):
            yield node, altered(node, op=ast.And())


def drop_minus(node: ast.AST) -> Iterator[Edit]:
    """``-x`` -> ``x``."""
    match node:
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield node, operand


def swap_extremum(node: ast.AST) -> Iterator[Edit]:
    """``min(a, b)`` -> ``max(a, b)`` and back; ``tl.minimum``, ``tl.maximum`` and the reductions too."""
    match node:
        case ast.Call(func=ast.Name(id=name) as func) if name in EXTREMA:
            yield func, ast.Name(EXTREMA[name])
        case ast.Call(func=ast.Attribute(attr=name) as func) if name in EXTREMA:
            yield func, altered(func, attr=EXTREMA[name])


PYTHON: tuple[Operator, ...] = (
    swap_arithmetic,
    drop_operand,
    swap_factors,
    swap_broadcast,
    change_comparison,
    reset_accumulator,
    drop_statement,
    keep_stale,
    change_integer,
    change_float,
    flip_boolean,
    negate_condition,
    swap_logic,
    drop_minus,
    swap_extremum,
)
