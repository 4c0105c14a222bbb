"""diffusers' pipelines with caching enabled, in place and back again: what holds for every family alike."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from depth import crossed, deep
from diffusers_kinds import (
    ALPHA_1024,
    COG_2B,
    COG_5B,
    COG_IMAGE,
    COGS,
    DIT,
    PIXARTS,
    SIGMA,
    STEPS,
    THREE,
    Kind,
    ask,
    drive,
    table_of,
    timesteps,
    uncached,
)
from diffusers_oracle import drive_replaying, replaying
from tiny import assert_same, relative_error
from torch import Tensor, nn

from ebcache_fast import disable, enable, enabled, stats
from ebcache_fast.errors import TrajectoryError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

LAYOUTS = (DIT, SIGMA, ALPHA_1024, COG_2B, COG_IMAGE)
every_layout = pytest.mark.parametrize("kind", [kind if kind in THREE else deep(kind) for kind in LAYOUTS], ids=str)
every_family = pytest.mark.parametrize("kind", [DIT, SIGMA, COG_5B], ids=str)


# ---------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize(
    ("kind", "guidance_scale", "in_order"),
    [
        *((kind, 4.0, False) for kind in (DIT, *PIXARTS, *COGS)),
        *((kind, 1.0, False) for kind in (DIT, SIGMA, COG_5B)),
        *((kind, 4.0, True) for kind in LAYOUTS),
    ],
    ids=str,
)
def test_uncached_it_is_the_pipeline_and_cached_the_method(
    kind: Kind, pipe: Any, guidance_scale: float, in_order: bool
) -> None:
    draw = partial(kind.draw, guidance_scale=guidance_scale)
    plain, replayed = draw(pipe), draw(replaying(pipe))
    assert relative_error(replayed, plain) > 1e-3
    assert enable(pipe, uncached(pipe), in_order=in_order) is pipe
    assert_same(draw(pipe), plain)
    enable(pipe, table_of(pipe), in_order=in_order)
    for _ in range(2):
        assert_same(draw(pipe), replayed)
    counted = stats(pipe)
    assert counted == stats(pipe.transformer)
    assert counted.steps == {"NO_CACHE": 4, "ATTN_MLP": 2, "ATTENTION": 2, "MLP": 2}
    assert counted.hits == 2 * 2 * (6 if kind in PIXARTS else 4)  # of layers, of runs: slots that were read
    assert not counted.originals
    assert not counted.refreshed


@every_layout
def test_pictures_and_films(kind: Kind, pipe: Any) -> None:
    replayed = kind.draw(replaying(pipe), output_type="pt")
    enable(pipe, table_of(pipe))
    assert_same(kind.draw(pipe, output_type="pt"), replayed)


@pytest.mark.parametrize("in_order", [False, True])
@every_family
def test_rows_that_change_from_run_to_run(kind: Kind, pipe: Any, in_order: bool) -> None:
    other = replaying(pipe)
    enable(pipe, table_of(pipe), in_order=in_order)
    for rows in ((0, 1), (2, 1), (0, 1), (0, 1), (4, 4, 3)):
        assert_same(kind.draw(pipe, rows), kind.draw(other, rows))
    assert not stats(pipe).originals
    assert not stats(pipe).refreshed


@every_family
def test_in_inference_mode(kind: Kind, pipe: Any) -> None:
    """Where torch does not count what is written to prompts, they are still the run's own."""
    replayed = kind.draw(replaying(pipe))
    enable(pipe, table_of(pipe), strict=True)
    with torch.inference_mode():
        assert_same(kind.draw(pipe), replayed)


@every_layout
def test_other_step_counts_compute_everything_and_are_counted(kind: Kind, pipe: Any) -> None:
    plain, others = kind.draw(pipe, steps=3), set(timesteps(pipe, 3)) - set(timesteps(pipe))
    enable(pipe, table_of(pipe))
    assert_same(kind.draw(pipe, steps=3), plain)
    assert stats(pipe).refreshed["a timestep is not in the plan"] == len(others) > 1
    assert stats(pipe).steps == {"NO_CACHE": 3}
    enable(pipe, table_of(pipe), strict=True)
    with pytest.raises(TrajectoryError, match=f"t={max(others)} was not expected: a timestep is not in the plan"):
        kind.draw(pipe, steps=3)


@every_layout
def test_a_run_after_one_that_was_cancelled_and_one_of_another_batch(kind: Kind, pipe: Any) -> None:
    class CancelledError(Exception):
        pass

    def cancel(*_: Any, **__: Any) -> Iterator[None]:
        raise CancelledError

    cached = kind.draw(enable(pipe, table_of(pipe)))
    step, pipe.scheduler.step = pipe.scheduler.step, cancel
    with pytest.raises(CancelledError):
        kind.draw(pipe)
    pipe.scheduler.step = step
    kind.draw(pipe, rows=(1,))
    assert torch.equal(kind.draw(pipe), cached)


