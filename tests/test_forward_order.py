"""Calls that are not the next step of their run: computed in full and counted, or refused; the next run is right."""

import math
from contextlib import nullcontext
from threading import Thread

import pytest
import torch
from dropin import (
    ATTENTION,
    ATTN_MLP,
    LABELS,
    NO_CACHE,
    TIMESTEPS,
    TYPES,
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
from ebcache_fast.engine import buffers
from ebcache_fast.errors import InputError, TrajectoryError
from ebcache_fast.models import DiT

FRESH = "a run did not begin with the first step"
AGAIN = "a timestep came again"
LEFT_OUT = "steps were left out"
UNPLANNED = "a timestep is not in the plan"
ALIKE = "runs of the same tensors can't be told apart"
GAVE_WAY = "more runs took turns than max_trajectories"
MIXED = "timesteps differ within the batch"


@pytest.fixture
def model() -> DiT:
    return fresh_model()


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
        step_type = TYPES[TIMESTEPS.index(int(t))] if why is None else NO_CACHE
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


# ------------------------------------------------------------------------------- runs that can't be told apart

TURNS = {
    "step by step": "ABABABABABAB",
    "half a run behind": "AAABABABABBB",
    "a third one": "ABCABCABCABCABCABC",
    "at different paces": "AABBAABBBBAA",
    "in long strides": "AAABBBBBBAAA",
    "given up": "ABBABBBB",
    "begun again and again": "ABBCCCDDDD",
}


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("tensors", ["shared", "made anew", "own"])
def test_runs_of_equal_labels_that_take_turns(turns: str, strict: bool, tensors: str, model: DiT) -> None:
    """Where tensors do not tell, a step is what its run gets alone, or is computed in full and counted."""
    alone, own = {run: latents(model, seed=ord(run)) for run in turns}, {run: LABELS.clone() for run in turns}
    cached = {run: naive_drive(model, xs) for run, xs in alone.items()}
    enable(model, plan_of(), strict=strict)
    done, counted, refused = dict.fromkeys(turns, 0), 0, ""
    for run in turns:
        i = done[run]
        done[run] += 1
        x, y = alone[run][i], {"shared": LABELS, "made anew": LABELS.clone(), "own": own[run]}[tensors]
        try:
            out = call(model, x, TIMESTEPS[i], y)
        except TrajectoryError as error:
            refused = str(error)
            break
        full = sum(stats(model).refreshed.values()) > counted
        counted += full
        assert_close([out], [full_step(model, x, TIMESTEPS[i]) if full else cached[run][i]])
    assert set(stats(model).refreshed) == ({ALIKE} if counted else set())
    if tensors == "own":
        assert not counted
        assert not refused
    elif turns in (TURNS["step by step"], TURNS["a third one"]):  # at all others some stand alone where they are
        assert counted == (0 if strict else 4 * len(set(turns)))
        assert not strict or ALIKE in refused
    assert not stats(model).originals


def test_a_run_that_goes_on_where_another_of_equal_labels_was_given_up(model: DiT) -> None:
    """It holds labels of its own, which tell."""
    enable(model, plan_of())
    xs, (ours, others) = latents(model), (LABELS.clone(), LABELS.clone())
    call(model, xs[0], 930, ours), call(model, xs[1], 930, others)
    assert_close([call(model, xs[1], 700, LABELS.clone())], [full_step(model, xs[1], 700)])
    assert stats(model).refreshed == {FRESH: 1}
    assert_close([call(model, xs[1], 700, ours)], naive_drive(model, xs[:2])[1:])
    given_up = LABELS.clone()
    drive(model, xs[:3], given_up)
    del given_up  # as its frame does: of the runs in progress none has come as far
    assert_close([call(model, xs[3], 260, other := LABELS.clone())], [full_step(model, xs[3], 260)])
    assert not torch.equal(call(model, xs[4], 111, other), full_step(model, xs[4], 111))


@pytest.mark.parametrize("loop", [(930, 700, 700, 420), (930, 700, 700, 420, 420, 260), (930, 930, 700, 700, 111)])
@pytest.mark.parametrize("given_up", range(1, 6))
def test_a_sampler_that_visits_timesteps_twice(loop: tuple[int, ...], given_up: int, model: DiT) -> None:
    """PNDM, Heun: after a run of equal labels that was given up anywhere, the next is what it is alone."""
    other, xs = fresh_model(), latents(model, steps=len(loop))
    enable(model, plan_of()), enable(other, plan_of())
    for y, end in ((LABELS.clone(), given_up), (LABELS.clone(), None)):
        ours = [call(model, x, t, y) for x, t in list(zip(xs, loop, strict=True))[:end]]
    assert_bitwise(ours, [call(other, x, t, LABELS) for x, t in zip(xs, loop, strict=True)])


def test_a_run_that_comes_back_to_its_last_timestep_is_no_other_that_stands_there(model: DiT) -> None:
    """As Heun's sampler does, while somebody makes equal labels anew at each step, and has but the last one to do."""
    plan = plan_of()
    enable(model, plan)
    xs, own = latents(model), LABELS.clone()
    for x, t in zip(xs[:-1], plan.timesteps, strict=False):
        call(model, x, t, LABELS.clone())
    drive(model, xs, own)
    full = full_step(model, xs[0], plan.timesteps[-1], own)
    assert_close([call(model, xs[0], plan.timesteps[-1], own)], [full])
    assert stats(model).refreshed[FRESH] == 1


@pytest.mark.parametrize("tensors", ["shared", "made anew"])
def test_a_run_that_comes_back_to_its_last_timestep_is_no_other_of_the_same_tensors(tensors: str, model: DiT) -> None:
    """Where timesteps came twice before, the last may, too; what both may be at is computed in full, for both."""
    plan = plan_of()
    enable(model, plan)
    xs, last = latents(model), plan.timesteps[-1]

    def step(x: Tensor, t: float) -> Tensor:
        return call(model, x, t, LABELS if tensors == "shared" else LABELS.clone())

    for x, t in zip(xs, plan.timesteps, strict=True):
        step(x, t)
        if t == plan.timesteps[1]:
            step(x, t)
    for x, t in zip(xs[:-1], plan.timesteps, strict=False):
        step(x, t)
    for x in xs[:2]:
        assert_close([step(x, last)], [full_step(model, x, last)])


def test_a_pass_over_rising_timesteps_ends_with_the_first_step(model: DiT) -> None:
    """As an inversion makes before the usual pass, with the same tensors."""
    enable(model, plan_of())
    xs = latents(model)
    for begun in range(5):
        drive(model, xs[:begun])
        for x, t in zip(xs, TIMESTEPS[::-1], strict=True):
            assert_close([call(model, x, t, LABELS)], [full_step(model, x, t)])
        assert_close(drive(model, xs), naive_drive(model, xs))


def test_a_call_before_the_first_step_is_no_run_that_began(model: DiT) -> None:
    enable(model, plan_of())
    x = latents(model)[0]
    for t in (501, 930, 700, 700):
        call(model, x, t, LABELS)
    assert stats(model).refreshed == {"a timestep is not in the plan": 1, AGAIN: 1}


def test_changed_weights_do_not_tell_runs_apart(model: DiT) -> None:
    enable(model, plan_of())
    xs = latents(model)
    call(model, xs[0], 930, LABELS), call(model, xs[1], 930, LABELS)
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(0.1)
    for x in xs[:2]:
        assert_close([call(model, x, 700, LABELS)], [full_step(model, x, 700)])
    assert sum(stats(model).refreshed.values()) == 2


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("limit", [2, 8])
def test_threads_that_ask_for_the_same(in_order: bool, limit: int, model: DiT) -> None:
    """Each request is what it is alone or, where more take turns than there is memory for, in part in full."""
    xs = [latents(model, seed=i) for i in range(4)]
    cached = [naive_drive(model, each) for each in xs]
    full = [[full_step(model, x, t) for x, t in zip(each, TIMESTEPS, strict=True)] for each in xs]
    enable(model, plan_of(), in_order=in_order, max_trajectories=limit)
    outs: list[list[list[Tensor]]] = [[] for _ in xs]

    def work(i: int) -> None:
        for _ in range(3):
            outs[i].append(drive(model, xs[i], LABELS.clone()))

    threads = [Thread(target=work, args=(i,)) for i in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(each) for each in outs] == [3] * len(xs)
    if limit == 8:
        for i, runs in enumerate(outs):
            for ours in runs:
                assert_close(ours, cached[i])
        assert not stats(model).refreshed
    elif not in_order:  # in full once, it goes on with the caches of that step
        for i, runs in enumerate(outs):
            for ours in runs:
                assert_close(ours[:1], full[i][:1])
        assert set(stats(model).refreshed) <= {GAVE_WAY}
    assert not (stats(model).originals and limit == 8)


def test_threads_with_runs_of_their_own(model: DiT) -> None:
    enable(model, plan_of(), strict=True, max_trajectories=4)
    runs = [torch.tensor([label, 5]) for label in range(4)]
    xs = [latents(model, 2, seed=i) for i in range(4)]
    alone = [drive(model, x, y) for x, y in zip(xs, runs, strict=True)]
    outs: list[list[list[Tensor]]] = [[] for _ in runs]

    def work(i: int) -> None:
        for _ in range(4):
            outs[i].append(drive(model, xs[i], runs[i]))

    threads = [Thread(target=work, args=(i,)) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(outs, alone, strict=True):
        assert len(ours) == 4
        for one in ours:
            assert_bitwise(one, theirs)


# ------------------------------------------------------------------------------------------ timesteps and memory


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (3,)])
@torch.no_grad()
def test_timesteps_of_any_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...], model: DiT) -> None:
    plan = plan_of()
    plan = type(plan)(plan.steps, (928, 704, 420, 260, 111, 3), plan.eps_scale)  # exact in bfloat16
    enable(model, plan, strict=True)
    xs = latents(model)
    ours = [model(x, torch.full(shape, t, dtype=dtype), LABELS) for x, t in zip(xs, plan.timesteps, strict=True)]
    assert_bitwise(ours, [call(model, x, t, LABELS) for x, t in zip(xs, plan.timesteps, strict=True)])


