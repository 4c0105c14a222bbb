"""The house rules of prose and names: docstrings stand alone in a hover, locals are nouns, names once left are gone."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest
from constants import ROOT

PACKAGE = ROOT / "ebcache_fast"
KERNELS = ROOT / "kernels"

# A docstring that begins so is an answer to a question that only the code around it asks.
HANGING = re.compile(
    r"(That|This|Those|These|None|It|Its|They|Their|The (same|other|others)|(Any|Some|Every|No)(thing|body)|So|If|"
    r"(What|Where|When|Which|Who|How)(ever|soever)?|Whether|Whose|Whom|Why|While|Because|Since|Until|Unless|Once|But|"
    r"And|Or|As|At|By|For|From|In|Of|On|To|With|Without|Before|After|Also|Only|See|TableError|InputError|JobError)\b"
)
# Locals that say how something came to be there in the place of what it is.
NO_NOUNS = {"chosen", "each", "given", "made", "one", "told"}
# Where such a word is a public keyword or a field of a file: (file, name).
PUBLIC = {("ebcache_fast/plan/table.py", "made"), ("ebcache_fast/plan/table_schema.py", "made")}

# Names that the package had before its lexicon. Those which users may write still are in SHIMS, which go with the next
# release; `former/` and `plan/former.py` are such shims as a whole.
LEFT = {
    *("At", "Context", "Contexts", "DataForm", "Ending", "Ends", "Fingerprint", "Guide", "Lane", "Means", "ModelCall"),
    *("Numerics", "OwnForward", "Place", "Ready", "Scratch", "TrustingForward", "Work"),
    *("answerable", "attach", "data_form", "dependent_launch", "fingerprint", "first_call", "hooked", "is_refresh"),
    *("lane", "lanes", "makes_of", "means", "number_of", "numerics", "of_scheduler", "presets", "profile_job"),
    *("refresh", "refresh_at", "renew", "sampler_step", "sized", "trust_order"),
}
LEFT_IN = {"ebcache_fast/dropin/": {"Gate"}, "kernels/": {"EARLY", "early"}}
SHIMS = {
    ("ebcache_fast/dropin/enable.py", "trust_order"),
    ("ebcache_fast/engine/options.py", "dependent_launch"),
    ("ebcache_fast/plan/model_shape.py", "fingerprint"),
}


class Binding(NamedTuple):
    """A name that a file gives to something: `name` in it, `line` of it."""

    file: str
    line: int
    name: str


@cache
def sources() -> dict[str, ast.Module]:
    """The syntax of every file of the package and the kernels, by its path from the root."""
    paths = [path for path in PACKAGE.rglob("*.py") if (PACKAGE / "kernels") not in path.parents]
    files = sorted([*paths, *KERNELS.glob("*.py")])
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the text of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "lineno", 1), text


def bindings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The line and the name of whatever is given one: variables, arguments, attributes, functions, classes, imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case ast.arg(arg=name):
                yield node.lineno, name
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.alias(name=name, asname=other):
                yield node.lineno, other or name
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield node.lineno, name


def found(names: set[str], exempt: set[tuple[str, str]], under: str = "") -> list[Binding]:
    """Bindings of these names, with a _ before them too, in files whose path begins so."""
    return [
        Binding(file, line, name)
        for file, tree in sources().items()
        if file.startswith(under)
        for line, name in bindings(tree)
        if name.lstrip("_") in names and (file, name) not in exempt
    ]


def test_docstrings_begin_with_what_a_thing_is_or_does() -> None:
    hanging = [
        f"{file}:{line}: {text.splitlines()[0]}"
        for file, tree in sources().items()
        for line, text in docstrings(tree)
        if HANGING.match(text)
    ]
    assert not hanging, "\n".join(hanging)


def test_locals_are_called_by_nouns() -> None:
    assert not found(NO_NOUNS, PUBLIC)


def test_names_that_were_left_are_gone() -> None:
    left = found(LEFT, SHIMS) + [binding for under, names in LEFT_IN.items() for binding in found(names, set(), under)]
    assert not [binding for binding in left if not re.match(r"ebcache_fast/(plan/)?former", binding.file)]


@pytest.mark.parametrize(
    ("text", "hangs"),
    [
        ("What torch is told about how to compute.", True),
        ("How many there are.", True),
        ("None where there is none.", True),
        ("The same, in float64.", True),
        ("Whenever it runs.", True),
        ("Return what is left of it.", False),
        ("Global torch flags that change results.", False),
        ("True if the model learned the null label.", False),
        ("Toggle of a thing; no word is taken for its beginning.", False),
        ("Inputs, offsets, forms and whole steps.", False),
    ],
)
def test_hanging_docstrings_are_told_apart(text: str, hangs: bool) -> None:
    assert bool(HANGING.match(text)) == hangs


def test_every_way_to_bind_a_name_is_seen() -> None:
    source = """
import a as b
from c import d
class e:
    f: int = 0
def g(h, *i, j=0, **k):
    l = m = n.o
    self.p = [q for q in r]
    with s as t: pass
    for u, (v, w) in x: pass
    if (y := z): pass
    try: pass
    except A as B: pass
    match C:
        case [D, *E]: pass
    F = lambda G: H
"""
    assert {name for _, name in bindings(ast.parse(source))} == set("bdefghijklmpqtuvwyBDEFG")
    assert all(line > 1 for line, _ in bindings(ast.parse(source)))


def test_these_rules_read_the_package() -> None:
    assert len(sources()) > 150
    assert {"kernels/head.py", "ebcache_fast/engine/runner.py", "ebcache_fast/__init__.py"} <= sources().keys()
    assert [binding for binding in found({"made"}, set()) if (binding.file, binding.name) in PUBLIC]
