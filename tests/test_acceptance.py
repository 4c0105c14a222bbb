"""What users of today's caches ran into, from their trackers: each a test, for DiT, PixArt and CogVideoX alike."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from constants import NO
from diffusers_kinds import (
    COG_2B,
    COG_VIDEO,
    DIT,
    STEPS,
    TYPES,
    Call,
    Kind,
    ask,
    drive,
    families,
    table_of,
    timesteps,
)
from diffusers_oracle import by_timestep, drive_replaying, replaying
from tiny import assert_same, relative_error
from torch import Tensor

from ebcache_fast import disable, enable, stats
from ebcache_fast.errors import TrajectoryError

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

three = families(COG_2B)
in_either_order = pytest.mark.parametrize("in_order", [False, True])


class CancelledError(Exception):
    """Of whoever waited for the picture."""


def as_another_has_it(value: Any) -> Any:
    """The same call, with tensors of its own."""
    if isinstance(value, Tensor):
        return value.clone()
    return {name: as_another_has_it(inner) for name, inner in value.items()} if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------------ state that leaks


@in_either_order
@three
def test_the_second_call_equals_the_first(kind: Kind, pipe: Any, in_order: bool) -> None:
    """sglang#35054, diffusers#14093."""
    replayed = kind.draw(replaying(pipe))
    enable(pipe, table_of(pipe), in_order=in_order)
    first, second, other, third = (kind.draw(pipe, rows) for rows in ((0, 1), (0, 1), (2, 3), (0, 1)))
    assert_same(first, replayed)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.allclose(first, other)


@three
def test_a_pipeline_that_was_cancelled(kind: Kind, pipe: Any) -> None:
    """KJNodes#371; diffusers' first block cache raises here, and its MagCache draws another picture."""
    enable(pipe, table_of(pipe))
    expected = {rows: kind.draw(pipe, rows) for rows in ((0, 1), (2,))}

    def cancel(*_: Any, **__: Any) -> None:
        raise CancelledError

    for rows in expected:  # the next is of the same batch, and of another
        pipe.scheduler.step = cancel
        with pytest.raises(CancelledError):
            kind.draw(pipe)
        del pipe.scheduler.step
        assert torch.equal(kind.draw(pipe, rows), expected[rows])
    assert not stats(pipe).originals


def run_of(pipe: Any, call: Call) -> Tensor:
    """All that the transformer answers in a run."""
    return torch.stack(drive(pipe.transformer, call, timesteps(pipe)))


@three
def test_a_run_after_one_that_ended_after_any_step(kind: Kind, pipe: Any) -> None:
    """KJNodes#371, unsloth#6703."""
    ts, calls = timesteps(pipe), [kind.call(pipe, rows) for rows in ((0, 1), (2,))]
    enable(pipe, table_of(pipe))
    expected = [run_of(pipe, call) for call in calls]
    for step in range(1, STEPS):
        for call, theirs in zip(calls, expected, strict=True):  # of the same batch, and of another
            drive(pipe.transformer, as_another_has_it(calls[0]), ts[:step])
            assert torch.equal(run_of(pipe, as_another_has_it(call)), theirs)
    assert not stats(pipe).originals
    assert not stats(pipe).refreshed


@three
def test_a_run_after_one_that_ended_early_of_who_promised_an_order(kind: Kind, pipe: Any) -> None:
    """KJNodes#371, under in_order: at worst the call that breaks the promise is told so, and the next is right.

    Its tensors may be another's from then on: the step where that one would go on is the model's own forward's.
    """
    ts, call = timesteps(pipe), kind.call(pipe)
    uncached = run_of(pipe, call)
    enable(pipe, table_of(pipe), in_order=True)
    expected = run_of(pipe, call)
    for step in range(1, STEPS):
        drive(pipe.transformer, call, ts[:step])
        before = sum(stats(pipe).originals.values())
        try:
            ours = run_of(pipe, call)
        except TrajectoryError:
            ours = run_of(pipe, call)
        if sum(stats(pipe).originals.values()) == before:
            assert torch.equal(ours, expected)
        else:
            assert relative_error(ours, expected) < 1.1 * relative_error(uncached, expected)


@three
def test_a_run_after_an_exception_within_any_step(kind: Kind, pipe: Any) -> None:
    """vllm-omni#7335."""
    calls, failing = 0, 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise CancelledError

    head = pipe.transformer.proj_out_2 if kind is DIT else pipe.transformer.proj_out
    head.register_forward_hook(fail)
    first, second = (kind.call(pipe, rows) for rows in ((0, 1), (2,)))
    enable(pipe, table_of(pipe))
    expected = [run_of(pipe, call) for call in (first, second)]
    for step in range(1, STEPS + 1):
        for call, theirs in zip((first, second), expected, strict=True):
            failing = calls + step
            with pytest.raises(CancelledError):
                run_of(pipe, first)
            assert torch.equal(run_of(pipe, as_another_has_it(call)), theirs)
    assert not stats(pipe).originals