@torch.no_grad()
def test_a_timestep_that_its_dtype_can_not_hold_is_another_one(model: DiT) -> None:
    enable(model, plan_of())
    x, t = latents(model)[0], torch.full((3,), 930, dtype=torch.bfloat16)
    assert_close([model(x, t, LABELS)], [full_step(model, x, 928)])
    assert stats(model).refreshed == {UNPLANNED: 1}


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_timesteps_mixed_in_a_batch_are_for_the_model_itself(guided: bool, model: DiT) -> None:
    x, y = latents(model, 6)[0], guided_rows(LABELS)
    t = torch.tensor([930, 930, 3, 930, 930, 3])
    arguments = (x, t, y, 2.0) if guided else (x, t, y)
    name = "forward_with_cfg" if guided else "forward"
    theirs = getattr(model, name)(*arguments)
    enable(model, plan_of())
    assert torch.equal(getattr(model, name)(*arguments), theirs)
    assert stats(model).originals == {MIXED: 1}
    assert not stats(model).steps
    enable(model, plan_of(), strict=True)
    with pytest.raises(TrajectoryError, match=f"^[^\n]*{MIXED}; strict=False[^\n]*$"):
        getattr(model, name)(*arguments)


def test_outputs_are_the_callers_and_latents_stay(model: DiT) -> None:
    enable(model, plan_of())
    xs = latents(model)
    before = [x.clone() for x in xs]
    outs = [out for _ in range(2) for out in drive(model, xs)]
    first = [out.clone() for out in outs[:6]]
    for out in outs[6:]:
        out.fill_(math.nan)
    assert_bitwise(outs[:6], first)
    assert_bitwise(drive(model, xs), first)
    assert_bitwise(xs, before)


