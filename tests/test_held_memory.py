"""What caching holds, and when it lets go: with the model that is sent away, at a pipeline's end, within a limit."""

import copy
import gc
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from constants import CPU
from diffusers_kinds import COG_2B, DIT, SIGMA, STEPS, Kind, ask, families, table_of, timesteps
from diffusers_oracle import bare, replaying
from dropin import LABELS, TIMESTEPS, call, drive, fresh_model, latents, plan_of
from fake_graphs import FakeGraphs
from fake_runs import enable_over, over
from tiny import relative_error
from torch import Tensor

from ebcache_fast import CacheTable, disable, enable, sample, stats
from ebcache_fast.dropin import cached_forward
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import CacheLimitError, InputError
from ebcache_fast.plan import StepType

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def devices_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_offload: where a device is named, so that models can be sent away without one."""
    hook = accelerate.cpu_offload_with_hook
    monkeypatch.setattr(accelerate, "cpu_offload_with_hook", lambda one, _, **named: hook(one, CPU, **named))


def place_of(model: Any) -> weakref.ref[Any]:
    """The buffer set that an enabled model holds, without holding it."""
    engine = vars(model)[cached_forward.ATTRIBUTE].engine
    (place,) = engine._leases.all
    return weakref.ref(place)


def contexts_of(model: Any) -> int:
    return len(vars(model)[cached_forward.ATTRIBUTE]._prompts._seen)


def while_decoding(pipe: Any) -> list[int]:
    """A list that gets what caches hold whenever the VAE decodes."""
    seen: list[int] = []
    decode = pipe.vae.decode

    def look(*args: Any, **named: Any) -> Any:
        seen.append(stats(pipe).cache_bytes)
        return decode(*args, **named)

    pipe.vae.decode = look
    return seen


def offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


@pytest.mark.parametrize("enabled_first", [True, False], ids=["enabled first", "offloaded first"])
@pytest.mark.parametrize("options", [{}, dict(in_order=True)], ids=str)
@families(DIT)
def test_under_offload_nothing_is_held_while_others_run(
    kind: Kind, options: dict[str, bool], enabled_first: bool
) -> None:
    pipe = kind.pipeline()
    expected = kind.draw(replaying(pipe), output_type="pt")
    if not enabled_first:
        offload(pipe)
    enable(pipe, table_of(pipe), **options)
    if enabled_first:
        offload(pipe)
    seen = while_decoding(pipe)
    for _ in range(2):
        assert relative_error(kind.draw(pipe, output_type="pt"), expected) < 1e-5
    assert seen == [0, 0]
    assert stats(pipe).cache_bytes == contexts_of(pipe.transformer) == 0
    assert sum(stats(pipe).steps.values()) == 2 * STEPS
    assert not stats(pipe).refreshed


@pytest.mark.parametrize("change", [offload, lambda pipe: None], ids=["offloaded", "as asked"])
def test_after_a_run_that_was_cancelled_the_next_ones_end_lets_go_of_all(change: Callable[[Any], None]) -> None:
    pipe = SIGMA.pipeline()
    expected = SIGMA.draw(replaying(pipe))
    enable(pipe, table_of(pipe), release=True)
    change(pipe)

    def stop(i: int, *_: Any) -> None:
        if i == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        SIGMA.draw(pipe, (3, 4), callback=stop, callback_steps=1)
    assert stats(pipe).cache_bytes > 0
    assert relative_error(SIGMA.draw(pipe), expected) < 1e-5
    assert stats(pipe).cache_bytes == contexts_of(pipe.transformer) == 0
    assert stats(pipe).originals == stats(pipe).refreshed == {}


@families(DIT)
def test_memory_is_kept_for_the_next_run_unless_it_is_to_be_released(kind: Kind) -> None:
    pipe, released = kind.pipeline(), kind.pipeline()
    enable(pipe, table_of(pipe))
    enable(released, table_of(released), release=True)
    assert torch.equal(kind.draw(pipe), kind.draw(released))
    assert stats(pipe).cache_bytes > stats(released).cache_bytes == 0
    assert torch.equal(kind.draw(pipe), kind.draw(released))
    names = {"forward", "_apply", "_reset_stateful_cache", cached_forward.ATTRIBUTE}
    assert not names & vars(disable(released).transformer).keys()


@torch.no_grad()
def test_graphs_and_memory_are_gone_at_once_where_runs_end_and_come_again() -> None:
    graphs, model = FakeGraphs(), fresh_model()
    xs = latents(model)
    expected = drive(enable(copy.deepcopy(model), plan_of()), xs)
    enable_over(over(graphs), model, plan_of(), release=True)
    for step in range(2):
        call(model, xs[step], TIMESTEPS[step], LABELS)
    place = place_of(model)
    assert place() is not None
    gc.disable()
    try:
        for step in range(2, 6):
            call(model, xs[step], TIMESTEPS[step], LABELS)
        assert (place(), len(graphs.alive)) == (None, 0), "without the collector"
    finally:
        gc.enable()
    for ours, right in zip(drive(model, xs), expected, strict=True):
        assert torch.equal(ours, right)


@torch.no_grad()
def test_a_model_that_moves_leaves_nothing_behind_and_one_that_is_converted_goes_on() -> None:
    model = enable(fresh_model(), plan_of())
    xs = latents(model)
    drive(model, xs[:3])
    place = place_of(model)
    counted = dict(stats(model).steps)
    model.to("meta")
    assert (place(), stats(model).cache_bytes, dict(stats(model).steps)) == (None, 0, counted)
    model = enable(fresh_model(), plan_of())
    drive(model, xs[:3])
    model.to(torch.float64)
    assert stats(model).cache_bytes > 0
    call(model, xs[3], TIMESTEPS[3], LABELS)
    assert not stats(model).refreshed


def test_a_pipelines_end_is_still_its_own() -> None:
    """diffusers' own caches are emptied by the same hook."""
    pipe, ended = COG_2B.pipeline(), []
    kind = type(pipe.transformer)
    pipe.transformer.__class__ = type(
        kind.__name__,
        (kind,),
        {"_reset_stateful_cache": lambda self: ended.append(self), "__module__": kind.__module__},
    )
    enable(pipe, table_of(pipe), release=True)
    COG_2B.draw(pipe)
    assert ended == [pipe.transformer]
    COG_2B.draw(disable(pipe))
    assert len(ended) == 2


