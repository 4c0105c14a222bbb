"""The house rule: imports go only downward. Reads the source, so that lazy imports count too."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from constants import ROOT

PACKAGE = "ebcache_fast"
FACADE = "__init__"

# From the ground up. A unit is a module or a subpackage of ebcache_fast; it may import what stands in an
# earlier row, never its neighbours; kernels are part of ops. Inside a subpackage anything goes that makes no cycle.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "_version", "former"),
    ("plan",),
    ("ops", "samplers", "policies"),
    ("models",),
    ("engine",),
    ("sampling",),
    ("dropin",),
    ("calibration",),
    ("apps",),
    (FACADE, "__main__"),
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}

KERNELS = "ops"  # the unit that the kernels belong to

# Of other libraries: those that a unit sees, where that is not all (the standard library is always allowed).
ONLY_LIBRARIES = {
    "errors": set[str](),
    "_version": set[str](),
    "former": set[str](),
    "plan": {"numpy", "pydantic"},
    "policies": {"numpy"},
}
EAGER_LIBRARIES = {"torch", "triton", "numpy", "pydantic", "safetensors"}
LAZY_LIBRARIES = {"PIL", "tqdm", "rich", "tyro", "diffusers", "transformers", "matplotlib", "pynvml"}
# The parser's annotations stand in the commands' signatures, and cli loads only when a command runs.
LOADED_WITH = {"apps": {"tyro"}}


@dataclass(frozen=True)
class Import:
    """Module `source` imports module `target`, both dotted; `eager` if that runs with `source` itself."""

    source: str
    target: str
    line: int
    eager: bool

    def __str__(self) -> str:
        return f"{sources()[self.source].relative_to(ROOT)}:{self.line} imports {self.target}"

    @property
    def library(self) -> str:
        return self.target.partition(".")[0]

    @property
    def unit(self) -> str:
        """The unit that imports."""
        return unit_of(self.source)


def unit_of(module: str) -> str:
    """Return the row entry of LAYERS that a module of the package belongs to."""
    unit = module.split(".")[1] if "." in module else FACADE
    return KERNELS if unit == "kernels" else unit


def level_of(module: str) -> int:
    """Return the row of a module of the package; one that has no place yet counts as above them all."""
    return LEVEL.get(unit_of(module), len(LAYERS))


@cache
def sources() -> dict[str, Path]:
    """Return every module of the package and its file; kernels/ is read in place, not through its symlink."""
    folders = {PACKAGE: ROOT / PACKAGE, f"{PACKAGE}.kernels": ROOT / "kernels"}
    link = ROOT / PACKAGE / "kernels"
    found = {}
    for prefix, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            if link not in path.parents:
                parts = path.relative_to(folder).with_suffix("").parts
                found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


def is_module(name: str) -> bool:
    """Whether a dotted name is a module or a folder of modules of the package."""
    return any(module == name or module.startswith(f"{name}.") for module in sources())


def base_of(module: str, node: ast.ImportFrom) -> str:
    """Return the dotted name that a `from` import starts at, with leading dots resolved."""
    if node.level == 0:
        return node.module or ""
    package = module if sources()[module].name == "__init__.py" else module.rpartition(".")[0]
    parts = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def targets(module: str, node: ast.Import | ast.ImportFrom) -> list[str]:
    """Return what a statement loads; `from package import name` loads the submodule if there is one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = base_of(module, node)
    names = [f"{base}.{alias.name}" for alias in node.names]
    return [name if is_module(name) else base for name in names]


def runs_later(node: ast.AST) -> bool:
    """Whether a node's body waits for a call, or never runs at all."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def walk(module: str, node: ast.AST, eager: bool) -> Iterator[Import]:
    """Yield the imports below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield from (Import(module, target, child.lineno, eager) for target in targets(module, child))
        else:
            yield from walk(module, child, eager and not runs_later(child))


@cache
def imports() -> tuple[Import, ...]:
    """Return every import in the package."""
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in sources().items()}
    return tuple(found for module, tree in trees.items() for found in walk(module, tree, eager=True))


def own() -> list[Import]:
    """Return the imports of the package's own modules."""
    return [found for found in imports() if found.library == PACKAGE]


def foreign() -> list[Import]:
    """Return the imports of what is neither ours nor the standard library's."""
    return [found for found in imports() if found.library not in {PACKAGE, *sys.stdlib_module_names}]


def complain(wrong: Iterable[Import]) -> None:
    """Fail with one line for each wrong import."""
    message = "\n".join(map(str, wrong))
    assert not message, message


def test_every_module_has_a_place() -> None:
    homeless = {unit_of(module) for module in sources()} - LEVEL.keys()
    assert not homeless, "place these in LAYERS, as low as their imports allow"


def test_imports_go_downward() -> None:
    others = [found for found in own() if unit_of(found.target) != found.unit]
    complain(found for found in others if level_of(found.target) >= level_of(found.source))


def test_kernels_see_only_operands_and_errors() -> None:
    seen = {"errors", "ops.operands", "kernels"}
    of_kernels = [found for found in own() if found.source.startswith(f"{PACKAGE}.kernels.")]
    assert of_kernels
    complain(found for found in of_kernels if not found.target.removeprefix(f"{PACKAGE}.").startswith(tuple(seen)))
    others = [found for found in foreign() if found.source.startswith(f"{PACKAGE}.kernels.")]
    complain(found for found in others if found.library not in {"torch", "triton"})


def test_the_top_of_the_package_is_small() -> None:
    """What a newcomer sees first: five modules and ten folders, of which one, `former`, goes with the next release."""
    modules = {path.name for path in (ROOT / PACKAGE).glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "_version.py", "errors.py", "sampling.py"}
    assert {module.split(".")[1] for module in sources() if module.count(".") > 1} | {"former"} == {
        "apps", "calibration", "dropin", "engine", "former", "kernels", "models", "ops", "plan", "policies", "samplers"
    }  # fmt: skip


def test_libraries_are_declared() -> None:
    """Nothing but the dependencies of setup.py: neither bench nor tests, nor a top-level `kernels`."""
    known = EAGER_LIBRARIES | LAZY_LIBRARIES
    complain(found for found in foreign() if found.library not in ONLY_LIBRARIES.get(found.unit, known))


def test_heavy_libraries_are_imported_inside_functions() -> None:
    heavy = [found for found in foreign() if found.eager and found.library in LAZY_LIBRARIES]
    complain(found for found in heavy if found.library not in LOADED_WITH.get(found.unit, set()))


def test_imports_make_no_cycle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in sources()}
    for found in own():
        if found.eager and found.target != found.source:
            graph[found.source].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_kernels_is_not_a_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "transformers would take it for the hub's package"
    assert (ROOT / PACKAGE / "kernels").resolve() == ROOT / "kernels"


def test_import_is_light() -> None:
    """What `import ebcache_fast` loads beyond torch and numpy, in a fresh interpreter."""
    program = (
        "import json, sys, numpy, torch; before = set(sys.modules); "
        "import ebcache_fast; print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert PACKAGE in loaded
    assert not loaded & LAZY_LIBRARIES
