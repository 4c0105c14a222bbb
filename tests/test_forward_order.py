"""Calls that are not the next step of their run: computed in full and counted, or refused; the next run is right."""

import math
from contextlib import nullcontext

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, NO
from dropin import (
    AGAIN,
    ALIKE,
    FRESH,
    GAVE_WAY,
    LABELS,
    LEFT_OUT,
    TIMESTEPS,
    TYPES,
    UNPLANNED,
    assert_bitwise,
    assert_close,
    at,
    call,
    drive,
    fresh_model,
    full_step,
    guided_rows,
    latents,
    naive_drive,
    plan_of,
    reuse_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Kept, empty_cache, naive_forward
from torch import Tensor

from ebcache_fast import enable, stats
from ebcache_fast.errors import TrajectoryError
from ebcache_fast.models import DiT

Steps = list[tuple[float, str | None]]  # what is called one after another, and why a step was computed in full

ORDERS: dict[str, Steps] = {
    "the first is a cached step": [(700, FRESH), (420, None), (260, None)],
    "a step is left out": [(930, None), (420, LEFT_OUT), (260, None)],
    "a timestep is not planned": [(930, None), (699, UNPLANNED), (700, None), (420, None)],
    "none is planned": [(31, UNPLANNED), (30.5, UNPLANNED), (930, None), (700, None)],
    "a timestep comes again": [(930, None), (700, None), (700, AGAIN), (420, None), (420, AGAIN), (260, None)],
    "it goes back": [(930, None), (700, None), (420, None), (700, AGAIN), (420, None)],
    "it begins again": [
        *((t, None) for t in TIMESTEPS[:3]),
        (930, None),
        (700, None),
        (420, ALIKE),
        (260, ALIKE),
        (111, None),
    ],
    "twice in a row": [(930, None), (930, None), (700, ALIKE), (420, ALIKE), (260, ALIKE), (111, None), (3, None)],
    "a second run": [(t, None) for t in TIMESTEPS * 2],
    "it goes on after its end": [*((t, None) for t in TIMESTEPS), (260, FRESH), (111, None)],
    "begun at its end": [(3, FRESH), (930, None)],
}


@pytest.mark.parametrize("steps", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_out_of_order_is_computed_in_full_and_counted(steps: Steps, dtype: torch.dtype) -> None:
    model = fresh_model(dtype=dtype)
    enable(model, plan_of())
    kept: Kept = empty_cache(model)
    for i, (x, (t, why)) in enumerate(zip(latents(model, steps=len(steps)), steps, strict=True)):
        before = sum(stats(model).refreshed.values())
        step_type = TYPES[TIMESTEPS.index(int(t))] if why is None else NO
        with torch.no_grad():
            theirs = naive_forward(model, x, t, LABELS, reuse_of(step_type), kept)  # type: ignore[arg-type]
        theirs[:, :4] *= 0.9
        assert_close([call(model, x, t, LABELS)], [theirs])
        assert sum(stats(model).refreshed.values()) - before == (why is not None), i
    wanted = [why for _, why in steps if why is not None]
    assert stats(model).refreshed == {why: wanted.count(why) for why in wanted}


@pytest.mark.parametrize("steps", [s for s in ORDERS.values() if any(why for _, why in s)])
def test_strict_refuses_such_a_step(steps: Steps, model: DiT) -> None:
    enable(model, plan_of(), strict=True)
    x, planned = latents(model)[0], [why is None for _, why in steps].index(False)
    for t, _ in steps[:planned]:
        call(model, x, t, LABELS)
    t, why = steps[planned]
    for _ in range(2):  # it stays refused
        with pytest.raises(TrajectoryError, match=rf"^t={t:g} [^\n]*{why}[^\n]*strict=False[^\n]*$"):
            call(model, x, t, LABELS)
    drive(model, latents(model), LABELS.clone())
    assert stats(model).refreshed == {}


@pytest.mark.parametrize("last", range(1, len(TIMESTEPS)))
@pytest.mark.parametrize("labels", [LABELS, LABELS.flip(0) + 1, torch.tensor([2])], ids=["same", "others", "odd batch"])
def test_after_a_cancel_a_run_equals_a_fresh_one(last: int, labels: Tensor) -> None:
    model, other, labels = fresh_model(), fresh_model(), labels.clone()
    enable(model, plan_of()), enable(other, plan_of())
    drive(model, latents(model, seed=1)[:last])
    xs = latents(model, len(labels))
    assert_bitwise(drive(model, xs, labels), drive(other, xs, labels))
    assert stats(model).refreshed == {}


class Cancelled(BaseException):
    """No Exception, as what ends a task or a process is none."""


@pytest.mark.parametrize("fatal", range(len(TIMESTEPS)))
@pytest.mark.parametrize("part", ["x_embedder", "blocks.1.attn.qkv", "final_layer.linear"])
def test_after_an_error_a_run_equals_a_fresh_one(fatal: int, part: str) -> None:
    model, other = fresh_model(), fresh_model()
    is_armed: list[bool] = []

    def fail(*_: object) -> None:
        if is_armed:
            raise Cancelled

    for one in (model, other):  # a layer with a hook is not computed to the same bits
        one.get_submodule(part).register_forward_pre_hook(fail)
        enable(one, plan_of())
    xs = latents(model, steps=7)
    drive(model, xs[1 : 1 + fatal])
    is_armed.append(True)
    is_run = part != "blocks.1.attn.qkv" or TYPES[fatal] not in (ATTENTION, ATTN_MLP)
    with pytest.raises(Cancelled) if is_run else nullcontext():
        call(model, xs[0], TIMESTEPS[fatal], LABELS)
    is_armed.clear()
    assert_bitwise(drive(model, xs[:6], LABELS.clone()), drive(other, xs[:6]))


def test_an_error_leaves_the_step_to_be_tried_again(model: DiT) -> None:
    other, xs = fresh_model(), latents(model)
    enable(model, plan_of(), strict=True), enable(other, plan_of())
    for i in range(len(TIMESTEPS)):
        with pytest.raises(ValueError, match="not finite"):
            call(model, xs[i] * math.nan, TIMESTEPS[i], LABELS)
        assert torch.equal(call(model, xs[i], TIMESTEPS[i], LABELS), call(other, xs[i], TIMESTEPS[i], LABELS))


INTERLEAVED = fresh_model()
RUNS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=2, max_size=4, unique_by=tuple)


@given(data=st.data(), runs=RUNS)
@settings(max_examples=8)
def test_interleaved_runs_equal_isolated_ones(data: st.DataObject, runs: list[list[int]]) -> None:
    model = INTERLEAVED
    labels = [torch.tensor(run) for run in runs]
    xs = [latents(model, len(y), seed=i) for i, y in enumerate(labels)]
    enable(model, plan_of(), strict=True)
    alone = [drive(model, x, y) for x, y in zip(xs, labels, strict=True)]
    turns = data.draw(st.permutations([i for i in range(len(runs)) for _ in TIMESTEPS]))
    outs: list[list[Tensor]] = [[] for _ in runs]
    for i in turns:
        done = len(outs[i])
        outs[i].append(call(model, xs[i][done], TIMESTEPS[done], labels[i]))
    for ours, theirs in zip(outs, alone, strict=True):
        assert_bitwise(ours, theirs)


def test_beyond_the_limit_the_run_called_longest_ago_gives_way(model: DiT) -> None:
    enable(model, plan_of(), max_trajectories=2)
    first, second, third = (torch.tensor([label]) for label in range(3))
    xs = latents(model, 1)
    drive(model, xs[:1], first), drive(model, xs[:1], second)
    call(model, xs[1], 700, first)
    drive(model, xs[:1], third)
    assert_close([call(model, xs[2], 420, first)], naive_drive(model, xs[:3], first)[2:])
    assert stats(model).refreshed == {}
    assert_close([call(model, xs[1], 700, second)], [full_step(model, xs[1], 700, second)])
    assert stats(model).refreshed == {GAVE_WAY: 1}


@torch.no_grad()
def test_both_methods_may_take_turns(model: DiT) -> None:
    enable(model, plan_of(), strict=True)
    y, arguments = guided_rows(LABELS), list(zip(latents(model, 6), (at(t, 6) for t in TIMESTEPS), strict=True))
    alone = [model(x, t, y) for x, t in arguments], [model.forward_with_cfg(x, t, y, 2.0) for x, t in arguments]
    turns = [(model(x, t, y), model.forward_with_cfg(x, t, y, 2.0)) for x, t in arguments]
    for ours, theirs in zip(zip(*turns, strict=True), alone, strict=True):
        assert_bitwise(ours, theirs)


def test_a_departure_from_the_plan_is_said_once_for_each_reason(model: DiT, caplog: pytest.LogCaptureFixture) -> None:
    enable(model, plan_of())
    x = latents(model)[0]
    for t in (501, 502, 503):
        call(model, x, t, LABELS)
    model(x, at(930, 3), LABELS)  # with gradients
    said = [record.getMessage() for record in caplog.records]
    assert [message.partition(";")[0] for message in said] == [
        "a step computes everything: a timestep is not in the plan",
        "the model's own forward answers, uncached: gradients are recorded",
    ]


def test_what_to_do_about_it_is_said(model: DiT, caplog: pytest.LogCaptureFixture) -> None:
    enable(model, plan_of(), max_trajectories=1)
    x, other = latents(model)[0], LABELS.clone()
    for t in (501, 502):
        call(model, x, t, LABELS)
    for t in TIMESTEPS[:2]:
        call(model, x, t, LABELS), call(model, x, t, other)
    for t in (930, 930, 700):
        call(model, x, t, LABELS)
    said = [record.getMessage() for record in caplog.records]
    assert any("t=501, and the plan has 930, 700, 420, 260, ... (6 steps): move its table" in each for each in said)
    assert any("raise max_trajectories=1 of enable()" in each for each in said)
    assert any("tensors of its own" in each for each in said)
    assert len(said) == len(set(said))
