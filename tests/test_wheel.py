"""What gets installed: source archive -> wheel -> import, with nothing but setuptools and no network."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
from constants import ROOT

from ebcache_fast._version import __version__

PACKAGE = "ebcache_fast"
FILES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("kernels", PACKAGE, "tests", "bench")
JUNK = shutil.ignore_patterns("__pycache__", "*.egg-info")


def run_python(program: str, folder: Path, **environment: str) -> str:
    """Run a program in a fresh interpreter and return what it printed last."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def build(kind: str, source: Path, target: Path) -> Path:
    """Build the `kind` ("sdist" or "wheel") of a source folder and return the archive."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    return target / run_python(program, source)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel made from a source archive, that from a copy: old builds can lend it no files."""
    checkout, archives, unpacked = (tmp_path_factory.mktemp(name) for name in ("src", "dist", "sdist"))
    for name in FILES:
        shutil.copy(ROOT / name, checkout)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=JUNK)
    with tarfile.open(build("sdist", checkout, archives)) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, archives)


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """Return the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path, names: set[str]) -> Message:
    (name,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    with zipfile.ZipFile(wheel) as archive:
        return message_from_string(archive.read(name).decode())


def test_only_top_level_is_the_package(names: set[str]) -> None:
    """A top-level `kernels` would make transformers and diffusers unimportable."""
    assert {name.split("/")[0] for name in names} == {PACKAGE, f"{PACKAGE}-{__version__}.dist-info"}


def test_every_module_and_kernel_is_inside(names: set[str]) -> None:
    """The link ebcache_fast/kernels is followed by hand: globbing through links differs between Pythons."""
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE).rglob("*.py")}
    kernels = {f"{PACKAGE}/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | kernels


def test_every_asset_is_inside(names: set[str]) -> None:
    assets = {path for path in (ROOT / PACKAGE / "assets").rglob("*") if path.is_file()}
    expected = {path.relative_to(ROOT).as_posix() for path in {*assets, ROOT / PACKAGE / "py.typed"}}
    elsewhere = (".dist-info/", f"{PACKAGE}/kernels/")
    data = {name for name in names if not name.endswith(".py")}
    assert {name for name in data if not any(part in name for part in elsewhere)} == expected


def test_metadata(metadata: Message, names: set[str]) -> None:
    assert metadata["Name"] == "ebcache-fast"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert any(name.endswith("/LICENSE") for name in names)


def test_triton_is_required_on_linux_only(metadata: Message) -> None:
    (triton,) = (line for line in metadata.get_all("Requires-Dist", []) if line.startswith("triton"))
    assert 'sys_platform == "linux"' in triton


def test_wheel_imports_by_itself(wheel: Path, tmp_path: Path) -> None:
    """Away from the checkout: the package and its kernels are found, and no other `kernels` is."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = (
        "import ebcache_fast; from importlib.util import find_spec; "
        "print(ebcache_fast.__file__, find_spec('kernels'), sep='|')"
    )
    found, kernels = run_python(program, tmp_path, PYTHONPATH=str(tmp_path)).split("|")
    assert Path(found).is_relative_to(tmp_path)
    assert kernels == "None"