# --------------------------------------------------------------------------------------------------------- the limit


def bytes_of(kind: Kind) -> int:
    plain, draw = bare(kind)
    pipe = copy.deepcopy(plain)
    draw(enable(pipe, table_of(pipe)))
    return stats(pipe).cache_bytes


@families(DIT)
def test_what_would_be_above_the_limit_is_left_to_the_model_or_an_error_if_strict(kind: Kind) -> None:
    plain, draw = bare(kind)
    needed = bytes_of(kind)
    pipe = copy.deepcopy(plain)
    enable(pipe, table_of(pipe), max_cache_bytes=needed)
    assert relative_error(draw(pipe), draw(replaying(plain))) < 1e-5
    assert not stats(pipe).originals
    enable(pipe, table_of(pipe), max_cache_bytes=needed - 1)
    assert torch.equal(draw(pipe), draw(plain))
    ((why, calls),) = stats(pipe).originals.items()
    assert (calls, stats(pipe).cache_bytes) == (STEPS, 0)
    assert why == (
        f"the caches of 2 rows take {needed} bytes, and with those in use {needed}, above "
        f"max_cache_bytes={needed - 1}; sample fewer at once, or raise the limit"
    )
    enable(pipe, table_of(pipe), max_cache_bytes=needed - 1, strict=True)
    with pytest.raises(CacheLimitError, match=f"max_cache_bytes={needed - 1}; sample fewer"):
        draw(pipe)


def test_what_is_no_longer_called_gives_way() -> None:
    pipe = SIGMA.pipeline()
    ts, first, second = timesteps(pipe), SIGMA.call(pipe, (0, 1)), SIGMA.call(pipe, (2, 3))
    needed = bytes_of(SIGMA)

    def outputs(model: Any, given: Any) -> list[Tensor]:
        return [ask(model, given, t, i) for i, t in enumerate(ts)]

    expected = outputs(enable(copy.deepcopy(pipe.transformer), table_of(pipe)), second)
    model = enable(pipe.transformer, table_of(pipe), max_cache_bytes=2 * needed)
    ask(model, first, ts[0])  # of a run that is given up
    for ours, right in zip(outputs(model, second), expected, strict=True):
        assert torch.equal(ours, right)
    assert not stats(model).originals
    assert 0 < stats(model).cache_bytes <= 2 * needed


def test_our_own_loop_keeps_to_the_limit() -> None:
    model = fresh_model().float()
    table = CacheTable(TIMESTEPS, [StepType.NO_CACHE, *[StepType.ATTN_MLP] * 5])
    engine = Engine(model)
    sample(model, [1, 2], table=table, engine=engine)
    needed = engine.stats.cache_bytes
    limited = Engine(model, EngineOptions(max_cache_bytes=needed))
    sample(model, [1, 2], table=table, engine=limited)
    with pytest.raises(CacheLimitError, match=f"take {2 * needed} bytes"):
        sample(model, [1, 2, 3, 4], table=table, engine=limited)
    sample(model, [3, 4], table=table, engine=limited)


@pytest.mark.parametrize("name", ["max_cache_bytes", "max_graphs", "max_trajectories"])
@pytest.mark.parametrize("limit", [0, -1, True, 1.0, 2.5, 1e9, "1", [], float("nan")], ids=repr)
def test_a_limit_that_is_none_is_named(name: str, limit: Any) -> None:
    with pytest.raises(
        InputError, match=rf"^{name}={re.escape(repr(limit))} is no whole number of 1 or more; leave it"
    ):
        EngineOptions(**{name: limit})
    with pytest.raises(InputError, match=rf"^{name}=.* is no whole number"):
        enable(fresh_model(), plan_of(), **{name: limit})


@pytest.mark.parametrize("name", ["strict", "whole_trajectory", "pdl", "fp8", "release"])
@pytest.mark.parametrize("value", [0, 1, None, "yes", 1.0], ids=repr)
def test_a_switch_is_on_or_off(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name}={value!r} is neither True nor False; pass one of them"):
        EngineOptions(**{name: value})
