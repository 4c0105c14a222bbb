"""All mutants of a source file, each with a name of its own."""

import ast
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from bench.mutants.edits import Operator, Text, one_line, replaced, text_of
from bench.mutants.operators import PYTHON
from bench.mutants.triton_operators import TRITON

OPERATORS: tuple[Operator, ...] = (*TRITON, *PYTHON)  # of two that make the same text, the first names it

# What bears on speed alone, or holds the compiler to something: no interpreter can tell a change of it.
HINTED = {"multiple_of", "max_contiguous", "max_constancy"}  # all but the first argument
CHECKS = {"static_assert", "device_assert", "assume", "static_print", "device_print", "debug_barrier"}
TUNING = {
    "num_warps", "num_stages", "num_ctas", "loop_unroll_factor", "warp_specialize", "flatten",
    "disallow_acc_multi_buffer", "eviction_policy", "cache_modifier",
}  # fmt: skip

Located = tuple[ast.AST, ast.AST | None]  # a node and its parent


@dataclass(frozen=True)
class Mutant:
    """One edit of a source file: ``text`` in the place of the bytes from ``start`` to ``end``."""

    file: str  # from the root of the tree, as kernels/x.py
    function: str
    line: int  # from 1
    column: int  # from 0
    operator: str
    index: int  # among those of this operator here
    number: int  # among those of this operator on lines of this text in this function
    before: str
    after: str
    start: int
    end: int
    text: str

    @property
    def id(self) -> str:
        """Which mutant it is among those of one state of the source."""
        return f"{self.file}:{self.line}:{self.column}:{self.operator}:{self.index}"

    @property
    def key(self) -> str:
        """Which mutant it is wherever its line moves."""
        return f"{self.file}::{self.function} | {self.operator}#{self.number} | {self.before}"

    def applied(self, source: str) -> str:
        """The source that it was found in, mutated."""
        return replaced(source.encode(), self.start, self.end, self.text)


def in_kernels(function: ast.FunctionDef) -> bool:
    """Whether a function is compiled by Triton."""
    names = (ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list)
    return any(name.rpartition(".")[2] == "jit" for name in names)


def in_launchers(function: ast.FunctionDef) -> bool:
    """Whether a function is plain Python."""
    return not in_kernels(function)


def anywhere(function: ast.FunctionDef) -> bool:
    """Every function."""
    return True


def find(file: str, source: str, where: Callable[[ast.FunctionDef], bool] = in_kernels) -> list[Mutant]:
    """The mutants of the functions that ``where`` is true of, from the top down; no two have the same text."""
    text = Text(source)
    found = ((name, node) for name, node in _functions(ast.parse(source)) if where(node))
    return [mutant for name, function in found for mutant in _in_function(file, text, name, function)]


def _functions(module: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods with their names."""
    for node in module.body:
        match node:
            case ast.FunctionDef(name=name):
                yield name, node
            case ast.ClassDef(name=owner, body=body):
                yield from ((f"{owner}.{each.name}", each) for each in body if isinstance(each, ast.FunctionDef))


def _in_function(file: str, text: Text, name: str, function: ast.FunctionDef) -> Iterator[Mutant]:
    seen: set[tuple[int, int, str]] = set()
    places: Counter[tuple[int, int, str]] = Counter()
    alike: Counter[tuple[str, str]] = Counter()
    for operator, old, new, parent in sorted(_edits(function), key=lambda edit: text.span(edit[1])):
        start, end = text.span(old)
        first, last = text.lines(start, end)
        replacement = text_of(new, old, parent)
        result = one_line(replaced(text.source[first:last], start - first, end - first, replacement))
        if (first, last, result) in seen:
            continue
        seen.add((first, last, result))
        before = one_line(text.source[first:last].decode())
        place, same = (old.lineno, old.col_offset, operator), (operator, before)  # type: ignore[attr-defined]
        yield Mutant(
            file, name, *place, places[place], alike[same], before, result, start, end, replacement
        )  # fmt: skip
        places[place] += 1
        alike[same] += 1


def _edits(function: ast.FunctionDef) -> Iterator[tuple[str, ast.AST, ast.AST, ast.AST | None]]:
    """All edits in a function's body: operator, node, replacement, the node's parent."""
    located = list(_walk(function, None))
    parents = {id(node): parent for node, parent in located}
    for operator in OPERATORS:
        for node, _ in located:
            for old, new in operator(node):
                yield operator.__name__, old, new, parents[id(old)]


def _walk(node: ast.AST, parent: ast.AST | None) -> Iterator[Located]:
    """A node and all below it, but for what no test could see a change of."""
    if not _is_unseen(node):
        yield node, parent
        for child in _children(node):
            yield from _walk(child, node)


def _is_unseen(node: ast.AST) -> bool:
    match node:
        case ast.Expr(value=ast.Call(func=ast.Attribute(attr=name))):
            return name in CHECKS
        case ast.keyword(arg=name):
            return name in TUNING
    return isinstance(node, ast.JoinedStr)  # a message


def _children(node: ast.AST) -> Iterable[ast.AST]:
    match node:
        case ast.FunctionDef(body=body):
            return body
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            return target, value
        case ast.Call(func=ast.Attribute(attr=name) as func, args=[first, *_]) if name in HINTED:
            return func, first
        case ast.Raise():
            return ()
    return ast.iter_child_nodes(node)
