"""The forward for callers who promise their order: the same numbers, and a broken promise never makes a picture."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from dropin import (
    LABELS,
    TIMESTEPS,
    TYPES,
    assert_bitwise,
    at,
    call,
    drive,
    fresh_model,
    guided_rows,
    latents,
    plan_of,
)
from torch import Tensor

from ebcache_fast import disable, enable, enabled, stats
from ebcache_fast.dropin.decision import ALIKE
from ebcache_fast.errors import TrajectoryError
from ebcache_fast.models import DiT

MODEL = fresh_model()
XS = latents(MODEL)
OTHERS = LABELS.flip(0) + 1
BROKEN = r"^[^\n]*not the next step of its run[^\n]*in_order$"


@pytest.fixture
def model() -> Iterator[DiT]:
    yield enable(MODEL, plan_of(), in_order=True)
    disable(MODEL)


def expected(y: Tensor = LABELS) -> list[Tensor]:
    """A run in the default mode, which finds its steps by itself."""
    with enabled(MODEL, plan_of(), strict=True):
        return drive(MODEL, XS, y)


def assert_next_run_is_right(model: DiT) -> None:
    assert_bitwise(drive(model, XS, OTHERS), expected(OTHERS))


@pytest.mark.parametrize("labels", [LABELS, torch.tensor([5])])
@pytest.mark.parametrize(
    "t", [lambda t, n: at(t, n), lambda t, n: torch.tensor(t), lambda t, n: torch.tensor([float(t)])]
)
@torch.no_grad()
def test_it_equals_the_default_mode_to_the_bit(labels: Tensor, t: object, model: DiT) -> None:
    xs = [x[: len(labels)] for x in XS]
    for _ in range(2):
        ours = [model(x, t(each, len(labels)), labels) for x, each in zip(xs, TIMESTEPS, strict=True)]  # type: ignore[operator]
    with enabled(MODEL, plan_of(), strict=True):
        assert_bitwise(ours, drive(MODEL, xs, labels))
    assert stats(model).steps == {"NO_CACHE": 4, "ATTENTION": 2, "ATTN_MLP": 4, "MLP": 2}


@torch.no_grad()
def test_guidance_equals_the_default_mode_to_the_bit(model: DiT) -> None:
    xs, y = latents(MODEL, 6), guided_rows(LABELS)

    def guided() -> list[Tensor]:
        return [
            model.forward_with_cfg(x, at(t, 6), y, 1.0 + i) for i, (x, t) in enumerate(zip(xs, TIMESTEPS, strict=True))
        ]

    with enabled(MODEL, plan_of(), strict=True):
        theirs = guided()
    assert_bitwise(guided(), theirs)


WRONG = {
    "another timestep": (31, LABELS),
    "a fraction": (260.5, LABELS),
    "the first again": (TIMESTEPS[0], LABELS),
    "other labels": (None, OTHERS),
    "one other label": (None, torch.tensor([1, 4, 2])),
    "no number": (float("nan"), LABELS),
}


@pytest.mark.parametrize(("t", "labels"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("step", [1, 4, 5])
def test_a_wrong_call_gives_nan_and_then_an_error(t: float | None, labels: Tensor, step: int, model: DiT) -> None:
    given = LABELS.clone()
    drive(model, XS[:step], given)
    given.copy_(labels)
    wrong = TIMESTEPS[step] if t is None else t
    if step < len(TIMESTEPS) - 1:
        assert call(model, XS[step], wrong, given).isnan().all()
        step, wrong = step + 1, TIMESTEPS[step + 1]
        given.copy_(LABELS)
    with pytest.raises(TrajectoryError, match=BROKEN):
        call(model, XS[step], wrong, given)
    assert_next_run_is_right(model)


@pytest.mark.parametrize("step", [1, 4, 5])
def test_labels_in_tensors_that_no_run_came_with(step: int, model: DiT) -> None:
    """They are read: of another run, which did not begin with the first step, and disturbs none."""
    drive(model, XS[:step])
    with enabled(model, plan_of()):
        own = call(disable(model), XS[step], TIMESTEPS[step], OTHERS)
    assert torch.equal(call(model, XS[step], TIMESTEPS[step], OTHERS), own)
    assert stats(model).originals == {"a run did not begin with the first step": 1}
    assert torch.equal(call(model, XS[step], TIMESTEPS[step], LABELS), expected()[step])


def test_runs_of_equal_labels_may_take_turns_and_be_given_up(model: DiT) -> None:
    """Each holds a tensor of its own, by which it is known."""
    theirs = expected()
    call(model, XS[0], TIMESTEPS[0], LABELS.clone())
    runs = [LABELS.clone() for _ in range(3)]
    for i, (x, t) in enumerate(zip(XS, TIMESTEPS, strict=True)):
        for y in runs:
            assert torch.equal(call(model, x, t, y), theirs[i])
    assert not stats(model).originals


@pytest.mark.parametrize("runs", [1, 2])
def test_labels_that_are_made_anew_at_each_step(runs: int, model: DiT) -> None:
    """One run is followed; of two alike, a step that reuses may be either's, and the model itself answers."""
    theirs = expected()
    with enabled(model, plan_of()):
        own = [call(disable(model), x, t, LABELS) for x, t in zip(XS, TIMESTEPS, strict=True)]
    for i, (x, t) in enumerate(zip(XS, TIMESTEPS, strict=True)):
        for _ in range(runs):
            assert torch.equal(call(model, x, t, LABELS.clone()), own[i] if runs == 2 and TYPES[i] else theirs[i])
    assert sum(stats(model).originals.values()) == (0 if runs == 1 else 2 * 4)


