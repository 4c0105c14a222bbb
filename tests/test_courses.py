"""Several tables at once: each run follows the one that has its scheduler's timesteps."""

import copy
import gc
import logging
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, MLP, NO
from diffusers_kinds import COG_VIDEO, DIT, SIGMA, THREE, Kind, drive, table_of, timesteps
from diffusers_oracle import drive_replaying, replaying
from tiny import relative_error

from ebcache_fast import CacheTable, TableSet, dry_check, enable, enabled, sample, stats
from ebcache_fast.dropin.decision import UNPLANNED
from ebcache_fast.errors import InputError, TableError, TrajectoryError
from ebcache_fast.plan import StepType

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TYPES = {5: (NO, ATTN_MLP, ATTENTION, NO, MLP), 3: (NO, ATTENTION, ATTN_MLP), 4: (NO, NO, MLP, ATTN_MLP)}


def set_of(pipe: Any, *steps: int, **options: Any) -> TableSet:
    return TableSet(table_of(pipe, TYPES[count], **options) for count in steps)


def oracle(pipe: Any, steps: int, eps_scale: float = 1.0) -> Any:
    return replaying(pipe, dict(zip(timesteps(pipe, steps), TYPES[steps], strict=True)), eps_scale)


def assert_steps(done: Any, *steps: int) -> None:
    types = [kind.name for count in steps for kind in TYPES[count]]
    assert done.steps == {name: types.count(name) for name in types}
    assert not done.refreshed | done.originals


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("kind", THREE, ids=str)
def test_each_run_follows_the_table_of_its_steps(kind: Kind, in_order: bool) -> None:
    pipe = kind.pipeline()
    order = (5, 3, 3, 4, 5)
    expected = {steps: kind.draw(oracle(pipe, steps), steps=steps) for steps in TYPES}
    enable(pipe, set_of(pipe, *TYPES), in_order=in_order)
    for steps in order:
        assert relative_error(kind.draw(pipe, steps=steps), expected[steps]) < 1e-5
    assert_steps(stats(pipe), *order)


@pytest.mark.parametrize("several", [list, tuple])
def test_a_list_or_tuple_of_tables_is_a_set(several: Callable[[TableSet], Any]) -> None:
    pipe = SIGMA.pipeline()
    tables, expected = set_of(pipe, 5, 3), SIGMA.draw(oracle(pipe, 3), steps=3)
    enable(pipe, several(tables))
    SIGMA.draw(pipe, steps=5)
    assert relative_error(SIGMA.draw(pipe, steps=3), expected) < 1e-5
    assert_steps(stats(pipe), 5, 3)
    with enabled(pipe, several(TableSet([tables.of_steps(3)]))):
        assert relative_error(SIGMA.draw(pipe, steps=3), expected) < 1e-5
    for wrong in (several(()), several((tables.of_steps(3),) * 2), several(("table.json",))):
        with pytest.raises(TableError, match="tables"):
            enable(pipe, wrong)


def test_a_scheduler_that_the_pipeline_got_later_is_asked() -> None:
    pipe = SIGMA.pipeline()
    other = diffusers.EulerDiscreteScheduler()
    here, pipe.scheduler = pipe.scheduler, other
    tables, expected = [*set_of(pipe, 3)], SIGMA.draw(oracle(pipe, 3), steps=3)
    pipe.scheduler = here
    enable(pipe, TableSet([*set_of(pipe, 5, 3), *tables]))
    SIGMA.draw(pipe, steps=5)
    pipe.scheduler = other
    assert relative_error(SIGMA.draw(pipe, steps=3), expected) < 1e-5
    assert_steps(stats(pipe), 5, 3)


def test_a_copy_of_the_pipeline_asks_its_own_scheduler() -> None:
    pipe = enable(SIGMA.pipeline(), set_of(SIGMA.pipeline(), 5, 3))
    twin, expected = copy.deepcopy(pipe), SIGMA.draw(oracle(SIGMA.pipeline(), 3), steps=3)
    SIGMA.draw(pipe, steps=5)
    assert relative_error(SIGMA.draw(twin, steps=3), expected) < 1e-5
    assert_steps(stats(twin), 3)
    assert_steps(stats(pipe), 5)


def test_a_model_whose_pipeline_is_gone_goes_on_as_it_did_last() -> None:
    pipe = enable(SIGMA.pipeline(), set_of(SIGMA.pipeline(), 5, 3))
    ts, expected = timesteps(pipe, 3), SIGMA.draw(pipe, steps=3)
    call, model = SIGMA.call(SIGMA.pipeline()), pipe.transformer
    for left in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        drive(left, call, ts)
        assert_steps(stats(left), 3)
    assert relative_error(SIGMA.draw(pipe, steps=3), expected) == 0
    del pipe
    gc.collect()
    drive(copy.deepcopy(model), call, ts)


def test_a_run_that_begins_later_is_in_the_table_too() -> None:
    """Video-to-video at half strength: the scheduler has all timesteps, the run the later ones."""
    pipe = COG_VIDEO.pipeline()
    options = dict(steps=4, strength=0.5)
    types = dict(zip(timesteps(pipe, 4), (NO, NO, NO, ATTN_MLP), strict=True))
    expected = COG_VIDEO.draw(replaying(pipe, types), **options)
    enable(pipe, set_of(pipe, 5, 4))
    assert relative_error(COG_VIDEO.draw(pipe, **options), expected) < 1e-5
    assert stats(pipe).refreshed == {"a run did not begin with the first step": 1}


