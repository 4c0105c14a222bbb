"""Methods by name: what each means, and one clear line for what is none."""

from pathlib import Path

import pytest
from tiny import tiny_dit

from ebcache_fast.cache_table import CacheTable, SamplerSpec
from ebcache_fast.errors import EBCacheError, InputError, TableError
from ebcache_fast.methods import METHODS, USAGES, Setting, open_table, parse_method
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan, StepType

NO_CACHE, ATTENTION, ATTN_MLP, MLP, *_ = StepType
T4 = (999, 666, 333, 0)
SHAPE = as_denoiser(tiny_dit()).shape
SETTING = Setting(SHAPE, steps=4, sampler="ddim")


def types(plan: Plan) -> list[StepType | None]:
    return [step.step_type for step in plan.steps]


@pytest.mark.parametrize(
    ("text", "expected", "timesteps"),
    [
        ("no-cache", [NO_CACHE] * 4, T4),
        ("fora:2", [NO_CACHE, NO_CACHE, ATTN_MLP, NO_CACHE], T4),
        ("fora:3", [NO_CACHE, ATTN_MLP, ATTN_MLP, NO_CACHE], T4),
        ("fora:1.5", [NO_CACHE, NO_CACHE, ATTN_MLP, NO_CACHE], T4),
        ("steps:2", [NO_CACHE] * 2, (999, 0)),
        ("eps-scale:0.98", [NO_CACHE] * 4, T4),
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
        assert parse_method(text, SETTING).plan.macs(SHAPE) > 0


def test_every_method_says_how_it_is_written() -> None:
    assert [usage.partition(":")[0] for usage in USAGES] == list(METHODS)


def test_a_table_by_name_and_by_file(tmp_path: Path) -> None:
    table = CacheTable(T4, [NO_CACHE, ATTENTION, ATTN_MLP, MLP], eps_scale=0.99)
    path = tmp_path / "mine.json"
    table.save(path)
    assert open_table(str(path)) == table
    assert open_table("fora-3-50") == CacheTable.named("fora-3-50")
    method = parse_method(f"table:{path}", SETTING)
    assert method.plan == table.plan(SHAPE)
    assert method.sampler == "ddim"  # the table does not say
    assert str(path) in method.name


def test_a_table_s_own_sampler_counts(tmp_path: Path) -> None:
    spec = SamplerSpec(name="ddpm", steps=4, train_steps=1000)
    CacheTable(T4, [NO_CACHE] * 4, sampler=spec).save(tmp_path / "t.json")
    assert parse_method(f"table:{tmp_path / 't.json'}", SETTING).sampler == "ddpm"


@pytest.mark.parametrize("text", ["nope", "", "FORA:2", "no_cache", "fora 2", ":2", "table.json"])
def test_an_unknown_method_lists_the_known_ones(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_method(text, SETTING)
    assert repr(text) in str(caught.value)
    assert all(usage in str(caught.value) for usage in USAGES)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fora", "could not convert"),
        ("fora:x", "could not convert"),
        ("steps", "invalid literal"),
        ("steps:2.5", "invalid literal"),
        ("eps-scale:", "could not convert"),
        ("eps-scale:1.001", r"b is outside \(0, 1\]"),
        ("eps-scale:0", r"b is outside \(0, 1\]"),
        ("eps-scale:-1", r"b is outside \(0, 1\]"),
        ("eps-scale:nan", r"b is outside \(0, 1\]"),
        ("no-cache:2", "it takes no argument"),
    ],
)
def test_a_bad_argument_shows_how_to_write_it(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=f"^method '{text}': {problem}.*; write it as one of {', '.join(USAGES)}$"):
        parse_method(text, SETTING)


@pytest.mark.parametrize(
    ("text", "kind", "problem"),
    [
        ("fora:0", TableError, "interval: expected 1 or more, got 0.0"),
        ("fora:nan", TableError, "interval: .* got nan"),
        ("fora:inf", TableError, "interval: .* got inf"),
        ("steps:0", InputError, r"steps=0 is outside \[1, 1000\]"),
        ("steps:1001", InputError, r"steps=1001 is outside \[1, 1000\]"),
        ("table:", TableError, "expected one of .*fora-2-50.*, got ''"),
        ("table:nope", TableError, "expected one of .*fora-2-50.*, got 'nope'"),
        ("table:missing.json", TableError, "missing.json: can't be read: No such file"),
        ("table:letters-ddpm-50-1.5x", TableError, "the table is for .*; use a table made for this model"),
    ],
)
def test_errors_of_what_is_called_come_through(text: str, kind: type[EBCacheError], problem: str) -> None:
    with pytest.raises(kind, match=problem):
        parse_method(text, SETTING)
