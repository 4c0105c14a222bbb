"""Edits of syntax trees, and of the source text that they were parsed from."""

import ast
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import TypeVar

Node = TypeVar("Node", bound=ast.AST)
Edit = tuple[ast.AST, ast.AST]  # a node of the parsed source, and what takes its place
Operator = Callable[[ast.AST], Iterator[Edit]]

OPERATIONS = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp)
BINDING = (*OPERATIONS, ast.Attribute, ast.Subscript, ast.Call, ast.Starred, ast.comprehension)


def altered(node: Node, **fields: object) -> Node:
    """A copy of ``node`` with other fields; the children are shared."""
    old = {name: getattr(node, name, None) for name in node._fields}
    return ast.copy_location(type(node)(**(old | fields)), node)


def text_of(new: ast.AST, old: ast.AST, parent: ast.AST | None) -> str:
    """The source of ``new``, in parentheses where it would bind otherwise in the place of ``old`` below ``parent``."""
    text = ast.unparse(new)
    inside = isinstance(parent, BINDING) and not _is_argument(old, parent)
    return f"({text})" if inside and isinstance(new, OPERATIONS) else text


def _is_argument(node: ast.AST, parent: ast.AST) -> bool:
    return isinstance(parent, ast.Call | ast.Subscript) and node not in (
        getattr(parent, "func", None),
        getattr(parent, "value", None),
    )


class Text:
    """A source file, by the positions that `ast` gives: lines from 1, columns in bytes."""

    def __init__(self, source: str) -> None:
        self.source = source.encode()
        self._starts = [0]
        for line in self.source.split(b"\n"):
            self._starts.append(self._starts[-1] + len(line) + 1)

    def span(self, node: ast.AST) -> tuple[int, int]:
        """The first byte of a node and the one after its last."""
        start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
        return self._starts[start[0] - 1] + start[1], self._starts[end[0] - 1] + end[1]

    def lines(self, start: int, end: int) -> tuple[int, int]:
        """The whole lines around a span, without the last line's end."""
        first, last = (bisect_right(self._starts, byte) for byte in (start, end))
        return self._starts[first - 1], self._starts[last] - 1


def replaced(source: bytes, start: int, end: int, text: str) -> str:
    """``source`` with ``text`` in the place of a span."""
    return (source[:start] + text.encode() + source[end:]).decode()


def one_line(source: str) -> str:
    """Source on one line, without indentation."""
    return " ".join(source.split())
