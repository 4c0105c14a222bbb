"""The tables that the package comes with: what each is said to do, and a name that there is not."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from constants import ATTN_MLP, NO

from ebcache_fast.errors import TableError
from ebcache_fast.plan import StepType
from ebcache_fast.plan import table as cache_table
from ebcache_fast.plan.table import CacheTable, SamplerSpec, named_tables


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No test pulls the plug, so none need wait until the disk has everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def linspace_timesteps(T: int) -> tuple[int, ...]:
    """The DiT repository's respacing "T" of 1000 steps, first executed first."""
    return tuple(round(k * 999 / (T - 1)) for k in range(T - 1, -1, -1))


def eb_cache_released(T: int) -> list[StepType]:
    """Full at the first step, every 3rd at high noise, every 2nd in the middle, always at low noise."""
    full = [
        i == T - 1 or i < 0.2 * T or (T - 1 - i) % (3 if i > 0.8 * T else 2 if i > 0.4 * T else 1) == 0
        for i in range(T - 1, -1, -1)
    ]
    return [NO if f else ATTN_MLP for f in full]


def fora(interval: int, T: int) -> list[StepType]:
    return [NO if i == T - 1 or i % interval == 0 else ATTN_MLP for i in range(T - 1, -1, -1)]


def computing(steps: set[int], T: int) -> list[StepType]:
    return [NO if i in steps else ATTN_MLP for i in range(T)]


NAMED = {
    "eb-cache-released-50": ("ddpm", eb_cache_released(50)),
    "fora-2-50": ("ddpm", fora(2, 50)),
    "fora-3-50": ("ddpm", fora(3, 50)),
    "fora-4-50": ("ddpm", fora(4, 50)),
    "smoothcache-dit-xl2-ddim50-0.08": ("ddim", computing({0, 3, 5, *range(7, 50)}, 50)),
    "smoothcache-dit-xl2-ddim50-0.18": ("ddim", computing({0, 4, 7, *range(10, 50, 2), 49}, 50)),
    "smoothcache-dit-xl2-ddim70-0.08": ("ddim", computing({0, 4, 7, *range(10, 70, 2), 69}, 70)),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_tables_follow_their_rules(name: str, tmp_path: Path) -> None:
    sampler, step_types = NAMED[name]
    table = CacheTable.named(name)
    steps = len(step_types)
    assert table.step_types == tuple(step_types)
    assert table.timesteps == linspace_timesteps(steps)
    assert table.sampler == SamplerSpec(name=sampler, steps=steps, train_steps=1000)
    assert (table.eps_scale, table.allow_amplify, table.model) == (1.0, False, None)
    assert table.made is not None
    assert "arXiv" in table.made.by
    assert table.made.options["model"] == "DiT-XL/2"


def test_the_released_table_says_what_paper_and_release_scale_by() -> None:
    made = CacheTable.named("eb-cache-released-50").made
    assert made is not None
    assert made.options["paper_eps_scale"] == 0.955
    assert made.options["released_eps_scale"] == pytest.approx(1 / 0.965)


def test_every_named_table_loads_and_is_laid_out_as_saved(tmp_path: Path) -> None:
    assert set(NAMED) <= set(named_tables())
    for name in named_tables():
        CacheTable.named(name).save(tmp_path / "again.json")
        shipped = Path(cache_table.__file__).parents[1] / "assets" / "tables" / f"{name}.json"
        assert (tmp_path / "again.json").read_text() == shipped.read_text()


@pytest.mark.parametrize("name", ["", "fora", "../tables/fora-2-50", "fora-2-50.json", "/etc/passwd"])
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(TableError, match=r"^name: expected one of eb-cache-released-50, .*fora-2-50, .* got '"):
        CacheTable.named(name)
