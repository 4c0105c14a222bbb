"""Policies at budgets: plans of equal cost, tables that are made once, and the picture of them."""

from itertools import pairwise
from pathlib import Path

import pytest
from tiny import tiny_dit

from ebcache_fast.apps import budgets
from ebcache_fast.apps.budgets import ALL, calibrated, methods_at, policies_of
from ebcache_fast.apps.cli import main
from ebcache_fast.apps.frontier import Point, _axis, _share, _ticks, draw_frontier
from ebcache_fast.apps.method_spec import Setting
from ebcache_fast.errors import InputError, TableError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.policies.at_cost import FAMILIES, at_cost
from ebcache_fast.policies.eps_scaling import eps_scaling
from ebcache_fast.samplers import make_sampler

MODEL = tiny_dit(3, depth=8)
SHAPE = as_denoiser(MODEL).shape
SETTING = Setting(SHAPE, 12, "ddim")
WHOLE = SETTING.uncached(12).macs(SHAPE)


def table_of(name: str, budget: float) -> CacheTable:
    return CacheTable.from_plan(at_cost("fora", SETTING.timesteps, WHOLE / budget, SHAPE))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("budget", [1.0, 1.5, 2.0, 2.4])
def test_the_plan_at_a_cost_is_the_nearest_that_there_is(name: str, budget: float) -> None:
    plan = at_cost(name, SETTING.timesteps, WHOLE / budget, SHAPE)
    costs = [other.macs(SHAPE) for other in FAMILIES[name](SETTING.timesteps, SHAPE)]
    assert abs(plan.macs(SHAPE) - WHOLE / budget) == min(abs(cost - WHOLE / budget) for cost in costs)
    assert plan.steps[0].computed == SHAPE.sites


def test_a_cost_that_a_policy_has_not() -> None:
    floor = max(plan.mac_limit(SHAPE) for plan in FAMILIES["fora"](SETTING.timesteps, SHAPE))
    with pytest.raises(
        TableError, match=rf"^policy 'fora': no plan of 12 .* from 1\.00 to {floor:.2f}, and {floor:.2f} "
    ):
        at_cost("fora", SETTING.timesteps, WHOLE / 30, SHAPE)
    with pytest.raises(
        TableError, match=r"^policy 'path': expected one of fora, taylorseer, hicache, power, which have"
    ):
        at_cost("path", SETTING.timesteps, WHOLE / 2, SHAPE)


def test_methods_of_all_policies_cost_alike() -> None:
    names = policies_of(["all"], "ddim")
    assert names == ALL
    methods = methods_at(names, [1.5, 2.0], SETTING, table_of)
    assert len(methods) == 1 + 2 * len(ALL)
    for budget, some in ((1.0, methods[:1]), (1.5, methods[1 : 1 + len(ALL)]), (2.0, methods[1 + len(ALL) :])):
        for method in some:
            assert WHOLE / method.plan.macs(SHAPE) == pytest.approx(budget, rel=0.08)
    assert [method.sampler for method in methods if "dpm" in method.name] == ["dpm-solver++"] * 2
    assert "dpm-solver++" not in policies_of(["all"], "ddpm")
    assert policies_of(["fora", "steps", "fora"], "ddpm") == ("fora", "steps")


@pytest.mark.parametrize(
    ("names", "budget", "problem"),
    [
        (["guess"], 1.5, r"^policy 'guess' is unknown; choose all, or from path, algorithm1, fora"),
        (["fora"], 0.5, r"^budget=0\.5 is below 1; give speed-ups"),
        (["fora"], 0.0, r"^budget=0 is below 1"),
        (["fora"], float("nan"), r"^budget=nan is below 1"),
        (["fora"], float("inf"), r"^budget=inf is below 1"),
    ],
)
def test_bad_input(names: list[str], budget: float, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        methods_at(policies_of(names, "ddim"), [2.0, budget], SETTING, table_of)


def test_a_table_is_made_once_and_held_against_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def counted(_: object, **options: object) -> CacheTable:
        asked.append(options)
        return table_of("", float(options["target_speedup"]))  # type: ignore[arg-type]

    monkeypatch.setattr(budgets, "calibrate", counted)
    make = calibrated(MODEL, SETTING, 1.5, tmp_path)
    tables = [make(name, budget) for name in ("path", "algorithm1") for budget in (1.5, 2.0) for _ in range(2)]
    assert len(asked) == 4
    assert tables[0] == tables[1]
    assert {options["method"] for options in asked} == {"path", "algorithm1"}
    other = calibrated(MODEL, Setting(SHAPE, 12, "ddpm"), 1.5, tmp_path)
    other("path", 1.5)  # of another sampler: another file
    assert len(asked) == 5
    (tmp_path / "path-ddim-12-1.5x.json").write_bytes((tmp_path / "path-ddim-12-2x.json").read_bytes()[:-9])
    with pytest.raises(TableError, match="expected strict JSON"):
        make("path", 1.5)
    nowhere = calibrated(MODEL, SETTING, 1.5, None)
    assert nowhere("path", 2.0) == nowhere("path", 2.0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = "--policies fora taylorseer steps --budget 1.5 2 --samples 32 --num-sampling-steps 6"
    assert main(["compare", *policies.split(), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("No cache, 6 steps", "fora, 1.5x", "taylorseer, 2x", "4 steps", "3 steps"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frontier.png", "report.json"]
    assert main(["compare", "--policies", "fora", "--methods", "fora:2"]) == 2
    assert "methods and policies are two ways to say the same" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the picture


def test_points_lie_where_the_axes_say() -> None:
    axis = _axis([1.5, 2.4])
    assert 0 < _share(1.5, axis) < _share(2.0, axis) < _share(2.4, axis) < 1
    for values in ([0.01, 0.4], [1.5, 2.5], [1.0, 1.001], [0.02]):
        ticks = _ticks(_axis(values))
        assert len(ticks) >= 1
        assert all(early < late for early, late in pairwise(ticks))


def test_every_policy_has_a_colour_in_the_picture() -> None:
    points = [Point(name, speedup, 0.1 * speedup) for name in ("path", "fora") for speedup in (1.5, 2.5)]
    picture = draw_frontier(points, "title")
    found = {colour for _, colour in picture.getcolors(2**24)}
    assert {(0x1F, 0x4E, 0x79), (0xE5, 0x9F, 0x2E)} <= found
    assert draw_frontier(points[:1], "one").size == picture.size


# --------------------------------------------------------------------------------------------- eps scaling


def test_scales_run_from_the_first_to_the_last_step() -> None:
    timesteps = make_sampler("ddim", 5).timesteps
    assert eps_scaling(timesteps, SHAPE, 0.9) == Plan.uncached(timesteps, SHAPE.sites, 0.9)
    linear = eps_scaling(timesteps, SHAPE, 0.9, 1.0)
    assert linear.eps_scale == 1
    assert [on_eps for on_eps, _ in linear.corrections] == pytest.approx([0.9, 0.925, 0.95, 0.975, 1.0])
    assert {on_x for _, on_x in linear.corrections} == {0}
    assert eps_scaling((9,), SHAPE, 0.9, 1.0).corrections == ((0.9, 0),)
