"""CogVideoX with caching enabled: strength, frames, rotary embeddings."""

from typing import Any

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, MLP, NO
from diffusers_kinds import COG_2B, COG_5B, COG_IMAGE, COG_VIDEO, STEPS, Kind, ask, drive, table_of, timesteps, twin
from diffusers_oracle import by_timestep, drive_replaying, replaying
from diffusers_tiny import ROTARY, TEXT_WIDTH, tiny_cogvideox
from tiny import assert_all_same, relative_error
from torch import Tensor

from ebcache_fast import enable, stats
from ebcache_fast.errors import TrajectoryError

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TEN = (NO, ATTN_MLP, MLP, NO, ATTENTION, ATTN_MLP, ATTENTION, NO, ATTN_MLP, MLP)


only_video = pytest.mark.parametrize("kind", [COG_VIDEO], ids=str)
only_2b = pytest.mark.parametrize("kind", [COG_2B], ids=str)
only_5b = pytest.mark.parametrize("kind", [COG_5B], ids=str)
both_positions = pytest.mark.parametrize("kind", [COG_2B, COG_5B], ids=str)


# ------------------------------------------------------------------------------------------ where a run begins


@pytest.mark.parametrize("strength", [0.5, 0.8])
@only_video
def test_strength_takes_the_steps_of_the_timesteps_that_run(kind: Kind, pipe: Any, strength: float) -> None:
    ts, first = timesteps(pipe, len(TEN)), len(TEN) - round(strength * len(TEN))
    types = by_timestep(pipe, TEN) | {ts[first]: NO}  # there is nothing yet to reuse
    replayed = kind.draw(replaying(pipe, types), steps=len(TEN), strength=strength)
    enable(pipe, table_of(pipe, TEN))
    for _ in range(2):
        assert relative_error(kind.draw(pipe, steps=len(TEN), strength=strength), replayed) < 1e-5
    executed, seen = [types[t].name for t in ts[first:]], stats(pipe)
    assert seen.steps == {name: 2 * executed.count(name) for name in executed}
    assert sum(seen.refreshed.values()) == (2 if first else 0)
    assert not seen.originals


@only_video
def test_strength_in_turn(kind: Kind, pipe: Any) -> None:
    """Runs that begin in the middle, and at the first step, one after the other."""
    ts = timesteps(pipe, len(TEN))
    oracles = {n: replaying(pipe, by_timestep(pipe, TEN) | {ts[-n]: NO}) for n in (5, 8, 10)}
    enable(pipe, table_of(pipe, TEN))
    for n in (10, 5, 8, 10):
        ours, theirs = (kind.draw(one, steps=10, strength=n / 10) for one in (pipe, oracles[n]))
        assert relative_error(ours, theirs) < 1e-5


class CancelledError(Exception):
    pass


def give_up_after_three(pipe: Any, i: int, t: Any, named: dict[str, Any]) -> dict[str, Any]:
    if i == 2:
        raise CancelledError
    return named


@pytest.mark.parametrize("in_order", [False, True])
@only_video
def test_a_run_that_begins_where_another_was_given_up(kind: Kind, pipe: Any, in_order: bool) -> None:
    """Of the same prompt, at the very step that would have come next."""
    ts = timesteps(pipe, len(TEN))
    plain, oracle = twin(pipe), replaying(pipe, by_timestep(pipe, TEN) | {ts[3]: NO})
    enable(pipe, table_of(pipe, TEN), in_order=in_order)
    with pytest.raises(CancelledError):
        kind.draw(pipe, steps=len(TEN), strength=1.0, callback_on_step_end=give_up_after_three)
    theirs = kind.draw(plain if in_order else oracle, steps=len(TEN), strength=0.7)
    assert relative_error(kind.draw(pipe, steps=len(TEN), strength=0.7), theirs) < 1e-5
    done = stats(pipe).originals if in_order else stats(pipe).refreshed
    assert done == {"a run did not begin with the first step": 7 if in_order else 1}


@torch.no_grad()
@pytest.mark.parametrize("in_order", [False, True])
@only_2b
def test_a_loop_that_makes_its_prompts_anew_at_each_step(kind: Kind, pipe: Any, in_order: bool) -> None:
    model, ts = pipe.transformer, timesteps(pipe, len(TEN))
    enable(model, table_of(pipe, TEN), in_order=in_order)
    x, text = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 6, TEXT_WIDTH)
    for t in ts:
        model(x, text.clone(), torch.tensor([t]))
    assert sum(stats(model).refreshed.values()) == 1
    assert stats(model).hits > 0
    assert not stats(model).originals