@pytest.mark.parametrize(
    ("kind", "in_order"),
    [*((kind, False) for kind in (SIGMA, ALPHA_1024, COG_2B, COG_5B)), (SIGMA, True), (COG_2B, True)],
    ids=str,
)
def test_other_sizes_in_the_next_call(kind: Kind, pipe: Any, in_order: bool) -> None:
    other = replaying(pipe)
    enable(pipe, table_of(pipe), in_order=in_order)
    for size in ({}, *kind.other_sizes, {}):
        ours, theirs = (kind.draw(one, rows=(2,), **size) for one in (pipe, other))
        assert ours.shape == theirs.shape
        assert_same(ours, theirs)
    assert not stats(pipe).originals
    assert not stats(pipe).refreshed
    assert stats(pipe).steps["ATTN_MLP"] == 2 + len(kind.other_sizes)


# ------------------------------------------------------------------------------------------- there and back


@every_layout
def test_disable_gives_the_pipeline_back(kind: Kind, pipe: Any) -> None:
    plain, attributes = kind.draw(pipe), dict(vars(pipe.transformer))
    enable(pipe.transformer, table_of(pipe))
    cached = kind.draw(pipe)
    assert disable(pipe) is pipe
    assert vars(pipe.transformer) == attributes
    assert torch.equal(kind.draw(pipe), plain)
    with enabled(pipe, table_of(pipe)) as inner:
        assert inner is pipe
        assert torch.equal(kind.draw(pipe), cached)
    assert torch.equal(kind.draw(pipe), plain)


@every_layout
def test_an_enabled_pipeline_is_saved_as_it_was(kind: Kind, pipe: Any, tmp_path: Path) -> None:
    plain, state = kind.draw(pipe), pipe.transformer.state_dict()
    enable(pipe, table_of(pipe))
    kind.draw(pipe)
    assert list(pipe.transformer.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in pipe.transformer.state_dict().items())
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer) is type(pipe.transformer)
    assert torch.equal(kind.draw(again), plain)


@every_layout
def test_a_copy_is_enabled_by_itself(kind: Kind, pipe: Any) -> None:
    plain = kind.draw(pipe)
    enable(pipe, table_of(pipe))
    cached = kind.draw(pipe)
    other = copy.deepcopy(pipe)
    disable(pipe)
    assert torch.equal(kind.draw(pipe), plain)
    assert torch.equal(kind.draw(other), cached)
    assert sum(stats(other).steps.values()) == STEPS


# ------------------------------------------------------------------------------------------ the module alone


@pytest.mark.parametrize(("kind", "in_order"), [(SIGMA, True), *((kind, False) for kind in LAYOUTS)], ids=str)
def test_the_module_alone(kind: Kind, pipe: Any, in_order: bool) -> None:
    ts, call = timesteps(pipe), kind.call(pipe)
    replayed = drive_replaying(pipe, call, ts)
    model = pipe.transformer
    assert enable(model, table_of(pipe), in_order=in_order) is model
    for _ in range(2):
        for ours, theirs in zip(drive(model, call, ts), replayed, strict=True):
            assert_same(ours, theirs)
    assert not stats(model).originals


@torch.no_grad()
@every_layout
def test_the_forward_returns_what_it_did(kind: Kind, pipe: Any) -> None:
    model, call = pipe.transformer, kind.call(pipe) | dict(timestep=torch.full((2,), 999))
    call.pop("return_dict", None)
    plain = model(**call)
    order = ("timestep", "class_labels") if kind is DIT else ("encoder_hidden_states", "timestep")
    x, *others = positional = [call.pop(name) for name in ("hidden_states", *order)]
    with pytest.raises(Exception) as alone_is_no_call:  # noqa: PT011, the model's own
        model(x)
    enable(model, table_of(pipe))
    for out in (model(x, **dict(zip(order, others, strict=True)), **call), model(*positional, **call)):
        assert type(out) is type(plain)
        assert_same(out.sample, plain.sample)
    (alone,) = model(*positional, **call, return_dict=False)
    assert torch.equal(alone, model(*positional, **call)[0])
    assert not stats(model).originals
    with pytest.raises(TypeError, match="block_controlnet_hidden_states"):  # what it says itself
        model(*positional, **call, block_controlnet_hidden_states=[x])
    with pytest.raises(TypeError, match="hidden_states"):
        model()
    with pytest.raises(alone_is_no_call.type):
        model(x)


@pytest.mark.parametrize("kind", [DIT, SIGMA, COG_2B, COG_IMAGE], ids=str)
def test_timesteps_of_any_form(kind: Kind, pipe: Any) -> None:
    """As others call it: numbers of any type, and one for all rows where the model takes that."""
    ts, call, model = timesteps(pipe), kind.call(pipe), pipe.transformer
    plain = drive(model, call, ts)
    enable(model, uncached(pipe))
    for dtype in (torch.int64, torch.int32, torch.float32, torch.float64):
        named = call | dict(timestep=torch.full((2,), ts[0], dtype=dtype))
        with torch.no_grad():
            ours = model(**named)[0]
        disable(model)
        with torch.no_grad():
            theirs = model(**named)[0]
        enable(model, uncached(pipe))
        assert_same(ours, theirs)
    assert_same(ask(model, call, ts[0]), plain[0])


