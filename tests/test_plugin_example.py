"""A rule and a policy of another package: found by name, run by compare, kept in a table."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from constants import ROOT

from ebcache_fast.apps.bundled import load_letters
from ebcache_fast.apps.method_spec import METHODS, Setting, parse_method
from ebcache_fast.errors import InputError, TableError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan, registry
from ebcache_fast.policies import BUILT_IN
from ebcache_fast.policies.registry import RESERVED, PolicyRegistry


def setting() -> Setting:
    return Setting(as_denoiser(load_letters().model).shape, steps=4, sampler="ddim")


def test_no_policy_takes_a_name_of_compare() -> None:
    assert {*METHODS, *BUILT_IN} == RESERVED
    for name in RESERVED:
        with pytest.raises(TableError, match=f"^policy '{name}': the name is taken by compare; register it"):
            PolicyRegistry().register(name)(lambda timesteps, shape: None)
    with pytest.raises(TableError, match=r"^policy 'x': expected a function .* got 3"):
        PolicyRegistry().register("x")(3)


def test_a_registered_policy_is_a_method(monkeypatch: pytest.MonkeyPatch) -> None:
    policies = PolicyRegistry()
    monkeypatch.setattr("ebcache_fast.apps.method_spec.POLICIES", policies)

    @policies.register("half")
    def half(timesteps: tuple[float, ...], shape: object, argument: str = "none") -> Plan:
        if argument == "bad":
            raise ValueError("no\nsuch half")
        seen.append(argument)
        return setting().uncached(4)

    seen: list[str] = []
    for text in ("half", "half:2.5", "half:some"):
        method = parse_method(text, setting())
        assert (method.name, method.plan) == (text, setting().uncached(4))
    assert seen == ["none", "2.5", "some"]
    with pytest.raises(InputError, match=r"^method 'half:bad': ValueError: no; "):
        parse_method("half:bad", setting())
    with pytest.raises(InputError, match=r"^method 'third' is unknown; choose from no-cache, .*: expected one of half"):
        parse_method("third", setting())


@pytest.mark.parametrize("text", ["broken", "broken:2", "broken:fast"])
def test_a_policy_of_a_broken_package_says_what_broke(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other method goes on."""
    entry = EntryPoint("theirs", "nobody_s.policies", "ebcache_fast.policies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    monkeypatch.setattr("ebcache_fast.apps.method_spec.POLICIES", PolicyRegistry())
    with pytest.raises(InputError, match=rf"^method '{text}'.*entry point 'theirs' .* failed: ModuleNotFoundError: .*"):
        parse_method(text, setting())
    assert len(parse_method("fora:2", setting()).plan) == 4


@pytest.mark.slow
def test_a_package_of_its_own_is_found_and_run(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    shutil.copytree(ROOT / "tests" / "plugin_example", tmp_path / "source")
    site = tmp_path / "site"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}

    def done(*words: str) -> str:
        ran = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    done("-m", "pip", *install, str(tmp_path / "source"))
    command = "-m ebcache_fast compare --methods no-cache skip-layers:4 --samples 32 --num-sampling-steps 2"
    out = done(*command.split(), "--sampler", "ddim", "--device", "cpu")
    assert "skip-layers:4" in out
    assert "1 NO + 1 mixed" in out
    done("-c", KEEP)
    out = done("-m", "ebcache_fast", "table", "show", "t.json")  # a fresh process, which has to find the rule by name
    assert "NOx1 mixedx1" in out
    assert "sites: 8 layers of SELF_ATTN + MLP" in out


KEEP = """
from ebcache_fast import CacheTable
from ebcache_fast.apps.method_spec import Setting, parse_method
from ebcache_fast.models import as_denoiser
from ebcache_fast.apps.bundled import load_letters

setting = Setting(as_denoiser(load_letters().model).shape, steps=2, sampler="ddim")
CacheTable.from_plan(parse_method("skip-layers", setting).plan).save("t.json")
"""
