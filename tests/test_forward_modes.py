"""A cached forward's timesteps and outputs, the modes of torch, and too little memory."""

import math

import pytest
import torch
from dropin import (
    LABELS,
    MIXED,
    TIMESTEPS,
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
)

from ebcache_fast import enable, stats
from ebcache_fast.engine import buffers
from ebcache_fast.errors import InputError, TrajectoryError
from ebcache_fast.models import DiT


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
