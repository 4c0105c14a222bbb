"""Methods by name: what each means, and one clear line for what is none."""

import re
import sys
from pathlib import Path

import pytest
from constants import ATTENTION, ATTN_MLP, MLP, NO
from tiny import tiny_dit

from ebcache_fast.apps.bundled import load_letters
from ebcache_fast.apps.method_spec import METHODS, USAGES, Setting, default_methods, open_table, parse_method
from ebcache_fast.errors import EBCacheError, InputError, TableError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan, StepType
from ebcache_fast.plan.table import CacheTable, SamplerSpec
from ebcache_fast.policies import BUILT_IN

T4 = (999, 666, 333, 0)
SHAPE = as_denoiser(tiny_dit()).shape
SETTING = Setting(SHAPE, steps=4, sampler="ddim")


def types(plan: Plan) -> list[StepType | None]:
    return [step.step_type for step in plan.steps]


@pytest.mark.parametrize(
    ("text", "expected", "timesteps"),
    [
        ("no-cache", [NO] * 4, T4),
        ("fora:2", [NO, NO, ATTN_MLP, NO], T4),
        ("fora:3", [NO, ATTN_MLP, ATTN_MLP, NO], T4),
        ("fora:1.5", [NO, NO, ATTN_MLP, NO], T4),
        ("steps:2", [NO] * 2, (999, 0)),
        ("eps-scale:0.98", [NO] * 4, T4),
    ],
)
def test_what_each_name_means(text: str, expected: list[StepType], timesteps: tuple[int, ...]) -> None:
    method = parse_method(text, SETTING)
    assert types(method.plan) == expected
    assert method.plan.timesteps == timesteps
    assert method.sampler == "ddim"
    assert method.plan.eps_scale == (0.98 if text.startswith("eps-scale") else 1)
    assert text.partition(":")[2] in method.name


def test_a_plan_fits_the_model() -> None:
    for text in ("no-cache", "fora:2", "steps:3", "eps-scale:1", "table:fora-2-50"):
        assert parse_method(text, Setting(SHAPE, 4, "ddpm")).plan.macs(SHAPE) > 0


def test_every_method_says_how_it_is_written() -> None:
    assert [usage.partition(":")[0] for usage in USAGES] == [*METHODS, *BUILT_IN, "MODULE", "FILE.py"]


def test_a_table_by_name_and_by_file(tmp_path: Path) -> None:
    table = CacheTable(T4, [NO, ATTENTION, ATTN_MLP, MLP], eps_scale=0.99)
    path = tmp_path / "mine.json"
    table.save(path)
    assert open_table(str(path)) == table
    assert open_table("fora-3-50") == CacheTable.named("fora-3-50")
    method = parse_method(f"table:{path}", SETTING)
    assert method.plan == table.plan(SHAPE)
    assert method.sampler == "ddim"  # the table does not say
    assert str(path) in method.name


@pytest.mark.parametrize("spec", [("ddpm", 1000), ("ddim", 500), ("dpm-solver++", 1000)])
def test_a_table_for_another_sampler_is_refused(spec: tuple[str, int], tmp_path: Path) -> None:
    """It would get other noise than the methods beside it; retimed, it says that it is for any."""
    table = CacheTable((499, 333, 166, 0), [NO] * 4, sampler=SamplerSpec(name=spec[0], steps=4, train_steps=spec[1]))
    path = tmp_path / "t.json"
    table.save(path)
    remedy = rf"pass --sampler {re.escape(spec[0])}, or retime\(timesteps\) the table"
    with pytest.raises(
        TableError, match=f"is for the sampler '{re.escape(spec[0])}' over {spec[1]} .*'ddim'.*{remedy}"
    ):
        parse_method(f"table:{path}", SETTING)
    table.retime(SETTING.timesteps).save(path)
    method = parse_method(f"table:{path}", SETTING)
    assert (method.sampler, method.plan.timesteps) == ("ddim", T4)


OWN = """
from ebcache_fast import CacheTable, StepType
from ebcache_fast.plan import Plan
from ebcache_fast.policies import fora

def every_third(timesteps, shape):
    return fora(timesteps, 3, shape)

def last_reused(timesteps, shape):
    return CacheTable(timesteps, [0] * (len(timesteps) - 1) + [StepType.ATTN_MLP])

def stranger(timesteps, shape):
    return list(timesteps)

def too_late(timesteps, shape):
    return CacheTable([2000, 0], [0, 0])

def fails(timesteps, shape):
    return 1 / 0

def leaves(timesteps, shape):
    raise SystemExit("enough\\nof it")

def of_another(timesteps, shape):
    return Plan.uncached(timesteps, shape.sites[:2])
"""