# ------------------------------------------------------------------------------- what the model itself answers


@pytest.mark.parametrize("kind", THREE, ids=str)
def test_what_the_model_itself_must_answer_is_its_own_and_counted(kind: Kind, pipe: Any) -> None:
    model, call, t = pipe.transformer, kind.call(pipe), timesteps(pipe)[0]

    def under_autocast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ask(model, call, t)

    def with_gradients() -> Tensor:
        out: Tensor = model(**call)[0]
        assert out.requires_grad
        return out.detach()

    def in_training() -> Tensor:
        model.train()
        torch.manual_seed(0)  # DiT drops labels
        try:
            return ask(model, call, t)
        finally:
            model.eval()

    def at_several_timesteps() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(**(call | dict(timestep=torch.tensor([t, t - 1]))))[0]
            return out

    asked: dict[str, Callable[[], Tensor]] = {
        "autocast is on": under_autocast,
        "gradients are recorded": with_gradients,
        "the model is in training mode": in_training,
        "timesteps differ within the batch": at_several_timesteps,
    }
    plain = {why: run() for why, run in asked.items()}
    enable(model, table_of(pipe))
    for why, run in asked.items():
        assert torch.equal(run(), plain[why])
        assert stats(model).originals[why] == 1
    assert not stats(model).steps


EXTRAS: dict[str, tuple[Kind, dict[str, Any], dict[str, Any]]] = {  # and what says the same as nothing
    "DiT": (DIT, dict(cross_attention_kwargs={"scale": 1.0}), dict(cross_attention_kwargs=None)),
    "PixArt": (SIGMA, dict(cross_attention_kwargs={"scale": 1.0}), dict(cross_attention_kwargs={})),
    "PixArt, attention_mask": (SIGMA, dict(attention_mask=torch.ones(2, 16).tril(3)), dict(attention_mask=None)),
    "CogVideoX": (COG_2B, dict(attention_kwargs={"scale": 1.0}), dict(attention_kwargs={})),
    "CogVideoX, rotary embeddings": (COG_5B, dict(attention_kwargs={"scale": 1.0}), dict(attention_kwargs=None)),
}


@pytest.mark.parametrize(("kind", "extra", "nothing"), EXTRAS.values(), ids=EXTRAS)
def test_arguments_that_the_method_does_not_know(
    kind: Kind, pipe: Any, extra: dict[str, Any], nothing: dict[str, Any]
) -> None:
    model, ts, call = pipe.transformer, timesteps(pipe), kind.call(pipe)
    plain, replayed = drive(model, call | extra, ts), drive_replaying(pipe, call, ts)
    enable(pipe, table_of(pipe))
    assert all(map(torch.equal, drive(model, call | extra, ts), plain))
    assert stats(pipe).originals == {"arguments that the engine does not know": STEPS}
    for known in (call, call | nothing):
        for ours, theirs in zip(drive(model, known, ts), replayed, strict=True):
            assert_same(ours, theirs)


# ------------------------------------------------------------------------------------------- hooks of one's own


class Counting(diffusers.hooks.ModelHook):
    """Changes nothing."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> Any:
        self.calls += 1
        return args, named


class Wrapping(Counting):
    """The same with a forward of its own."""

    def new_forward(self, module: nn.Module, *args: Any, **named: Any) -> Any:
        return self.fn_ref.original_forward(*args, **named)


@crossed("kind, hook, enabled_first", THREE, [Counting, Wrapping], [True, False])
def test_a_hook_of_somebodys_own_stays_around_it(
    kind: Kind, pipe: Any, hook: type[Counting], enabled_first: bool
) -> None:
    plain, cached = kind.draw(pipe), kind.draw(enable(copy.deepcopy(pipe), table_of(pipe)))
    registry, put = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer), hook()
    changes = (lambda: enable(pipe, table_of(pipe)), lambda: registry.register_hook(put, "counting"))
    for change in changes if enabled_first else reversed(changes):
        change()
    assert put.calls == 0, "enabling is no call of the model"
    assert torch.equal(kind.draw(pipe), cached)
    assert torch.equal(kind.draw(disable(pipe)), plain)
    assert torch.equal(kind.draw(enable(pipe, table_of(pipe))), cached)
    assert put.calls == 3 * STEPS
    registry.remove_hook("counting")
    assert torch.equal(kind.draw(pipe), cached)
    assert torch.equal(kind.draw(disable(pipe)), plain)
    assert put.calls == 3 * STEPS
