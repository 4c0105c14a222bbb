"""What is said beforehand of a run is what stats say after it; stats are plain, and speak to people."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from constants import NO
from diffusers_kinds import COG_2B, DIT, SIGMA, TYPES, Kind, table_of, timesteps

from ebcache_fast import Plan, dry_check, enable, stats
from ebcache_fast.errors import InputError, TableError
from ebcache_fast.models import as_denoiser

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.mark.parametrize("steps", [5, 3, 8])
@pytest.mark.parametrize("kind", [DIT, SIGMA], ids=str)
def test_it_says_what_a_run_then_does(kind: Kind, steps: int) -> None:
    pipe, before = kind.pipeline(), None
    table = table_of(pipe)
    told = dry_check(pipe, table, steps)
    assert before is None
    assert "forward" not in vars(pipe.transformer)
    enable(pipe, table)
    kind.draw(pipe, steps=steps)
    done = stats(pipe)
    assert told.steps == sum(done.steps.values()) == len(timesteps(pipe, steps))
    assert told.hits == told.steps - done.steps["NO_CACHE"]
    assert told.steps - told.followed == sum(done.refreshed.values())
    assert told.unplanned == tuple(t for t in timesteps(pipe, steps) if t not in table.timesteps)
    assert (told.remedy is None) == (steps == len(TYPES))
    assert ("table.retime(pipe.scheduler.timesteps.tolist())" in str(told)) == (steps != len(TYPES))
    if steps == len(TYPES):
        shape = as_denoiser(pipe.transformer).shape
        assert told.mac_limit == pytest.approx(table.plan(shape).mac_limit(shape))


def test_a_bare_module_needs_the_timesteps() -> None:
    pipe = COG_2B.pipeline()
    table = table_of(pipe, [NO, *TYPES[1:]])
    assert dry_check(pipe.transformer, table, timesteps=table.timesteps).hits == 3
    told = dry_check(pipe.transformer, table, timesteps=[table.timesteps[0]] * 4)
    assert (told.hits, told.mac_limit) == (0, 1.0)
    with pytest.raises(InputError, match=r"^[^\n]*no scheduler; pass timesteps=[^\n]*$"):
        dry_check(pipe.transformer, table)
    with pytest.raises(InputError, match=r"^[^\n]*does not take 0 steps[^\n]*; pass timesteps=$"):
        dry_check(pipe, table, 0)
    assert isinstance(table.plan(as_denoiser(pipe.transformer).shape), Plan)


@pytest.mark.parametrize("form", [torch.tensor, np.array, list, iter])
def test_timesteps_come_in_any_form(form: Callable[[list[float]], Any]) -> None:
    pipe = SIGMA.pipeline()
    tables = [table_of(pipe), table_of(pipe).retime([801.5, 400.25, 7])]
    for table in tables:
        told = dry_check(pipe, tables, timesteps=form([*table.timesteps]))
        assert (told.followed, told.unplanned, told.remedy) == (len(table), (), None)


@pytest.mark.parametrize("wrong", [["late"], [float("nan")], [-1], [None], torch.zeros(2, 2)], ids=str)
def test_what_is_no_timestep_is_refused(wrong: Any) -> None:
    pipe = SIGMA.pipeline()
    with pytest.raises(TableError, match=r"^timesteps\[0\]: expected a number"):
        dry_check(pipe, table_of(pipe), timesteps=wrong)


@pytest.mark.parametrize("asked", [{"steps": 0}, {"steps": -1}, {"timesteps": ()}], ids=str)
def test_a_run_of_no_steps_is_refused(asked: dict[str, Any]) -> None:
    pipe = SIGMA.pipeline()
    with pytest.raises(InputError, match=r"^a run of no steps [^\n]*ask for one or more$"):
        dry_check(pipe, table_of(pipe), **asked)


def test_stats_are_plain_and_speak_to_people() -> None:
    pipe = DIT.pipeline()
    enable(pipe, table_of(pipe))
    DIT.draw(pipe)
    DIT.draw(pipe, steps=3)
    done = stats(pipe)
    assert json.loads(json.dumps(dataclasses.asdict(done))) == dataclasses.asdict(done)
    assert pickle.loads(pickle.dumps(done)) == done
    said = done.summary()
    assert "2 runs" in said or "3 runs" in said
    for why, times in (*done.refreshed.items(), *done.eager.items()):
        assert f"{times} times: {why}" in said or f"once: {why}" in said
    assert f"{done.cache_bytes:,} bytes" in said