def test_a_function_of_one_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a folder").mkdir()
    (tmp_path / "a folder" / "my-own.py").write_text(OWN)
    (tmp_path / "policies_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    before = [*sys.path]
    for where in ("policies_of_mine", "a folder/my-own.py", str(tmp_path / "policies_of_mine.py")):
        method = parse_method(f"{where}:every_third", SETTING)
        assert (types(method.plan), method.sampler) == ([NO, ATTN_MLP, ATTN_MLP, NO], "ddim")
        assert where in method.name
        assert types(parse_method(f"{where}:last_reused", SETTING).plan)[-1] is ATTN_MLP
        for function, problem in (
            ("stranger", "it returns 'list'; return a Plan or a CacheTable"),
            ("fails", r"ZeroDivisionError: division by zero; name a function \(timesteps, shape\)"),
            ("leaves", "SystemExit: enough; name a function"),
            ("missing", "AttributeError: .* 'missing'; name a function"),
        ):
            with pytest.raises(InputError, match=f"^method '{re.escape(where)}:{function}': {problem}"):
                parse_method(f"{where}:{function}", SETTING)
        for function, problem in (("too_late", "2000"), ("of_another", "make the plan for this model")):
            with pytest.raises(EBCacheError, match=f"^method '{re.escape(where)}:{function}': (?!method).*({problem})"):
                parse_method(f"{where}:{function}", SETTING)
    assert sys.path == before
    with pytest.raises(InputError, match="ModuleNotFoundError: No module named 'nobody_s'; name a function"):
        parse_method("nobody_s:policy", SETTING)
    with pytest.raises(InputError, match=r"FileNotFoundError: .*missing\.py"):
        parse_method("missing.py:policy", SETTING)


def test_what_is_compared_where_nothing_is_named() -> None:
    """The tables for this very setting, whatever it is, and fewer steps at two thirds and two fifths of the cost."""
    letters = as_denoiser(load_letters().model).shape
    both = [f"table:letters-{which}-{x}x" for which in ("SETTING", "path-SETTING") for x in (1.5, 2.5)]
    tables = [table.replace("SETTING", "ddpm-50") for table in both]
    rest = ["fora:2", "fora:3", "steps:33", "steps:20", "eps-scale:0.98"]
    assert list(default_methods(Setting(letters, 50, "ddpm"))) == ["no-cache", *tables, *rest]
    assert list(default_methods(Setting(SHAPE, 50, "ddpm"))) == ["no-cache", *rest]
    few = default_methods(Setting(letters, 20, "ddim"))
    assert list(few[1:5]) == [table.replace("SETTING", "ddim-20") for table in both]
    for steps in (1, 2, 3, 20, 1000):
        for sampler in ("ddim", "ddpm"):
            setting = Setting(letters, steps, sampler)
            assert all(parse_method(text, setting).sampler == sampler for text in default_methods(setting))


@pytest.mark.parametrize("text", ["nope", "", "FORA:2", "no_cache", "fora 2", ":2", "table.json"])
def test_an_unknown_method_lists_the_known_ones(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_method(text, SETTING)
    assert repr(text) in str(caught.value)
    assert all(usage in str(caught.value) for usage in USAGES)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fora", "it takes an argument, as fora:N"),
        ("fora:x", "could not convert"),
        ("fora:", "it takes an argument, as fora:N"),
        ("steps", "it takes an argument, as steps:N"),
        ("steps:2.5", "invalid literal"),
        ("eps-scale:", "it takes an argument, as eps-scale:B"),
        ("eps-scale:0.9:x", "could not convert"),
        ("no-cache:2", "it takes no argument"),
    ],
)
def test_a_bad_argument_shows_how_to_write_it(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"^method '{text}': {problem}.*; write it as one of {', '.join(USAGES)}$"):
        parse_method(text, SETTING)


@pytest.mark.parametrize(
    ("text", "kind", "problem"),
    [
        ("eps-scale:1.001", TableError, r"first: b is outside \(0, 1\]: 1\.001; 1 leaves the noise as it is"),
        ("eps-scale:0", TableError, r"first: b is outside \(0, 1\]: 0"),
        ("eps-scale:-1", TableError, r"first: b is outside \(0, 1\]: -1"),
        ("eps-scale:nan", TableError, r"first: b is outside \(0, 1\]: nan"),
        ("eps-scale:0.9:1.1", TableError, r"last: b is outside \(0, 1\]: 1\.1"),
        ("fora:0", TableError, "interval: expected 1 or more, got 0.0"),
        ("fora:nan", TableError, "interval: .* got nan"),
        ("fora:inf", TableError, "interval: .* got inf"),
        ("steps:0", InputError, r"steps=0 is outside \[1, 1000\]"),
        ("steps:1001", InputError, r"steps=1001 is outside \[1, 1000\]"),
        ("table:", TableError, "expected .*one of .*fora-2-50.*, got ''"),
        ("table:nope", TableError, "expected .*one of .*fora-2-50.*, got 'nope'"),
        ("table:missing.json", TableError, "missing.json: can't be read: No such file"),
        ("table:letters-ddpm-50-1.5x", TableError, "the table is for .*; use a table made for this model"),
    ],
)
def test_errors_of_what_is_called_come_through(text: str, kind: type[EBCacheError], problem: str) -> None:
    with pytest.raises(kind, match=f"^method {re.escape(repr(text))}: (?!method).*{problem}"):
        parse_method(text, SETTING)