@torch.no_grad()
@only_2b
def test_films_of_one_prompt_that_take_turns_between_the_steps_of_the_plan(kind: Kind, pipe: Any) -> None:
    """Their prompts are not made anew at each step: each film holds its own, and is what it is alone."""
    model, (_, t, reusing, *_) = pipe.transformer, timesteps(pipe)
    text = torch.randn(1, 6, TEXT_WIDTH)
    films = [(torch.randn(1, 3, 4, 8, 8), text.clone()) for _ in range(2)]
    enable(model, table_of(pipe, [NO, NO, ATTN_MLP, NO, NO]))
    alone = [model(*films[0], torch.tensor([at])).sample for at in (t, t - 1, reusing)]
    films[0] = films[0][0], text.clone()
    for between in (t, t - 1):
        for film in films:
            model(*film, torch.tensor([between]))
    assert torch.equal(model(*films[0], torch.tensor([reusing])).sample, alone[-1])


@only_video
def test_strict_refuses_to_begin_in_the_middle(kind: Kind, pipe: Any) -> None:
    enable(pipe, table_of(pipe, TEN), strict=True)
    kind.draw(pipe, steps=len(TEN), strength=1.0)
    with pytest.raises(TrajectoryError, match=r"t=499 was not expected: a run did not begin with the first step"):
        kind.draw(pipe, steps=len(TEN), strength=0.5)
    kind.draw(pipe, steps=len(TEN), strength=1.0)
    assert not stats(pipe).refreshed


@only_video
def test_trusting_the_order_never_takes_another_run_for_ours(kind: Kind, pipe: Any) -> None:
    """Whoever promised it and breaks it gets the right film, or NaN and TrajectoryError."""
    ts = timesteps(pipe, len(TEN))
    expected = {n: kind.draw(replaying(pipe, by_timestep(pipe, TEN) | {ts[-n]: NO}), steps=10, strength=n / 10)
                for n in (5, 10)}  # fmt: skip
    plain = kind.draw(pipe, steps=10, strength=0.5)
    enable(pipe, table_of(pipe, TEN), in_order=True)
    for n in (10, 5, 10, 10):
        try:
            ours = kind.draw(pipe, steps=10, strength=n / 10)
        except TrajectoryError:
            continue
        allowed = [expected[n]] if n == 10 else [expected[n], plain]
        assert min(relative_error(ours, each) for each in allowed) < 1e-5
    assert relative_error(ours, expected[10]) < 1e-5  # the last of them


# ----------------------------------------------------------------------------------------- text, image, frames


