"""When each step ran: what a plan says, what was measured, the file between them, and the picture."""

import dataclasses
import json
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from constants import ATTENTION, ATTN_MLP, BRANCHES, NO
from PIL import Image, ImageColor

from ebcache_fast.apps import console, pictures
from ebcache_fast.apps.timeline import STEP_NAMES, Span, Timeline
from ebcache_fast.apps.timeline_picture import BAR, CELLS, FAN, WIDTH, draw_timeline
from ebcache_fast.errors import EBCacheError, InputError, JobError
from ebcache_fast.plan import COMPUTE, REUSE, Branch, ModelShape, Plan, SiteShape, StepPlan, layered, repeated

SHAPE = ModelShape(
    width=8,
    tokens=4,
    site_shapes=repeated(2, (SiteShape(0, Branch.SELF_ATTN, 10**9, 1), SiteShape(0, Branch.MLP, 2 * 10**9, 1))),
    fixed_macs=10**9,
    fixed_weights=1,
    sizes=(),
)
PLAN = Plan.from_types([NO, ATTN_MLP, ATTN_MLP, ATTENTION, NO], [9, 7, 5, 3, 0], layered(2, BRANCHES))
MEASURED = Timeline(
    "ms",
    (
        Span(("NO_CACHE",), 0.0, 4.0, replayed=True),
        Span(("ATTN_MLP",) * 3, 5.0, 3.0, replayed=True),
        Span(("NO_CACHE",), 10.0, 6.0),
        Span(("ATTN_MLP",), 16.0, 4.0),
    ),
    about={"model": "tiny", "samples": 2, "device": None},
)


def test_a_plan_says_what_each_step_computes() -> None:
    timeline = Timeline.of_plan(PLAN, SHAPE, model="tiny")
    assert [span.cost for span in timeline.spans] == [7, 1, 1, 5, 7]  # 2 layers of 1 + 2, and 1 for the ends
    assert [span.start for span in timeline.spans] == [0, 7, 8, 9, 14]
    assert timeline.step_types == ("NO_CACHE", "ATTN_MLP", "ATTN_MLP", "ATTENTION", "NO_CACHE")
    assert (timeline.unit, timeline.end, timeline.uncached) == ("GMACs", 21, 35)
    assert timeline.about == {"model": "tiny"}


def test_a_step_whose_layers_differ_has_a_name() -> None:
    mixed = StepPlan.by_layer(BRANCHES, ((REUSE, COMPUTE), (COMPUTE, COMPUTE)))
    plan = dataclasses.replace(PLAN, steps=(PLAN.steps[0], mixed, *PLAN.steps[2:]))
    assert Timeline.of_plan(plan, SHAPE).step_types[1] == "MIXED"
    assert set(STEP_NAMES) == pictures.STEP_COLOURS.keys() == console.SHORT.keys()
    assert set(STEP_NAMES) == console.STYLES.keys() | {"MIXED"}


def test_cost_by_type() -> None:
    """A span of three steps counts as three, and what passes between spans belongs to none."""
    assert MEASURED.by_type() == (("NO_CACHE", 2, 5.0, 10.0), ("ATTN_MLP", 4, 1.0, 7.0))
    assert (MEASURED.end, MEASURED.between) == (20.0, 3.0)
    assert [cost.step_type for cost in Timeline.of_plan(PLAN, SHAPE).by_type()] == ["NO_CACHE", "ATTENTION", "ATTN_MLP"]


