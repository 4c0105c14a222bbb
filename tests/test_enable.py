"""enable, disable, enabled, stats: what they leave on a model, and what they refuse."""

import copy
import io
import math
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from constants import BRANCHES, NO
from dropin import (
    DEPTH,
    LABELS,
    TIMESTEPS,
    TYPES,
    assert_bitwise,
    assert_close,
    at,
    call,
    drive,
    guided_rows,
    latents,
    naive_drive,
    plan_of,
)
from tiny import tiny_dit
from torch import Tensor, nn

from ebcache_fast import CacheTable, disable, enable, enabled, stats
from ebcache_fast.errors import EBCacheError, InputError, TableError
from ebcache_fast.models import DiT, DiTDenoiser
from ebcache_fast.plan import Plan, layered

TABLE = CacheTable(TIMESTEPS, TYPES, 0.8)


@torch.no_grad()
def answers(model: DiT) -> list[Tensor]:
    """By both methods, over a run."""
    xs = latents(model, 6)
    y = guided_rows(LABELS)
    return [*drive(model, xs, y), *(model.forward_with_cfg(x, at(t, 6), y, 2.0) for x, t in zip(xs, TIMESTEPS))]  # noqa: B905


def attributes(model: nn.Module) -> dict[str, Any]:
    """All that an instance has, by name."""
    return dict(vars(model))


# --------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("in_order", [False, True])
def test_disable_gives_back_the_model_to_the_bit(in_order: bool, model: DiT) -> None:
    before, kept = answers(model), attributes(model)
    assert enable(model, TABLE, in_order=in_order) is model
    assert not any(map(torch.equal, answers(model), before))
    assert disable(model) is model
    assert attributes(model) == kept
    assert_bitwise(answers(model), before)
    assert attributes(disable(model)) == kept


def test_disable_waits_for_the_call_of_another_thread(model: DiT) -> None:
    x, disabling = latents(model)[0], Thread(target=disable, args=(model,))
    own = call(model, x, TIMESTEPS[0], LABELS)
    enable(model, CacheTable(TIMESTEPS[:1], TYPES[:1]))

    def meanwhile(*_: Any) -> None:
        disabling.start()
        disabling.join(timeout=0.1)

    handle = model.blocks[1].mlp.fc2.register_forward_hook(meanwhile)
    assert_close(call(model, x, TIMESTEPS[0], LABELS), own)
    handle.remove()
    disabling.join()
    assert_bitwise([call(model, x, TIMESTEPS[0], LABELS)], [own])


def test_the_state_dict_is_the_models(model: DiT) -> None:
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    enable(model, TABLE)
    file = io.BytesIO()
    for _ in range(2):  # before and after a run
        assert list(model.state_dict()) == list(kept)
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        answers(model)
    torch.save(model.state_dict(), file)
    file.seek(0)
    tiny_dit(11).load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_the_tables_b_unless_told_otherwise(model: DiT) -> None:
    xs = latents(model)
    for b, options in ((0.8, {}), (0.8, {"eps_scale": None}), (0.37, {"eps_scale": 0.37})):
        enable(model, TABLE, **options)
        assert_close(drive(model, xs), naive_drive(model, xs, eps_scale=b))
    enable(model, TABLE, eps_scale=1.5, allow_amplify=True)
    assert_close(drive(model, xs), naive_drive(model, xs, eps_scale=1.5))


def test_enabling_again_gives_the_new_table(model: DiT) -> None:
    before, kept = answers(model), attributes(model)
    enable(enable(model, TABLE), Plan.uncached(TIMESTEPS, layered(DEPTH, BRANCHES)), in_order=True)
    assert_close(answers(model), before)
    assert attributes(disable(model)) == kept
    assert_bitwise(answers(model), before)


