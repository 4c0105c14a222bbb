"""Tables as masks and bins: what cache-dit makes of the bins is the mask, and what neither says is refused."""

import json
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_dit

from ebcache_fast.apps.cli import main
from ebcache_fast.errors import TableError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import StepType
from ebcache_fast.plan.exporters import bins, steps_mask
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.policies import delta_dit, forecast, pab

SHAPE = as_denoiser(tiny_dit()).shape
TIMESTEPS = tuple(range(12))[::-1]
MASK = [1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0]


def table_of(mask: list[int]) -> CacheTable:
    types = [StepType.NO_CACHE if computes else StepType.ATTN_MLP for computes in mask]
    return CacheTable(range(len(mask))[::-1], types)


def test_a_table_of_types_and_one_of_forecasts_are_the_same_mask() -> None:
    path = forecast(TIMESTEPS, SHAPE, [i for i, computes in enumerate(MASK) if computes], 2)
    for table in (table_of(MASK), CacheTable.from_plan(path)):
        assert steps_mask(table) == MASK
        assert bins(table) == ((2, 1, 3), (2, 1, 3))


@given(st.lists(st.integers(0, 1), max_size=30))
def test_bins_are_the_lengths_of_the_mask(rest: list[int]) -> None:
    mask = [1, *rest]
    compute, cache = bins(table_of(mask))
    assert len(compute) - len(cache) in (0, 1)
    both = chain.from_iterable(([1] * c, [0] * (cache[i] if i < len(cache) else 0)) for i, c in enumerate(compute))
    assert list(chain.from_iterable(both)) == mask


def test_cache_dit_makes_the_mask_of_the_bins() -> None:
    cache_dit = pytest.importorskip("cache_dit")
    compute, cache = bins(table_of(MASK))
    assert cache_dit.steps_mask(compute_bins=list(compute), cache_bins=list(cache)) == MASK


def test_what_a_mask_can_not_say_is_refused() -> None:
    attention = CacheTable(range(3)[::-1], [StepType.NO_CACHE, StepType.ATTENTION, StepType.NO_CACHE])
    for table, step, name in (
        (attention, 1, "ATTENTION"),
        (CacheTable.from_plan(pab(TIMESTEPS, SHAPE, dict.fromkeys(SHAPE.branches[:1], 2), (0, 99))), 1, "ATTENTION"),
        (CacheTable.from_plan(delta_dit(TIMESTEPS, SHAPE, 1)), 1, "MIXED"),
    ):
        for export in (steps_mask, bins):
            with pytest.raises(TableError, match=rf"^steps\[{step}\]: expected a step that .* nothing, got {name}; "):
                export(table)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table_of(MASK).save(tmp_path / "t.json")
    assert main(["table", "export", str(tmp_path / "t.json")]) == 0
    assert json.loads(capsys.readouterr().out) == MASK
    out = tmp_path / "bins.json"
    assert main(["table", "export", str(tmp_path / "t.json"), "--kind", "bins", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == {"compute_bins": [2, 1, 3], "cache_bins": [2, 1, 3]}
    assert main(["table", "export", "smoothcache-dit-xl2-ddim50-0.08"]) == 0
    assert main(["table", "export", str(tmp_path / "t.json"), "--out", str(tmp_path)]) == 2
    assert "not a regular file" in capsys.readouterr().err