def test_whoever_shared_a_tensor_gets_no_caches_of_a_run_that_begins_afterwards(model: DiT) -> None:
    """The error went to the one that came in between; the other goes on, and could be taken for the new one."""
    last = len(TIMESTEPS) - 1
    drive(model, XS[:last])
    with pytest.raises(TrajectoryError, match=BROKEN):
        call(model, XS[0], TIMESTEPS[0], LABELS)
    drive(model, XS[1:], LABELS)  # other latents, as far as the last step
    with enabled(model, plan_of()):
        own = call(disable(model), XS[last], TIMESTEPS[last], LABELS)
    assert torch.equal(call(model, XS[last], TIMESTEPS[last], LABELS), own)
    assert stats(model).originals == {ALIKE: 1}


@pytest.mark.parametrize("missing", range(1, len(TIMESTEPS)))
def test_a_step_left_out(missing: int, model: DiT) -> None:
    drive(model, XS[:missing])
    first, second = (*TIMESTEPS[missing + 1 :], *TIMESTEPS)[:2]  # after the last, a new run
    if missing < len(TIMESTEPS) - 1:
        assert call(model, XS[0], first, LABELS).isnan().all()
    with pytest.raises(TrajectoryError, match=BROKEN):
        call(model, XS[0], second if missing < len(TIMESTEPS) - 1 else first, LABELS)
    assert_next_run_is_right(model)


@pytest.mark.parametrize("done", range(1, len(TIMESTEPS)))
def test_a_run_begun_again_before_its_end(done: int, model: DiT) -> None:
    drive(model, XS[:done])
    with pytest.raises(TrajectoryError, match=BROKEN):
        drive(model, XS)
    assert_next_run_is_right(model)


@pytest.mark.parametrize("fatal", range(len(TIMESTEPS)))
def test_after_an_error_a_run_equals_a_fresh_one(fatal: int) -> None:
    model, armed = fresh_model(), []

    def fail(*_: object) -> None:
        if armed:
            raise KeyboardInterrupt

    model.final_layer.linear.register_forward_pre_hook(fail)
    expected = drive(enable(model, plan_of()), XS)
    enable(model, plan_of(), in_order=True)
    drive(model, XS[:fatal])
    armed.append(True)
    with pytest.raises(KeyboardInterrupt):
        call(model, XS[fatal], TIMESTEPS[fatal], LABELS)
    armed.clear()
    assert_bitwise(drive(model, XS), expected)


def test_a_run_that_begins_elsewhere_is_the_models_own(model: DiT) -> None:
    with enabled(model, plan_of()):
        disable(model)
        theirs = [call(model, XS[0], t, LABELS) for t in TIMESTEPS[2:]]
    assert_bitwise([call(model, XS[0], t, LABELS) for t in TIMESTEPS[2:]], theirs)
    assert stats(model).originals == {"a run did not begin with the first step": 4}
    assert_next_run_is_right(model)
    enable(model, plan_of(), in_order=True, strict=True)
    with pytest.raises(TrajectoryError, match=r"^[^\n]*did not begin with the first step; strict=False[^\n]*$"):
        call(model, XS[0], TIMESTEPS[2], LABELS)


@pytest.mark.parametrize("step", range(1, len(TIMESTEPS)))
def test_weights_that_change_within_a_run(step: int) -> None:
    model = fresh_model()
    enable(model, plan_of(), in_order=True)
    drive(model, XS[:step])
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.add_(0.1)
    with pytest.raises(TrajectoryError, match=r"^weights changed within a run; begin it again$"):
        call(model, XS[step], TIMESTEPS[step], LABELS)
    ours = drive(model, XS)
    assert_bitwise(ours, drive(enable(model, plan_of()), XS))


def test_batches_of_different_sizes_may_take_turns(model: DiT) -> None:
    xs = [x[:2] for x in XS]
    both = [(call(model, x, t, LABELS), call(model, x[:2], t, OTHERS[:2])) for x, t in zip(XS, TIMESTEPS, strict=True)]
    with enabled(model, plan_of()):
        assert_bitwise([out for out, _ in both], drive(model, XS))
        assert_bitwise([out for _, out in both], drive(model, xs, OTHERS[:2]))


RENAMED = r"^trust_order is called in_order now$"


def assert_promised(model: DiT) -> None:
    theirs = expected()
    assert_bitwise(drive(model, XS), theirs)
    drive(model, XS[:2])
    assert call(model, XS[2], 31, LABELS).isnan().all()


def test_the_name_that_it_had_before_still_promises_and_says_its_new_one() -> None:
    with pytest.warns(DeprecationWarning, match=RENAMED) as said:
        model = enable(fresh_model(), plan_of(), trust_order=True)
    assert [warning.filename for warning in said] == [__file__]
    assert_promised(model)


def test_so_it_does_for_the_length_of_a_with_statement() -> None:
    with warnings.catch_warnings(record=True) as said, enabled(fresh_model(), plan_of(), trust_order=True) as model:
        assert_promised(model)
    assert [(str(warning.message), warning.filename) for warning in said] == [
        ("trust_order is called in_order now", __file__)
    ]


def test_the_name_that_it_had_before_may_say_no() -> None:
    model = fresh_model()
    with pytest.warns(DeprecationWarning, match=RENAMED):
        enable(model, plan_of(), trust_order=False)
    call(model, XS[0], 31, LABELS)
    assert stats(model).refreshed
