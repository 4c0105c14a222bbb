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
KERNEL_TESTS = ("tests/test_kernels.py", "tests/test_kernels_refused.py")  # of all kernels; an id begins with the file
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
    """The tests of a file, from the root, as arguments for pytest.

    A kernel file has its own, and its cases of what holds for all kernels; a helper without any, those of what imports
    it. A file of the engine has its own too,
    those of our own loop, and those that run the engine over no kernels, which would take the interpreter's time. Files
    of plans have those that need no model.
    """
    if file.startswith(f"{PLAN}/"):
        return tuple(test for test in PLAN_TESTS if (root / test).exists())
    if file in engine_files(root):
        return _engine_tests(root, file)
    stems = sorted(_kernels_with_tests(root, Path(file).stem))
    if not stems:
        raise MutationError(
            f"{file} has no test: neither tests/test_kernels_{Path(file).stem}.py nor one of a kernel that imports it; "
            "write one"
        )
    own = tuple(test for stem in stems for test in _own_tests(root, stem))
    shared = tuple(test for test in KERNEL_TESTS if (root / test).exists())
    words = " or ".join(word for stem in stems for word in (f"test_kernels_{stem}", f"[{stem}."))
    return (*own, *shared, "-k", words) if shared else own


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


def _own_tests(root: Path, stem: str) -> list[str]:
    own = f"tests/test_kernels_{stem}"
    return [f"tests/{path.name}" for path in (*root.glob(f"{own}.py"), *sorted(root.glob(f"{own}_*.py")))]


def _kernels_with_tests(root: Path, stem: str) -> set[str]:
    """A kernel file that has tests, or those of what imports it."""
    if _own_tests(root, stem):
        return {stem}
    importers = [path for path in kernel_files(root) if stem in imports(root / path)]
    return {found for path in importers for found in _kernels_with_tests(root, Path(path).stem)}


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