def test_the_file(tmp_path: Path) -> None:
    for timeline in (MEASURED, Timeline.of_plan(PLAN, SHAPE)):
        timeline.save(tmp_path / "t.json")
        assert Timeline.load(tmp_path / "t.json") == timeline
    with pytest.raises(JobError, match=r"t\.json"):
        MEASURED.save(tmp_path / "t.json" / "below.json")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({"unit": "s"}, "unit"),
        ({"spans": []}, "one or more"),
        ({"spans": None}, "spans"),
        ({"spans": [{"step_types": ["NO_CACHE"], "start": 0.0}]}, r"spans\.0\.cost"),
        ({"spans": [{"step_types": ["NO_CACHE"], "start": 0.0, "cost": "1"}]}, r"spans\.0\.cost"),
        ({"spans": [{"step_types": ["NO_CACHE"], "start": 0.0, "cost": -1.0}]}, "0 or more"),
        ({"spans": [{"step_types": ["NO_CACHE"], "start": 0.0, "cost": 1e999}]}, "finite"),
        ({"spans": [{"step_types": [], "start": 0.0, "cost": 1.0}]}, "at least one step"),
        ({"spans": [{"step_types": ["NOCACHE"], "start": 0.0, "cost": 1.0}]}, "'NOCACHE' is unknown"),
        ({"spans": [{"step_types": ["MLP"], "start": s, "cost": 1.0} for s in (1.0, 0.0)]}, "order of their starts"),
        ({"spans": [{"step_types": ["MLP"], "start": 0.0, "cost": 0.0}]}, "no time at all"),
        ({"uncached": -1.0}, "0 or more"),
    ],
)
def test_a_damaged_file_is_refused(damage: dict[str, object], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(dataclasses.asdict(MEASURED) | damage))
    with pytest.raises(InputError, match=problem) as refused:
        Timeline.load(path)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '{"unit": "ms"}'])
def test_what_is_no_timeline_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    for path in (tmp_path / "t.json", tmp_path / "missing.json", tmp_path):
        with pytest.raises(EBCacheError, match=path.name):
            Timeline.load(path)


# -------------------------------------------------------------------------------------------------- the picture


def row(sheet: Image.Image, y: int) -> list[tuple[str, int]]:
    """The runs of step types' colours in one line of pixels, with their lengths; slim edges between them left out."""
    names = {ImageColor.getrgb(colour): name for name, colour in pictures.STEP_COLOURS.items()}
    line = np.asarray(sheet)[y].tolist()
    runs = [(names.get(tuple(pixel), ""), len(list(same))) for pixel, same in groupby(line)]
    return [(name, length) for name, length in runs if name]


def rows(timeline: Timeline) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """The steps in order, and the steps to scale."""
    sheet = draw_timeline(timeline, "title")
    below = sheet.height - 62  # where the ruler is
    return row(sheet, below - BAR - FAN - CELLS // 2), row(sheet, below - BAR // 2)


def test_the_upper_row_has_a_cell_for_each_step() -> None:
    for timeline in (Timeline.of_plan(PLAN, SHAPE), MEASURED):
        cells, _ = rows(timeline)
        assert tuple(name for name, _ in cells) == timeline.step_types
        assert [length for _, length in cells] == pytest.approx([WIDTH / len(cells)] * len(cells), abs=9)


def test_the_lower_row_is_to_scale() -> None:
    """By a plan the width is that of the run without caching; of a measured run, its own."""
    _, planned = rows(Timeline.of_plan(PLAN, SHAPE))
    assert [name for name, _ in planned] == ["NO_CACHE", "ATTN_MLP", "ATTN_MLP", "ATTENTION", "NO_CACHE"]
    assert [length for _, length in planned] == pytest.approx([WIDTH * c / 35 for c in (7, 1, 1, 5, 7)], abs=8)
    _, measured = rows(MEASURED)
    assert [name for name, _ in measured] == ["NO_CACHE", "ATTN_MLP", "NO_CACHE", "ATTN_MLP"]
    assert [length for _, length in measured] == pytest.approx([WIDTH * c / 20 for c in (4, 3, 6, 4)], abs=8)


def test_steps_too_short_to_see_and_runs_too_long_to_number() -> None:
    slim = Timeline("ms", (Span(("NO_CACHE",), 0.0, 1e6), Span(("ATTN_MLP",), 1e6, 0.0)))
    many = Timeline("ms", tuple(Span(("NO_CACHE",), float(i), 1.0) for i in range(3000)))
    for timeline in (slim, many):
        assert draw_timeline(timeline, "title").width == WIDTH + 2 * pictures.MARGIN