# ------------------------------------------------------------------------------------- steps, and where they begin


@three
def test_a_run_that_begins_in_the_middle(kind: Kind, pipe: Any) -> None:
    """cache-dit#540, unsloth#6864: as image-to-image does with a strength below 1."""
    ts, call = timesteps(pipe), kind.call(pipe)
    for first in (2, 4):
        types = by_timestep(pipe) | {ts[first]: NO}
        replayed = drive(replaying(pipe, types).transformer, call, ts[first:])
        enable(pipe, table_of(pipe))
        for _ in range(2):
            for ours, theirs in zip(drive(pipe.transformer, call, ts[first:]), replayed, strict=True):
                assert_same(ours, theirs)
        assert sum(stats(pipe).refreshed.values()) == 2
        assert stats(pipe).steps["NO_CACHE"] == 2 * sum(types[t] is NO for t in ts[first:])
        enable(pipe, table_of(pipe), strict=True)
        with pytest.raises(TrajectoryError, match=f"t={ts[first]} was not expected"):
            drive(pipe.transformer, call, ts[first:])
        disable(pipe)


@pytest.mark.parametrize("kind", [COG_VIDEO], ids=str)
def test_video_to_video_at_strength_a_half_makes_five_calls_of_ten(kind: Kind, pipe: Any) -> None:
    """cache-dit#540, KJNodes#232."""
    types = TYPES + TYPES
    ts = timesteps(pipe, 10)
    replayed = kind.draw(replaying(pipe, by_timestep(pipe, types)), steps=10, strength=0.5)
    enable(pipe, table_of(pipe, types))
    assert_same(kind.draw(pipe, steps=10, strength=0.5), replayed)
    assert types[5] is NO
    assert ts[5] == 499
    assert stats(pipe).steps == {"NO_CACHE": 2, "ATTN_MLP": 1, "ATTENTION": 1, "MLP": 1}


@pytest.mark.parametrize(("steps", "in_common"), [(3, 1), (10, 5)])
@three
def test_executed_steps_that_are_not_the_tables(kind: Kind, pipe: Any, steps: int, in_common: int) -> None:
    """vllm-omni#5882: a timestep that is not in the table computes everything, is kept, and is counted."""
    types = by_timestep(pipe) if steps == 10 else {}
    replayed = kind.draw(replaying(pipe, types), steps=steps)
    enable(pipe, table_of(pipe))
    assert_same(kind.draw(pipe, steps=steps), replayed)
    strangers = steps - in_common + (kind is DIT and steps == 3)  # whose last step is in the table, and its first not
    assert sum(stats(pipe).refreshed.values()) == strangers
    assert sum(stats(pipe).steps.values()) == steps
    enable(pipe, table_of(pipe), strict=True)
    with pytest.raises(TrajectoryError, match=r"was not expected: a timestep is not in the plan"):
        kind.draw(pipe, steps=steps)


@three
def test_calls_that_warm_up(kind: Kind, pipe: Any) -> None:
    """sglang#18498, KJNodes#232: calls before a run are none of its steps."""
    ts, call = timesteps(pipe), kind.call(pipe, guidance_scale=4.0)
    enable(pipe, table_of(pipe))
    expected = kind.draw(pipe)
    warm_ups: tuple[tuple[int, ...], ...] = ((ts[0],), (ts[0],) * 3, (ts[-1],), (1,), ts[:2], (ts[0], ts[2]))
    for warm_up in warm_ups:
        drive(pipe.transformer, call, warm_up)
        assert torch.equal(kind.draw(pipe), expected)


@pytest.mark.parametrize("steps", [2, 50])
@three
def test_any_number_of_steps(kind: Kind, pipe: Any, steps: int) -> None:
    """KJNodes#232, unsloth#6864: where 50 was written into the code."""
    types = ((NO, *TYPES[1:]) * 10)[:steps]
    call, ts = kind.call(pipe), timesteps(pipe, steps)
    replayed = drive_replaying(pipe, call, ts, types)
    enable(pipe, table_of(pipe, types), strict=True)
    for ours, theirs in zip(drive(pipe.transformer, call, ts), replayed, strict=True):
        assert_same(ours, theirs)
    names = [step_type.name for step_type in types]
    assert stats(pipe).steps == {name: names.count(name) for name in names}