@both_positions
def test_a_prompt_that_a_callback_changes_within_a_run(kind: Kind, pipe: Any) -> None:
    changed_at, ts = 1, timesteps(pipe)
    text = torch.randn(4, 6, TEXT_WIDTH, generator=torch.Generator().manual_seed(3))

    def change(_: Any, step: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": text} if step == changed_at else {}

    types = by_timestep(pipe) | {ts[changed_at + 1]: NO}  # nothing was kept of the other text
    named = dict(callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    replayed = kind.draw(replaying(pipe, types), **named)
    enable(pipe, table_of(pipe))
    for _ in range(2):
        assert relative_error(kind.draw(pipe, **named), replayed) < 1e-5
    assert sum(stats(pipe).refreshed.values()) == 2


@pytest.mark.parametrize("kind", [COG_IMAGE, COG_VIDEO], ids=str)
def test_other_pixels_for_the_same_prompt(kind: Kind, pipe: Any) -> None:
    name = "image" if kind is COG_IMAGE else "video"
    other = replaying(pipe)
    enable(pipe, table_of(pipe))
    for row in (0, 4, 0):
        named = {name: kind.words((row, row))[name]}
        ours, theirs = (kind.draw(one, **named) for one in (pipe, other))
        assert relative_error(ours, theirs) < 1e-5


@only_2b
def test_a_film_that_is_interrupted_and_the_next(kind: Kind, pipe: Any) -> None:
    def interrupt(running: Any, step: int, t: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        running._interrupt = step == 2
        return {}

    replayed = kind.draw(replaying(pipe))
    enable(pipe, table_of(pipe))
    for _ in range(2):
        kind.draw(pipe, callback_on_step_end=interrupt)
        assert relative_error(kind.draw(pipe), replayed) < 1e-5
    assert sum(stats(pipe).steps.values()) == 2 * (3 + STEPS)


@both_positions
def test_guidance_that_changes_with_time(kind: Kind, pipe: Any) -> None:
    replayed = kind.draw(replaying(pipe), use_dynamic_cfg=True)
    enable(pipe, table_of(pipe))
    assert relative_error(kind.draw(pipe, use_dynamic_cfg=True), replayed) < 1e-5


@both_positions
def test_rotary_embeddings_are_those_of_the_call(kind: Kind, pipe: Any) -> None:
    """A crop of other coordinates has the same shape. A model with added positions takes them too, if given some."""
    ts, call = timesteps(pipe), kind.call(pipe)
    heads = pipe.transformer.config.attention_head_dim
    angles = torch.rand(2, 48, heads, generator=torch.Generator().manual_seed(0)) * 3
    given = [call["image_rotary_emb"], *((angle.cos(), angle.sin()) for angle in angles), call["image_rotary_emb"]]
    calls = [call | dict(image_rotary_emb=each) for each in given]
    expected = [drive_replaying(pipe, each, ts) for each in calls]
    plain = [drive(pipe.transformer, each, ts) for each in calls]
    assert relative_error(expected[1][0], expected[2][0]) > 1e-4
    enable(pipe, table_of(pipe))
    for each, replayed, own in zip(calls, expected, plain, strict=True):
        before = sum(stats(pipe).originals.values())
        ours = drive(pipe.transformer, each, ts)
        answered = sum(stats(pipe).originals.values()) - before
        assert answered in (0, STEPS)
        assert_all_same(ours, own if answered else replayed)
    if kind is COG_5B:
        assert not stats(pipe).originals


@only_5b
def test_version_1_5(kind: Kind, pipe: Any) -> None:
    """Its patches span frames, and its image-to-video model embeds an offset."""
    sizes = dict(patch_size_t=2, patch_bias=False, ofs_embed_dim=16, time_embed_dim=16)
    pipe.transformer = tiny_cogvideox(**sizes, use_rotary_positional_embeddings=True, attention_head_dim=16)
    x = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 6, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    rotary = pipe._prepare_rotary_positional_embeddings(16, 16, 4, torch.device("cpu"))
    ts, call = timesteps(pipe), dict(hidden_states=x, encoder_hidden_states=text, image_rotary_emb=rotary)
    calls = [call | dict(ofs=torch.full((1,), ofs)) for ofs in (2.0, 9.0)]
    expected = [drive_replaying(pipe, each, ts) for each in calls]
    assert relative_error(expected[0][0], expected[1][0]) > 1e-4
    enable(pipe, table_of(pipe))
    for each, replayed in zip(calls, expected, strict=True):
        assert_all_same(drive(pipe.transformer, each, ts), replayed)
    assert not stats(pipe).originals


@only_5b
def test_an_offset_for_each_row_is_the_models_own(kind: Kind, pipe: Any) -> None:
    pipe.transformer = tiny_cogvideox(ofs_embed_dim=8, **ROTARY)
    ts, call = timesteps(pipe), kind.call(kind.pipeline()) | dict(ofs=torch.tensor([2.0, 9.0]))
    plain = drive(pipe.transformer, call, ts)
    enable(pipe, table_of(pipe))
    assert all(map(torch.equal, drive(pipe.transformer, call, ts), plain))
    assert [*stats(pipe).originals.values()] == [STEPS]


@only_5b
def test_rotary_embeddings_in_one_tensor(kind: Kind, pipe: Any) -> None:
    ts, call = timesteps(pipe), kind.call(pipe)
    replayed = drive_replaying(pipe, call, ts)
    enable(pipe, table_of(pipe))
    together = call | dict(image_rotary_emb=torch.stack(call["image_rotary_emb"]))
    assert_all_same(drive(pipe.transformer, together, ts), replayed)
    assert not stats(pipe).refreshed


# -------------------------------------------------------------------------------------------- the model's own


@both_positions
def test_a_condition_of_time_is_its_own_error(kind: Kind, pipe: Any) -> None:
    call, t = kind.call(pipe), timesteps(pipe)[0]
    enable(pipe, table_of(pipe))
    with pytest.raises(TypeError):  # what it says itself: it has no layer for them
        ask(pipe.transformer, call | dict(timestep_cond=torch.ones(2, 8)), t)


@both_positions
def test_a_pipelines_attention_kwargs(kind: Kind, pipe: Any) -> None:
    plain = kind.draw(pipe, attention_kwargs={"scale": 1.0})
    enable(pipe, table_of(pipe))
    assert torch.equal(kind.draw(pipe, attention_kwargs={"scale": 1.0}), plain)
    assert [*stats(pipe).originals.values()] == [STEPS]