# --------------------------------------------------------------------------------------------- modes of torch

MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("then", MODES)
@pytest.mark.parametrize("in_order", [False, True])
def test_modes_may_change_from_call_to_call(first: str, then: str, in_order: bool, model: DiT) -> None:
    model.requires_grad_(False)
    enable(model, plan_of(), strict=True, in_order=in_order)
    xs = latents(model, steps=12)
    theirs = naive_drive(model, xs[:6]) + naive_drive(model, xs[6:])
    ours = []
    for i, x in enumerate(xs):
        mode = then if i in (1, 4, 5, *range(8, 12)) else first
        with MODES[mode]():
            ours.append(model(x, at(TIMESTEPS[i % 6], 3), LABELS))
    assert_close([out.clone() for out in ours], theirs)
    assert stats(model).originals == {}


@pytest.mark.parametrize("in_order", [False, True])
def test_where_the_model_itself_has_to_answer(in_order: bool) -> None:
    model = fresh_model(dtype=torch.float32)
    x, t = latents(model)[0], at(930, 3)
    asks = {
        "gradients are recorded": lambda: model(x, t, LABELS),
        "autocast is on": lambda: call(model, x, 930, LABELS),
        "the model is in training mode": lambda: call(model, x, 930, LABELS),
    }
    answers = []
    for turn in range(3):  # without caching, with it, and strictly
        if turn:
            enable(model, plan_of(), in_order=in_order, strict=turn == 2)
        for i, (why, ask) in enumerate(asks.items()):
            model.train(i == 2)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i == 1), torch.random.fork_rng():
                torch.manual_seed(0)  # a model in training drops labels
                if turn < 2:
                    answers.append(ask())
                else:
                    with pytest.raises(TrajectoryError, match=f"^[^\n]*{why}; strict=False[^\n]*$"):
                        ask()
            model.eval()
        if turn == 1:
            assert stats(model).originals == dict.fromkeys(asks, 1)
    assert answers[3].requires_grad
    assert_bitwise(answers[3:], answers[:3])


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_too_little_memory(guided: bool, model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, name = latents(model, 6)[0], guided_rows(LABELS), "forward_with_cfg" if guided else "forward"
    arguments = (x, at(930, 6), y, 2.0) if guided else (x, at(930, 6), y)
    theirs = getattr(model, name)(*arguments)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory\nand some lines more")

    enable(model, plan_of())
    monkeypatch.setattr(buffers, "FeatureCache", fail)
    assert torch.equal(getattr(model, name)(*arguments), theirs)
    assert [*stats(model).originals] == ["too little memory for the caches"]
    monkeypatch.undo()
    assert not torch.equal(getattr(model, name)(*arguments), theirs)
    enable(model, plan_of(), strict=True)
    monkeypatch.setattr(buffers, "FeatureCache", fail)
    with pytest.raises(InputError, match=r"^a batch of 6 rows needs [^\n]*no memory[^\n]*sample fewer at once$"):
        getattr(model, name)(*arguments)
