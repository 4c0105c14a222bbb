"""The cache table: what it accepts, what its file holds, and that no wrong file passes for a table."""

import copy
import os
import pickle
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from constants import ATTENTION, ATTN_MLP, MLP, NO
from full_table import FULL

from ebcache_fast.errors import TableError
from ebcache_fast.plan import Branch, ModelShape, Plan, SiteShape, StepPlan, StepType, layered, repeated
from ebcache_fast.plan.table import CacheTable, Provenance, SamplerSpec
from ebcache_fast.plan.table_schema import StepName

SHAPE = ModelShape(
    width=8,
    tokens=4,
    site_shapes=repeated(2, (SiteShape(0, Branch.SELF_ATTN, 10, 10), SiteShape(0, Branch.MLP, 20, 20))),
    fixed_macs=1,
    fixed_weights=1,
    sizes=(("depth", 2), ("width", 8)),
)


@pytest.fixture(scope="module", autouse=True)
def quick_disk() -> Iterator[None]:
    """No test pulls the plug, so none need wait until the disk has everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


# Making one in code


def test_every_field_but_the_two_sequences_is_optional() -> None:
    table = CacheTable(timesteps=[2, 1], step_types=[NO, MLP])
    assert table.timesteps == (2, 1)
    assert table.step_types == (NO, MLP)
    assert (table.eps_scale, table.allow_amplify) == (1.0, False)
    assert (table.sampler, table.model, table.made) == (None, None, None)
    assert len(table) == 2


@pytest.mark.parametrize(
    "timesteps",
    [(999.0, 799.2, 0.0), np.array([999, 799.2, 0]), np.array([999, 799.2, 0]).tolist(), torch.tensor([999, 799.2, 0])],
)
def test_whole_timesteps_become_ints_and_others_stay_as_they_are(timesteps: Any) -> None:
    table = CacheTable(timesteps, [0, 1, 2])
    assert [type(t) for t in table.timesteps] == [int, float, int]
    assert table.timesteps == tuple(float(t) for t in timesteps)
    plan = Plan.uncached(timesteps, layered(1, (Branch.MLP,)))
    assert repr(plan.timesteps) == repr(table.timesteps)


def test_half_precision_is_taken_as_it_is() -> None:
    assert CacheTable(torch.tensor([999, 990], dtype=torch.bfloat16), [0, 1]).timesteps == (1000, 992)


def test_arrays_and_codes_become_plain_ints_and_step_types() -> None:
    table = CacheTable(np.array([5, 3]), np.array([0, 2]), eps_scale=np.float32(0.5))
    assert table == CacheTable([5, 3], [NO, ATTN_MLP], 0.5)
    assert [type(t) for t in table.timesteps] == [int, int]
    assert table.step_types[1] is ATTN_MLP
    assert type(table.eps_scale) is float


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"timesteps": []}, "timesteps: expected at least one"),
        ({"timesteps": [3, 3, 1]}, r"timesteps\[1\]: expected less than 3"),
        ({"timesteps": [1, 2, 3]}, r"timesteps\[1\]: expected less than 1"),
        ({"timesteps": [2, 1, -1]}, r"timesteps\[2\]: expected a number from 0 to \d+, got -1"),
        ({"timesteps": [2, 1, False]}, r"timesteps\[2\]: .* got False"),
        ({"timesteps": [2.5, 1.5, -0.5]}, r"timesteps\[2\]: expected a number .* got -0\.5"),
        ({"timesteps": [float("inf"), 1, 0]}, r"timesteps\[0\]: .* got inf"),
        ({"timesteps": [2, float("nan"), 0]}, r"timesteps\[1\]: .* got nan"),
        ({"timesteps": [2, 1j, 0]}, r"timesteps\[1\]: .* got 1j"),
        ({"timesteps": [2.0**63, 1, 0]}, r"timesteps\[0\]: "),
        ({"timesteps": [9.5, 9.5, 0]}, r"timesteps\[1\]: expected less than 9\.5, .* Heun's .* use another one"),
        ({"timesteps": np.ones((3, 1))}, r"timesteps\[0\]: "),
        ({"timesteps": ["2", 1, 0]}, r"timesteps\[0\]: .* got '2'"),
        ({"timesteps": [10**5000, 1, 0]}, r"timesteps\[0\]: .* beyond 64 bits"),
        ({"timesteps": [2**63, 1, 0]}, r"timesteps\[0\]: "),
        ({"timesteps": [1000, 1, 0]}, r"timesteps\[0\]: expected less than sampler.train_steps, 1000"),
        ({"timesteps": [2, 1]}, "step_types: expected 2, one per timestep, got 3"),
        ({"step_types": [NO]}, "step_types: expected 3"),
        (
            {"step_types": [ATTENTION, ATTENTION, NO]},
            r"step_types\[0\]: expected NO_CACHE, got ATTENTION",
        ),
        ({"step_types": [0, 8, 0]}, r"step_types\[1\]: expected an integer from 0 to 7, got 8"),
        ({"step_types": [0, True, 0]}, r"step_types\[1\]: .* got True"),
        ({"step_types": [0, 2.0, 0]}, r"step_types\[1\]: .* got 2\.0"),
        ({"step_types": [0, "MLP", 0]}, r"step_types\[1\]: .* got 'MLP'"),
        ({"eps_scale": 0}, "eps_scale: .* got 0; "),
        ({"eps_scale": -0.5}, "eps_scale: .* got -0.5; "),
        ({"eps_scale": 1.001}, "eps_scale: .* at most 1, got 1.001; with allow_amplify"),
        ({"eps_scale": True}, "eps_scale: "),
        ({"eps_scale": "0.9"}, "eps_scale: "),
        ({"eps_scale": float("nan")}, "eps_scale: "),
        ({"eps_scale": float("inf"), "allow_amplify": True}, "eps_scale: "),
        ({"eps_scale": 10**5000, "allow_amplify": True}, "eps_scale: .* beyond 64 bits"),
        ({"model": {"depth": -1}}, "model.depth: "),
        ({"model": {"depth": 2.0}}, "model.depth: "),
        ({"sampler": SamplerSpec(name="ddim", steps=4, train_steps=1000)}, "sampler.steps: expected 3"),
        ({"made": Provenance(by="x", source="", errors={"MLP": (1.0,)})}, "made.errors.MLP: expected 3"),
        ({"made": Provenance(by="x", source="", votes={"MLP": (1,)})}, "made.votes.MLP: expected 3"),
    ],
)
def test_what_a_table_can_not_be(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(TableError, match=f"^{problem}"):
        replace(FULL, **change)


@pytest.mark.parametrize("eps_scale", [1 / 0.965, 7, Fraction(3, 2)])
def test_amplifying_is_possible_but_deliberate(eps_scale: float, tmp_path: Path) -> None:
    table = CacheTable([0], [NO], eps_scale, allow_amplify=True)
    assert table.eps_scale == eps_scale
    table.save(tmp_path / "t.json")
    assert CacheTable.load(tmp_path / "t.json") == table


@pytest.mark.parametrize(
    ("record", "values", "problem"),
    [
        (SamplerSpec, {"name": "DDPM", "steps": 1, "train_steps": 2}, "name: "),
        (
            SamplerSpec,
            {"name": "ddpm", "steps": "1", "train_steps": 2},
            "steps: expected a valid integer, got '1'",
        ),
        (SamplerSpec, {"name": "ddpm", "steps": 1}, "train_steps: missing"),
        (Provenance, {"by": "x", "source": "", "note": ""}, "note: unknown key"),
        (Provenance, {"by": 1, "source": ""}, "by: "),
        (Provenance, {"by": "x", "source": "", "options": {"a": [1]}}, "options.a: expected a finite number"),
        (Provenance, {"by": "x", "source": "", "options": {"a": float("inf")}}, "options.a: "),
        (Provenance, {"by": "x", "source": "", "options": {"a": 2**70}}, "options.a: .* beyond 64 bits"),
        (Provenance, {"by": "x", "source": "", "errors": {"MLP": (0.5, -1)}}, r"errors.MLP\[1\]: .* got -1"),
        (Provenance, {"by": "x", "source": "", "errors": {"MLP": (float("nan"),)}}, r"errors.MLP\[0\]: "),
        (Provenance, {"by": "x", "source": "", "votes": {"OTHER": (1,)}}, "votes.OTHER"),
        (Provenance, {"by": "x", "source": "", "votes": {"MLP": (1.5,)}}, r"votes.MLP\[0\]: "),
    ],
)
def test_records_are_as_strict_as_the_table(
    record: type[SamplerSpec | Provenance], values: dict[str, Any], problem: str
) -> None:
    with pytest.raises(TableError, match=f"^{problem}"):
        record(**values)


def test_step_names_of_the_file_are_the_step_types() -> None:
    assert list(get_args(StepName)) == [step_type.name for step_type in StepType]


def test_tables_are_immutable_values() -> None:
    same = replace(FULL, model=(("depth", 2), ("width", 8)))
    assert same == FULL
    assert hash(same) == hash(FULL)
    assert copy.deepcopy(FULL) == pickle.loads(pickle.dumps(FULL)) == FULL
    for other in (replace(FULL, eps_scale=0.9), replace(FULL, model=None), replace(FULL, made=None)):
        assert other != FULL
    with pytest.raises(FrozenInstanceError):
        FULL.eps_scale = 1.0  # type: ignore[misc]


# Using one


def test_step_type_at() -> None:
    assert [FULL.step_type_at(t) for t in (0, 500, 999)] == [ATTENTION, ATTN_MLP, NO]
    with pytest.raises(TableError, match=r"^timestep: expected one of the table's, \(999, 500, 0\), got 501"):
        FULL.step_type_at(501)


def test_retime_keeps_all_but_the_sampler() -> None:
    moved = FULL.retime(np.array([980, 490, 1]))
    assert moved == replace(FULL, timesteps=(980, 490, 1), sampler=None)
    ddim = SamplerSpec(name="ddim", steps=3, train_steps=1000)
    assert FULL.retime((980, 490, 1), ddim).sampler == ddim
    with pytest.raises(TableError, match=r"^timesteps\[1\]: "):
        FULL.retime([1, 2, 3])


def test_plan_follows_the_table() -> None:
    plan = FULL.plan(SHAPE)
    branches = (Branch.SELF_ATTN, Branch.MLP)
    assert plan.steps == tuple(StepPlan.uniform(t, layered(2, branches)) for t in FULL.step_types)
    assert (plan.timesteps, plan.eps_scale) == (FULL.timesteps, 0.955)


def test_check_accepts_the_model_and_timesteps_the_table_is_for() -> None:
    FULL.check(SHAPE, FULL.timesteps)
    other_model = replace(SHAPE, sizes=(("depth", 4),))
    replace(FULL, model=None).check(other_model, np.array(FULL.timesteps))


def test_another_model_is_refused_with_every_difference() -> None:
    other = replace(SHAPE, sizes=(("depth", 4), ("width", 8), ("heads", 2)))
    for ask in (FULL.plan, lambda shape: FULL.check(shape, FULL.timesteps)):
        with pytest.raises(TableError, match=r"^model: the table is for depth 2, not 4; heads None, not 2; use"):
            ask(other)


@pytest.mark.parametrize("bound", [{"in_channels": 4}, {"in_channels": 8}, {}])
def test_what_a_model_is_given_beside_latents_does_not_matter(bound: dict[str, int], tmp_path: Path) -> None:
    """Files that were bound to it are read as before."""
    replace(FULL, model={"width": 8, "depth": 2, **bound}).save(tmp_path / "t.json")
    for sizes in (SHAPE.sizes, (*SHAPE.sizes, ("in_channels", 4))):
        CacheTable.load(tmp_path / "t.json").check(replace(SHAPE, sizes=sizes), FULL.timesteps)


def test_other_timesteps_are_refused() -> None:
    with pytest.raises(TableError, match=r"^timesteps\[1\]: expected the table's 500, got 490; retime"):
        FULL.check(SHAPE, [999, 490, 0])
    with pytest.raises(TableError, match=r"^timesteps: expected the table's 3 steps, got 4"):
        FULL.check(SHAPE, [999, 500, 250, 0])


# The file


# Writing it


# Named tables
