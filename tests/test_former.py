"""Former paths and names: they keep working, give the very things that stand elsewhere now, and say so."""

import subprocess
import sys
import warnings
from importlib import import_module

import pytest
from test_imports import sources

import ebcache_fast
from ebcache_fast import EngineOptions, calibration, models, ops
from ebcache_fast.calibration.search import calibrate
from ebcache_fast.errors import InputError
from ebcache_fast.former import MODULES, former_name, install


@pytest.mark.parametrize("name", MODULES)
def test_every_former_module_is_the_moved_one(name: str) -> None:
    former, now = f"ebcache_fast.{name}", f"ebcache_fast.{MODULES[name]}"
    assert former not in sources(), "a path in use is no former one"
    sys.modules.pop(former, None)
    with pytest.warns(DeprecationWarning, match=rf"{former} will go .*; use {now}"):
        assert import_module(former) is import_module(now)


def test_they_are_imported_in_every_way() -> None:
    """In a process of its own, where none of them was imported before."""
    program = """
import ebcache_fast.presets
from ebcache_fast import table_importers
from ebcache_fast.cache_table import CacheTable
from ebcache_fast.models.denoiser import Context
from ebcache_fast.operands import At
from ebcache_fast.quality.scoring import *
from ebcache_fast.apps.quality import scoring
from ebcache_fast.plan import importers
assert ebcache_fast.presets.__name__ == "ebcache_fast.apps.bundled", ebcache_fast.presets
assert ebcache_fast.quality.scoring is scoring
assert table_importers is importers
assert CacheTable is ebcache_fast.CacheTable
assert At.__name__ == "StepIndex"
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_a_former_module_is_an_attribute_of_the_package() -> None:
    vars(ebcache_fast).pop("presets", None)
    with pytest.warns(DeprecationWarning, match=r"ebcache_fast\.presets will go .*apps\.bundled") as caught:
        assert ebcache_fast.presets is import_module("ebcache_fast.apps.bundled")
    assert caught[0].filename == __file__
    with pytest.raises(AttributeError, match="'ebcache_fast' has no attribute 'nothing'"):
        _ = ebcache_fast.nothing


def test_the_warning_names_the_line_that_imports() -> None:
    sys.modules.pop("ebcache_fast.presets", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import ebcache_fast.presets  # noqa: F401
    assert [warning.filename for warning in caught] == [__file__]


def test_modules_that_became_folders_give_what_they_had() -> None:
    with pytest.warns(DeprecationWarning, match=r"use ebcache_fast\.ops\.operations\.TORCH"):
        assert ops.TORCH is ops.operations.TORCH
    with pytest.warns(DeprecationWarning, match=r"use ebcache_fast\.calibration\.search\.calibrate"):
        assert calibration.calibrate is calibrate
    for folder in (ops, calibration):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = folder.nothing


def test_former_names_of_the_models() -> None:
    with pytest.warns(DeprecationWarning, match=r"models\.PixArtContext will go .*PixArtConditioning"):
        assert models.PixArtContext is models.PixArtConditioning
    with pytest.raises(AttributeError, match="no attribute 'Pixels'"):
        former_name("ebcache_fast.models", "Pixels")


def test_former_options() -> None:
    with pytest.warns(DeprecationWarning, match="pdl") as caught:
        assert EngineOptions(dependent_launch=True) == EngineOptions(pdl=True)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_former_options_do_not_contradict_those_of_now() -> None:
    for value in (True, False):
        assert EngineOptions(pdl=value, dependent_launch=value).pdl is value
    with pytest.raises(InputError, match=r"^pdl=True contradicts dependent_launch=False.*pass pdl alone"):
        EngineOptions(pdl=True, dependent_launch=False)
    with pytest.raises(InputError, match=r"^pdl='no' is neither True nor False"):
        EngineOptions(pdl="no", dependent_launch=True)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^dependent_launch='no' is neither True nor False"):
        EngineOptions(dependent_launch="no")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_unknown_modules_stay_unknown() -> None:
    for name in ("ebcache_fast.nothing", "ebcache_fast.engine.nothing", "ebcache_fast.presets.nothing"):
        with pytest.raises(ModuleNotFoundError):
            import_module(name)


def test_they_are_found_once() -> None:
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before