def test_noise_is_scaled_as_each_table_says() -> None:
    pipe = COG_VIDEO.pipeline()
    weaker = {5: 0.8, 3: 1.0}
    tables = TableSet(table for steps, b in weaker.items() for table in set_of(pipe, steps, eps_scale=b))
    expected = {steps: COG_VIDEO.draw(oracle(pipe, steps, b), steps=steps) for steps, b in weaker.items()}
    enable(pipe, tables)
    for steps in (3, 5, 3):
        assert relative_error(COG_VIDEO.draw(pipe, steps=steps), expected[steps]) < 1e-5


def test_a_cancelled_run_of_one_table_leaves_nothing_to_another() -> None:
    pipe = SIGMA.pipeline()
    expected = SIGMA.draw(oracle(pipe, 3), steps=3)
    enable(pipe, set_of(pipe, 5, 3))

    def cancel(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SIGMA.draw(pipe, steps=5, callback=cancel, callback_steps=2)
    assert relative_error(SIGMA.draw(pipe, steps=3), expected) < 1e-5


def test_steps_of_no_table_are_said_once_and_computed(caplog: pytest.LogCaptureFixture) -> None:
    pipe = SIGMA.pipeline()
    plain = SIGMA.draw(pipe, steps=4)
    enable(pipe, set_of(pipe, 5, 3))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert relative_error(SIGMA.draw(pipe, steps=4), plain) < 1e-5
    said = [text for text in caplog.messages if "retime(" in text and "tables have 5 from" in text]
    assert len(said) == 1
    assert "4 timesteps from 999 to" in said[0]


@pytest.mark.parametrize("options", [{}, {"in_order": True}], ids=str)
def test_a_schedule_of_no_table_follows_none_though_timesteps_are_shared(options: dict[str, Any]) -> None:
    """500 and 0 are a table's, 750 and 250 nobody's: whatever was followed before, 0 reuses nothing."""
    pipe = DIT.pipeline()
    plain, tables = DIT.draw(pipe, steps=4), [CacheTable(timesteps(pipe, 2), (NO, ATTN_MLP)), table_of(pipe)]
    assert {*tables[0].timesteps} < {*timesteps(pipe, 4)}
    told = dry_check(pipe, tables, 4)
    assert (told.hits, told.followed, told.remedy is None) == (0, 0, False)
    enable(pipe, tables, **options)
    for steps, hits in ((2, 1), (4, 1), (5, 4), (4, 4), (2, 5)):
        drawn = DIT.draw(pipe, steps=steps)
        assert steps != 4 or relative_error(drawn, plain) < 1e-5
        done = stats(pipe)
        assert sum(done.steps.values()) - done.steps["NO_CACHE"] == hits
    assert {*(done.refreshed | done.originals)} == {UNPLANNED}
    assert sum((done.refreshed | done.originals).values()) == 8
    enable(pipe, tables, strict=True, **options)
    with pytest.raises(TrajectoryError, match=UNPLANNED):
        DIT.draw(pipe, steps=4)


def first(start: float, types: Sequence[StepType]) -> CacheTable:
    return CacheTable([start, *range(len(types) - 1)[::-1]], types)


def test_of_a_module_alone_the_first_timestep_tells() -> None:
    pipe, model = SIGMA.pipeline(), SIGMA.pipeline().transformer
    call = SIGMA.call(pipe)
    tables = TableSet([first(900, TYPES[5]), first(800, TYPES[3])])
    expected = {len(table): drive_replaying(pipe, call, table.timesteps, table.step_types) for table in tables}
    enable(model, tables)
    for table in (*tables, *tables):
        found = drive(model, call, table.timesteps)
        assert max(map(relative_error, found, expected[len(table)])) < 1e-5
    assert_steps(stats(model), 5, 3, 5, 3)


@pytest.mark.parametrize(
    ("tables", "options", "problem"),
    [
        ([first(900, TYPES[5]), first(900, TYPES[3])], {}, "900 is in the tables of 5 and 3 steps"),
        ([first(900, TYPES[5]), CacheTable([950, 900, 0], [0, 2, 2])], {}, "900 is in the tables of 5 and 3 steps"),
        (
            [first(900, TYPES[5]), first(800, TYPES[3])],
            {"in_order": True},
            "with in_order nothing tells .* follows",
        ),
    ],
)
def test_a_module_alone_that_nothing_tells_is_refused(
    tables: list[CacheTable], options: dict[str, Any], problem: str
) -> None:
    model = SIGMA.pipeline().transformer
    with pytest.raises(InputError, match=rf"^[^\n]*{problem}; enable its pipeline, [^\n]*$"):
        enable(model, TableSet(tables), **options)
    assert "forward" not in vars(model)
    enable(model, TableSet(tables[:1]), **options)


def test_a_table_of_the_set_that_is_for_another_model_is_refused_up_front() -> None:
    pipe = SIGMA.pipeline()
    stranger = table_of(pipe, TYPES[3], model={"depth": 77})
    with pytest.raises(TableError, match=r"depth 77"):
        enable(pipe, TableSet([*set_of(pipe, 5), stranger]))


def test_what_follows_one_table_refuses_a_set() -> None:
    pipe = SIGMA.pipeline()
    with pytest.raises(InputError, match=r"^table is a TableSet, .*; pass tables\.of_steps\(steps\)$"):
        sample(pipe.transformer, [0], table=set_of(pipe, 5, 3))  # type: ignore[arg-type]


def test_enabled_takes_a_set() -> None:
    pipe = SIGMA.pipeline()
    expected = SIGMA.draw(oracle(pipe, 3), steps=3)
    with enabled(pipe, set_of(pipe, 5, 3), strict=True), torch.no_grad():
        assert relative_error(SIGMA.draw(pipe, steps=3), expected) < 1e-5