# ------------------------------------------------------------------------------------------------- batches, shapes


@three
def test_batches_of_other_sizes_and_a_last_odd_one(kind: Kind, pipe: Any) -> None:
    """ComfyUI-TeaCache#158, WanVideoWrapper#174."""
    other = replaying(pipe)
    enable(pipe, table_of(pipe))
    for rows in ((0, 1), (2, 3), (4,), (5, 4, 3)):
        assert_same(kind.draw(pipe, rows), kind.draw(other, rows))
    for size in kind.other_sizes:
        assert_same(kind.draw(pipe, (4,), **size), kind.draw(other, (4,), **size))
    assert not stats(pipe).originals
    assert not stats(pipe).refreshed


# ------------------------------------------------------------------------------------------------------- guidance


def halves(kind: Kind, call: Call) -> list[Call]:
    """The two parts of a guided call, the conditional rows first."""

    def part(value: Any, half: int) -> Any:
        if isinstance(value, dict):
            return {name: part(inner, half) for name, inner in value.items()}
        if isinstance(value, Tensor) and value.shape[:1] == (rows,):
            return value.chunk(2)[half]
        return value

    rows = len(call["hidden_states"])
    both = [{name: part(value, half) for name, value in call.items()} for half in range(2)]
    return both if kind is DIT else both[::-1]


@three
def test_guidance_in_two_calls(kind: Kind, pipe: Any) -> None:
    """vllm-omni#5287, #4660: conditional and unconditional rows take turns, each with caches of their own."""
    ts = timesteps(pipe)
    calls = halves(kind, kind.call(pipe, guidance_scale=4.0))
    oracles = [replaying(pipe).transformer for _ in calls]
    assert relative_error(ask(oracles[0], calls[0], ts[0]), ask(oracles[1], calls[1], ts[0])) > 1e-4
    enable(pipe, table_of(pipe), strict=True)
    for order in ((0, 1), (1, 0)):
        for i, t in enumerate(ts):
            for each in order:
                assert_same(ask(pipe.transformer, calls[each], t, i), ask(oracles[each], calls[each], t, i))
    assert stats(pipe).steps == {"NO_CACHE": 8, "ATTN_MLP": 4, "ATTENTION": 4, "MLP": 4}


@in_either_order
@three
def test_two_calls_that_look_alike_are_right_or_end_in_an_error(kind: Kind, pipe: Any, in_order: bool) -> None:
    """vllm-omni#5287: those of an empty prompt are computed in full; who promised one a step is told so."""
    ts, call = timesteps(pipe), kind.call(pipe)
    plain = [[ask(pipe.transformer, call, t, 10 * lane + i) for i, t in enumerate(ts)] for lane in range(2)]
    oracles = [replaying(pipe).transformer for _ in range(2)]
    enable(pipe, table_of(pipe), in_order=in_order)
    with pytest.raises(TrajectoryError, match=r"^[^\n]*tensors of its own[^\n]*$") if in_order else nullcontext():
        for i, t in enumerate(ts):
            for lane in range(2):
                ours = ask(pipe.transformer, call, t, 10 * lane + i)
                if not in_order:
                    assert_same(ours, plain[lane][i])
    for oracle in oracles:  # and afterwards all is well
        other = as_another_has_it(call)
        for ours, theirs in zip(drive(pipe.transformer, other, ts), drive(oracle, call, ts), strict=True):
            assert_same(ours, theirs)


@three
def test_without_guidance_after_guidance(kind: Kind, pipe: Any) -> None:
    """sglang#29688: cfg=1 has no unconditional rows."""
    other = replaying(pipe)
    enable(pipe, table_of(pipe), strict=True)
    for scale in (4.0, 1.0, 7.5):
        assert_same(kind.draw(pipe, guidance_scale=scale), kind.draw(other, guidance_scale=scale))


@three
def test_guidance_that_ends_within_a_run(kind: Kind, pipe: Any) -> None:
    """sglang#29688: from some step on there are no unconditional rows, whose caches must not be missed."""
    ts, switch = timesteps(pipe), 2
    guided = kind.call(pipe, guidance_scale=4.0)
    alone = halves(kind, guided)[0]
    before, after = replaying(pipe).transformer, replaying(pipe, by_timestep(pipe) | {ts[switch]: NO}).transformer
    enable(pipe, table_of(pipe))
    for _ in range(2):
        first, then = as_another_has_it(guided), as_another_has_it(alone)
        for i, t in enumerate(ts):
            call, oracle = (first, before) if i < switch else (then, after)
            assert_same(ask(pipe.transformer, call, t, i), ask(oracle, call, t, i))
    assert sum(stats(pipe).refreshed.values()) == 2
