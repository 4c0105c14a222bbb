"""Runs that take turns and can not be told apart, or come back: each is right, or counted."""

from threading import Thread

import pytest
import torch
from dropin import (
    AGAIN,
    ALIKE,
    FRESH,
    GAVE_WAY,
    LABELS,
    TIMESTEPS,
    assert_bitwise,
    assert_close,
    call,
    drive,
    fresh_model,
    full_step,
    latents,
    naive_drive,
    plan_of,
)
from torch import Tensor

from ebcache_fast import enable, stats
from ebcache_fast.errors import TrajectoryError
from ebcache_fast.models import DiT

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