def test_the_off_switch(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    before = answers(model)
    enable(model, TABLE, strict=True)
    for value in ("1", "yes"):
        monkeypatch.setenv("EBCACHE_DISABLE", value)
        assert_bitwise(answers(model), before)
    assert stats(model).originals == {"EBCACHE_DISABLE": 24}
    assert not stats(model).steps
    for value in ("", "0"):
        monkeypatch.setenv("EBCACHE_DISABLE", value)
        assert not torch.equal(answers(model)[1], before[1])
    assert sum(stats(model).steps.values()) == 24


def test_enabled_for_a_while_and_within_another(model: DiT) -> None:
    before, kept = answers(model), attributes(model)
    xs = latents(model)
    with enabled(model, TABLE) as same:
        assert same is model
        outer = drive(model, xs)
        call(model, xs[0], TIMESTEPS[0], LABELS)
        with enabled(model, TABLE, eps_scale=0.5, strict=True):
            assert_close(drive(model, xs), naive_drive(model, xs, eps_scale=0.5))
        with pytest.raises(ZeroDivisionError), enabled(model, TABLE, eps_scale=0.5):
            raise ZeroDivisionError
        with pytest.raises(InputError), enabled(model, TABLE, eps_scale=2.0):
            raise AssertionError
        assert torch.equal(call(model, xs[1], TIMESTEPS[1], LABELS), outer[1])  # the run goes on, counted on
        assert sum(stats(model).steps.values()) == 8
        assert stats(model).refreshed == {}
    assert attributes(model) == kept
    assert_bitwise(answers(model), before)


# ------------------------------------------------------------------------------------------ others' forwards


@pytest.mark.parametrize("names", [("forward",), ("forward_with_cfg",), ("forward", "forward_with_cfg")])
def test_methods_of_the_instances_own_come_back(names: tuple[str, ...], model: DiT) -> None:
    seen: list[str] = []

    def watch(name: str) -> Callable[..., Tensor]:
        inner = getattr(model, name)

        def method(*args: object) -> Tensor:
            seen.append(name)
            out: Tensor = inner(*args)
            return out

        return method

    for name in names:
        setattr(model, name, watch(name))
    kept, before = attributes(model), answers(model)
    enable(model, TABLE, strict=True)
    seen.clear()
    answers(model)
    assert not seen
    disable(model)
    assert attributes(model) == kept
    assert_bitwise(answers(model), before)
    assert set(seen) == set(names)


def wrap(model: DiT) -> list[Tensor]:
    """Put a wrapper around the forward there is; returns where it keeps what went through it."""
    inner, seen = model.forward, list[Tensor]()

    def wrapper(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(inner(x, t, y))
        return seen[-1]

    model.forward = wrapper  # type: ignore[method-assign]
    return seen


def test_a_wrapper_put_around_it_gets_the_models_own_after_disable(model: DiT) -> None:
    xs = latents(model)
    before = drive(model, xs)
    enable(model, TABLE)
    cached, seen = model.forward, wrap(model)
    wrapper = model.forward
    ours = drive(model, xs)
    assert_bitwise(ours, seen)
    assert_close(ours, naive_drive(model, xs, eps_scale=0.8))
    disable(model)
    assert model.forward is wrapper
    assert_bitwise(drive(model, xs), before)
    model.forward = cached  # type: ignore[method-assign]
    assert_bitwise(drive(model, xs), before)
    assert_close(drive(enable(model, TABLE), xs), ours)


def test_a_wrapper_is_still_there_after_another_table(model: DiT) -> None:
    xs = latents(model)
    enable(model, TABLE)
    seen, wrapper = wrap(model), model.forward
    with enabled(model, TABLE, eps_scale=0.5):
        seen.clear()
        assert_close(drive(model, xs), naive_drive(model, xs, eps_scale=0.5))
        assert not seen
    assert model.forward is wrapper
    assert_close(drive(model, xs), naive_drive(model, xs, eps_scale=0.8))
    assert len(seen) == len(xs)
    assert stats(model).hits > 0


# ------------------------------------------------------------------------------------------------------ copies


def saved_and_loaded(model: DiT) -> DiT:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: DiT = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("in_order", [False, True])
def test_a_copy_is_enabled_and_shares_nothing(duplicate: Callable[[DiT], DiT], in_order: bool, model: DiT) -> None:
    plain, xs = answers(model), latents(model)
    enable(model, TABLE, in_order=in_order)
    expected = drive(model, xs)
    drive(model, xs[:3])
    other = duplicate(model)
    assert stats(other).trajectories == 0
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.zero_()
    assert_bitwise(drive(other, xs), expected)
    assert_bitwise(answers(disable(other)), plain)
    disable(model)
    assert not torch.equal(drive(model, xs)[0], plain[0])
    again = duplicate(enable(other, TABLE))
    disable(other)
    assert_bitwise(drive(again, xs), expected)


def test_a_shallow_copy_leaves_the_original_alone(model: DiT) -> None:
    enable(model, TABLE)
    expected = drive(model, latents(model))
    disable(copy.copy(model))
    with pytest.raises(InputError, match="not enabled"):
        stats(copy.copy(model))
    assert_bitwise(drive(model, latents(model)), expected)


# -------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("types", [TYPES, (NO, NO), TYPES[:2]])
def test_what_is_counted(types: tuple[Any, ...], model: DiT) -> None:
    plan = plan_of(types)
    enable(model, plan)
    drive(model, latents(model, steps=len(types)))
    drive(model, latents(model, steps=1))
    call(model, latents(model)[0], 31, LABELS)
    seen = stats(model)
    steps = [*(t.name for t in types), "NO_CACHE", "NO_CACHE"]
    assert seen.steps == {name: steps.count(name) for name in steps}
    assert seen.hits == sum(len(step.reused) for step in plan.steps)
    assert seen.eager == {"no CUDA graphs on a cpu device": len(steps)}
    assert (seen.replays, seen.graphs, seen.trajectories) == (0, 0, 2)
    assert seen.refreshed == {"a timestep is not in the plan": 1}
    assert seen.originals == {}
    assert seen.cache_bytes == plan.cache_bytes(DiTDenoiser(model).shape, rows=3, itemsize=8)
    assert set(seen.operations.values()) <= {"torch", "torch's libraries", "nothing: fp8=False"}
    assert stats(enable(model, plan)).steps == {}


# ---------------------------------------------------------------------------------------------------- bad input


class Twin(DiT):
    """The layout of a DiT, and another forward."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y) * 1.01


class Several(DiT):
    """A forward that returns several things."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y), None  # type: ignore[return-value]


class Demanding(DiT):
    """A forward that wants more."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, t, y) * mask


def become(kind: type[DiT]) -> Callable[[DiT], object]:
    return lambda model: setattr(model, "__class__", kind)


def nothing(_: DiT) -> None:
    """Leave the model as it is."""


SIZES_OF_ANOTHER = dict(DiTDenoiser(tiny_dit(num_heads=4)).shape.sizes)
REFUSED: dict[str, tuple[Callable[[DiT], object], Any, dict[str, Any], type[EBCacheError], str]] = {
    "training mode": (nn.Module.train, TABLE, {}, InputError, r"training mode.*model\.eval\(\)"),
    "another forward": (become(Twin), TABLE, {}, InputError, "Twin.*computes something else"),
    "another output": (become(Several), TABLE, {}, InputError, "Several.*computes something else"),
    "another signature": (become(Demanding), TABLE, {}, InputError, "Demanding can.t be tried.*TypeError: .*'mask'"),
    "no weights": (lambda model: model.to("meta"), TABLE, {}, InputError, "meta device"),
    "another layout": (lambda model: delattr(model, "pos_embed"), TABLE, {}, InputError, "it lacks 'pos_embed'"),
    "another depth": (nothing, plan_of(depth=3), {}, TableError, "expected 3 layers.*got 2 layers"),
    "another model": (nothing, CacheTable(TIMESTEPS, TYPES, model=SIZES_OF_ANOTHER), {}, TableError, "num_heads 4"),
    **{
        f"b={b}": (nothing, TABLE, {"eps_scale": b}, InputError, rf"eps_scale={b} is outside \(0, 1\].*allow_amplify")
        for b in (0.0, -1.0, 1.01, math.nan, math.inf)
    },
    "b=inf, allowed": (nothing, TABLE, {"eps_scale": math.inf, "allow_amplify": True}, InputError, "eps_scale=inf"),
    "a table's path": (nothing, "table.json", {}, InputError, "table='table.json' is no table but a str"),
    "no graphs": (nothing, TABLE, {"max_graphs": 0}, InputError, "max_graphs=0 is no whole number of 1 or more"),
    "no runs": (nothing, TABLE, {"max_trajectories": 0}, InputError, "max_trajectories=0 is no whole number of 1"),
}


@pytest.mark.parametrize(("spoil", "table", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("was_enabled", [False, True])
def test_what_is_refused_changes_nothing(
    spoil: Callable[[DiT], object],
    table: Any,
    options: dict[str, Any],
    error: type[EBCacheError],
    message: str,
    was_enabled: bool,
    model: DiT,
) -> None:
    if was_enabled:
        drive(enable(model, TABLE), latents(model)[:2])
    spoil(model)
    before, counted = attributes(model), stats(model) if was_enabled else None
    with pytest.raises(error, match=message) as caught:
        enable(model, table, **options)
    assert "\n" not in str(caught.value)
    assert attributes(model) == before
    assert (stats(model) if was_enabled else None) == counted


def test_a_model_that_is_not_known_is_told_so_before_its_mode() -> None:
    with pytest.raises(InputError, match=r"^Linear is of no known family"):
        enable(nn.Linear(2, 2).train(), TABLE)


def test_stats_before_the_first_call(model: DiT) -> None:
    none_yet = stats(enable(model, TABLE))
    assert (none_yet.graphs, none_yet.cache_bytes, none_yet.trajectories, none_yet.replays) == (0, 0, 0, 0)
    assert not none_yet.steps


def test_stats_of_a_model_that_is_not_enabled(model: DiT) -> None:
    with pytest.raises(InputError, match=r"^DiT is not enabled; call ebcache_fast\.enable"):
        stats(disable(model))


@pytest.mark.parametrize(
    "surrounding", [torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.device("meta")]
)
def test_enable_minds_no_surroundings(surrounding: Callable[[], Any], model: DiT) -> None:
    xs = latents(model)
    with surrounding():
        enable(model, TABLE, strict=True)
    assert_close(drive(model, xs), naive_drive(model, xs, eps_scale=0.8))
    t = at(TIMESTEPS[0], 3)
    with torch.device("meta"), torch.no_grad():  # a default device of somebody else's
        ours = model(xs[0], t, LABELS)
    assert_close([ours], naive_drive(model, xs[:1], eps_scale=0.8))
