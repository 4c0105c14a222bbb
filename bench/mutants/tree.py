"""Copies of the tree to mutate, and which tests a file has."""

import ast
import compileall
import shutil
from collections.abc import Iterator
from pathlib import Path
from py_compile import PycInvalidationMode

from bench.mutants.errors import MutationError

PARTS = ("kernels", "ebcache_fast", "tests", "bench", "pyproject.toml")
UNUSED = shutil.ignore_patterns("__pycache__", "results", "*.egg-info", ".*")
PACKAGE = "ebcache_fast.kernels"
PLAN = "ebcache_fast/plan"
ENGINE = (PLAN, "ebcache_fast/engine", "ebcache_fast/dropin")
PLAN_TESTS = tuple(f"tests/test_{name}.py" for name in ("programs", "plan", "rules", "step_scheduler"))
ENGINE_ENTRIES = (  # what runs all of it
    "ebcache_fast.engine.engine",
    "ebcache_fast.dropin",
    "ebcache_fast.dropin.enable",
    "ebcache_fast.enable",
    "ebcache_fast.Engine",
)


def copy_tree(root: Path, target: Path) -> Path:
    """A copy of what tests of the kernels need; links stay links, so that the package's leads to the copy's kernels.

    Compiled files are kept by content, not by time: a mutant as long as its original and as young must not pass for it.
    """
    target.mkdir()
    for part in PARTS:
        source = root / part
        if source.is_dir():
            shutil.copytree(source, target / part, symlinks=True, ignore=UNUSED)
        elif source.is_file():
            shutil.copy(source, target / part)
    compileall.compile_dir(target, quiet=2, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return target


def kernel_files(root: Path) -> list[str]:
    """The files of kernels/, from the root."""
    files = sorted(f"kernels/{path.name}" for path in (root / "kernels").glob("*.py"))
    if not files:
        raise MutationError(f"{root / 'kernels'} holds no Python file; name the root of a checkout")
    return files


def engine_files(root: Path) -> list[str]:
    """The files of plans, of the engine, and of the forward over it, from the root."""
    return [f"{folder}/{path.name}" for folder in ENGINE for path in sorted((root / folder).glob("[!_]*.py"))]


def find_tests(root: Path, file: str) -> tuple[str, ...]:
    """The tests of a file, from the root.

    A kernel file has its own; a helper without any, those of what imports it. A file of the engine has its own too,
    those of our own loop, and those that run the engine over no kernels, which would take the interpreter's time. Files
    of plans have those that need no model.
    """
    if file.startswith(f"{PLAN}/"):
        return tuple(test for test in PLAN_TESTS if (root / test).exists())
    return _engine_tests(root, file) if file in engine_files(root) else _kernel_tests(root, file)


def _engine_tests(root: Path, file: str) -> tuple[str, ...]:
    def belongs(path: Path) -> bool:
        names = [*_imports(path)]
        runs_it = any(name.startswith(ENGINE_ENTRIES) for name in names)
        own = path.stem in (f"test_{Path(file).stem}", "test_sampling")
        return own or (runs_it and not any(map(_is_of_kernels, names)))

    def comes_late(path: Path) -> bool:
        return path.stem not in (f"test_{Path(file).stem}", "test_engine")  # those kill most, and soon

    found = sorted(path for path in (root / "tests").glob("test_*.py") if belongs(path))
    return tuple(f"tests/{path.name}" for path in sorted(found, key=comes_late))


def _is_of_kernels(name: str) -> bool:
    return name.startswith(PACKAGE)


def _kernel_tests(root: Path, file: str) -> tuple[str, ...]:
    own = f"tests/test_kernels_{Path(file).stem}"
    if found := [*root.glob(f"{own}.py"), *sorted(root.glob(f"{own}_*.py"))]:
        return tuple(f"tests/{path.name}" for path in found)
    importers = [other for other in kernel_files(root) if Path(file).stem in imports(root / other)]
    tests = {test for other in importers for test in _kernel_tests(root, other)}
    if not tests:
        raise MutationError(f"{file} has no test: neither {own}.py nor one of a kernel that imports it; write one")
    return tuple(sorted(tests))


def imports(path: Path) -> set[str]:
    """The modules of the kernels' package that a file imports, by their own names."""
    return {name.removeprefix(f"{PACKAGE}.") for name in _imports(path) if name.startswith(f"{PACKAGE}.")}


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parent = ".".join(filter(None, (PACKAGE if level else "", module)))
                yield parent
                yield from (f"{parent}.{alias.name}" for alias in names)
