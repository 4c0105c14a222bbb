"""diffusers' text-to-image and text-to-video pipelines with caching enabled: what holds for all of them alike."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_kinds import (
    ALPHA_1024,
    COG_2B,
    COG_5B,
    COG_IMAGE,
    COGS,
    PIXARTS,
    SIGMA,
    STEPS,
    Kind,
    ask,
    drive,
    table_of,
    timesteps,
    uncached,
)
from diffusers_oracle import drive_replaying, replaying
from tiny import relative_error
from torch import Tensor

from ebcache_fast import disable, enable, enabled, stats

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

every_kind = pytest.mark.parametrize("kind", [*PIXARTS, *COGS], ids=str)
LAYOUTS = (SIGMA, ALPHA_1024, COG_2B, COG_IMAGE)
every_layout = pytest.mark.parametrize("kind", LAYOUTS, ids=str)
both_models = pytest.mark.parametrize("kind", [SIGMA, COG_5B], ids=str)


@pytest.fixture
def pipe(kind: Kind) -> Any:
    return kind.pipeline()


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert relative_error(ours, theirs) < 1e-5


# ---------------------------------------------------------------------------------------------- the method


@pytest.mark.parametrize(
    ("kind", "guidance_scale", "in_order"),
    [
        *((kind, 4.0, False) for kind in (*PIXARTS, *COGS)),
        *((kind, 1.0, False) for kind in (SIGMA, COG_5B)),
        *((kind, 4.0, True) for kind in (SIGMA, ALPHA_1024, COG_2B, COG_IMAGE)),
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
@both_models
def test_prompts_that_change_from_run_to_run(kind: Kind, pipe: Any, in_order: bool) -> None:
    other = replaying(pipe)
    enable(pipe, table_of(pipe), in_order=in_order)
    for rows in ((0, 1), (2, 1), (0, 1), (0, 1), (4, 4, 3)):
        assert_same(kind.draw(pipe, rows), kind.draw(other, rows))
    assert not stats(pipe).originals
    assert not stats(pipe).refreshed


@both_models
def test_in_inference_mode(kind: Kind, pipe: Any) -> None:
    """Where torch does not count what is written to prompts, they are still the run's own."""
    replayed = kind.draw(replaying(pipe))
    enable(pipe, table_of(pipe), strict=True)
    with torch.inference_mode():
        assert_same(kind.draw(pipe), replayed)


@every_layout
def test_negative_prompts(kind: Kind, pipe: Any) -> None:
    drawn = []
    other = replaying(pipe)
    enable(pipe, table_of(pipe))
    for negative in ("", ["red", "old green house"], ""):
        drawn.append(kind.draw(pipe, negative_prompt=negative))
        assert_same(drawn[-1], kind.draw(other, negative_prompt=negative))
    assert torch.equal(drawn[0], drawn[-1])
    assert relative_error(drawn[1], drawn[0]) > 1e-4


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
    del call["return_dict"]
    plain = model(**call)
    enable(model, table_of(pipe))
    x = call.pop("hidden_states")
    encoder = call.pop("encoder_hidden_states")
    t = call.pop("timestep")
    positional = (x, encoder, t)  # of both models
    for out in (model(x, encoder_hidden_states=encoder, timestep=t, **call), model(*positional, **call)):
        assert type(out) is type(plain)
        assert_same(out.sample, plain.sample)
    (alone,) = model(*positional, **call, return_dict=False)
    assert torch.equal(alone, model(*positional, **call)[0])
    assert not stats(model).originals
    with pytest.raises(TypeError, match="block_controlnet_hidden_states"):  # what it says itself
        model(*positional, **call, block_controlnet_hidden_states=[x])
    with pytest.raises(TypeError, match="hidden_states"):
        model()


@pytest.mark.parametrize("kind", [SIGMA, COG_2B, COG_IMAGE], ids=str)
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


@pytest.mark.parametrize("kind", [SIGMA, COG_2B], ids=str)
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


@pytest.mark.parametrize("enabled_first", [True, False])
@pytest.mark.parametrize("kind", [SIGMA], ids=str)
def test_what_compiling_wraps_around_it(kind: Kind, pipe: Any, enabled_first: bool) -> None:
    plain, replayed = kind.draw(pipe), kind.draw(replaying(pipe))
    if enabled_first:
        enable(pipe, table_of(pipe))
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    if not enabled_first:
        assert torch.equal(kind.draw(pipe), plain)
        enable(pipe, table_of(pipe))
    assert_same(kind.draw(pipe), replayed)
    assert sum(stats(pipe).steps.values()) == STEPS
    assert torch.equal(kind.draw(disable(pipe)), plain)
