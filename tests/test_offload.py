"""Offloading by accelerate and by diffusers, before and after enabling: the method, the pipeline's own, or an error."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from constants import CPU
from diffusers_kinds import DIT, SIGMA, STEPS, Kind, ask, families, table_of, timesteps, uncached
from diffusers_oracle import bare, replaying
from dropin import LABELS, assert_bitwise, at, drive, fresh_model, guided_rows, latents, plan_of
from tiny import relative_error
from torch import Tensor, nn

from ebcache_fast import calibrate, disable, enable, enabled, stats
from ebcache_fast.errors import InputError, TrajectoryError

accelerate = pytest.importorskip("accelerate")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

Change = Callable[[Any], object]
of_three = families(DIT)


@pytest.fixture(autouse=True)
def devices_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers gives accelerate cpu:0 where it is told cpu, and takes weights on the one to be away from the other."""
    hook = accelerate.cpu_offload_with_hook
    monkeypatch.setattr(accelerate, "cpu_offload_with_hook", lambda one, _, **named: hook(one, CPU, **named))


def whole(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def no_hooks(pipe: Any) -> None:
    pipe.remove_all_hooks()


def enable_and_offload(pipe: Any, *, enabled_first: bool) -> None:
    changes = (lambda one: enable(one, table_of(one)), whole)
    for change in changes if enabled_first else reversed(changes):
        change(pipe)


# ------------------------------------------------------------------------------------------------ of whole models


@pytest.mark.parametrize("enabled_first", [True, False])
@of_three
def test_whole_models_are_offloaded_and_cached(kind: Kind, pipe: Any, enabled_first: bool) -> None:
    """diffusers takes its hooks away, and puts them there again, after every run."""
    plain, replayed = kind.draw(pipe), kind.draw(replaying(pipe))
    enable_and_offload(pipe, enabled_first=enabled_first)
    for _ in range(2):
        assert relative_error(kind.draw(pipe), replayed) < 1e-5
    assert stats(pipe).steps == {"NO_CACHE": 4, "ATTN_MLP": 2, "ATTENTION": 2, "MLP": 2}
    assert not stats(pipe).originals
    assert not stats(pipe).refreshed
    disable(pipe)
    assert torch.equal(kind.draw(pipe), plain)
    assert hasattr(pipe.transformer, "_hf_hook")
    no_hooks(pipe)
    assert torch.equal(kind.draw(pipe), plain)
    assert pipe.transformer.forward == type(pipe.transformer).forward.__get__(pipe.transformer)


@pytest.mark.parametrize("enabled_first", [True, False])
@of_three
def test_hooks_that_are_gone_leave_it_enabled(kind: Kind, pipe: Any, enabled_first: bool) -> None:
    plain, replayed = kind.draw(pipe), kind.draw(replaying(pipe))
    enable_and_offload(pipe, enabled_first=enabled_first)
    kind.draw(pipe)
    no_hooks(pipe)
    assert relative_error(kind.draw(pipe), replayed) < 1e-5
    assert sum(stats(pipe).steps.values()) == 2 * STEPS
    assert torch.equal(kind.draw(disable(pipe)), plain)
    with enabled(pipe, table_of(pipe)):
        assert relative_error(kind.draw(pipe), replayed) < 1e-5
    assert torch.equal(kind.draw(pipe), plain)


@of_three
def test_tables_that_come_and_go_below_the_hooks(kind: Kind, pipe: Any) -> None:
    plain, replayed = kind.draw(pipe), kind.draw(replaying(pipe))
    whole(pipe)
    with enabled(pipe, uncached(pipe)):
        with enabled(pipe, table_of(pipe)):
            assert relative_error(kind.draw(pipe), replayed) < 1e-5
        assert relative_error(kind.draw(pipe), plain) < 1e-5
        assert stats(pipe).steps == {"NO_CACHE": STEPS}
        other = copy.deepcopy(pipe)
    assert torch.equal(kind.draw(pipe), plain)
    assert relative_error(kind.draw(enable(other, table_of(other))), replayed) < 1e-5
    assert stats(other).steps["NO_CACHE"] == 2


class Arriving(accelerate.hooks.ModelHook):
    """As offloading does between devices: at rest weights and inputs are as the model could not take them."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module.half()

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> Any:
        module.double()
        return accelerate.utils.recursively_apply(arrived, args), accelerate.utils.recursively_apply(arrived, named)


def arrived(one: Tensor) -> Tensor:
    return one.double() if one.is_floating_point() else one


@of_three
def test_hooks_prepare_what_the_engine_gets(kind: Kind, pipe: Any) -> None:
    model, t, call = pipe.transformer, timesteps(pipe)[0], kind.call(pipe)
    accelerate.hooks.add_hook_to_module(model, Arriving())
    at_rest = model.dtype
    model.half()
    plain = ask(model, call, t)
    model.half()
    enable(model, uncached(pipe))
    assert model.dtype == at_rest == torch.float16, "enabling looks at a model as it lies there"
    assert relative_error(ask(model, call, t), plain) < 1e-12
    assert stats(model).steps == {"NO_CACHE": 1}


def accelerates(model: nn.Module) -> None:
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())


def diffusers_own(model: nn.Module) -> None:
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(diffusers.hooks.ModelHook(), "nothing")


@pytest.mark.parametrize("hook", [accelerates, diffusers_own])
@torch.no_grad()
def test_the_originals_dit_is_guided_below_a_hook_too(hook: Change) -> None:
    model, plan = fresh_model(), plan_of()
    xs, y = latents(model, 6), guided_rows(LABELS)
    expected = [enable(copy.deepcopy(model), plan).forward_with_cfg(xs[0], at(930, 6), y, 2.0)]
    expected += drive(enable(copy.deepcopy(model), plan), xs, y)
    hook(model)
    enable(model, plan)
    ours = [model.forward_with_cfg(xs[0], at(930, 6), y, 2.0)]
    ours += drive(model, xs, y)
    assert_bitwise(ours, expected)
    assert not stats(model).originals


# ------------------------------------------------------------------------------------------------ layer by layer


def by_layer(pipe: Any) -> None:
    """As enable_sequential_cpu_offload does with each model of a pipeline."""
    accelerate.cpu_offload(pipe.transformer, CPU, offload_buffers=True)


def not_by_layer(pipe: Any) -> None:
    accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)


def in_groups(level: str) -> Change:
    """As enable_group_offload does."""
    return lambda pipe: diffusers.hooks.apply_group_offloading(
        pipe.transformer, CPU, offload_type=level, num_blocks_per_group=1
    )


def not_in_groups(pipe: Any) -> None:
    registry = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    for name in ("group_offloading", "lazy_prefetch_group_offloading"):
        registry.remove_hook(name, recurse=True)


GROUPS = {level: (in_groups(level), not_in_groups) for level in ("block_level", "leaf_level")}
BY_LAYER = {"sequential": (by_layer, not_by_layer), **GROUPS}
of_layers = pytest.mark.parametrize(("offload", "undo"), BY_LAYER.values(), ids=BY_LAYER)


@of_layers
@of_three
def test_layer_by_layer_the_models_own_answers_and_is_counted(kind: Kind, offload: Change, undo: Change) -> None:
    pipe, draw = bare(kind)
    plain, replayed = draw(pipe), draw(replaying(pipe))
    pipe = enable(copy.deepcopy(pipe), table_of(pipe))
    assert relative_error(draw(pipe), replayed) < 1e-5
    offload(pipe)
    assert torch.equal(draw(pipe), plain)
    assert [*stats(pipe).originals.values()] == [STEPS]
    undo(pipe)
    assert relative_error(draw(pipe), replayed) < 1e-5
    offload(pipe)
    disable(pipe)
    assert torch.equal(draw(pipe), plain)
    undo(pipe)
    assert torch.equal(draw(pipe), plain)


@of_layers
@of_three
def test_layer_by_layer_it_is_refused_until_that_is_gone(kind: Kind, offload: Change, undo: Change) -> None:
    pipe, draw = bare(kind)
    plain, replayed = draw(pipe), draw(replaying(pipe))
    pipe = copy.deepcopy(pipe)
    offload(pipe)
    with pytest.raises(InputError, match=r"; .*enable_model_cpu_offload"):
        enable(pipe, table_of(pipe))
    assert torch.equal(draw(pipe), plain)
    undo(pipe)
    assert relative_error(draw(enable(pipe, table_of(pipe))), replayed) < 1e-5


def test_calibration_comes_first() -> None:
    pipe = SIGMA.pipeline()
    by_layer(pipe)
    with pytest.raises(InputError, match=r"runs on cpu, .* lie on meta, .*; calibrate first"):
        calibrate(pipe, prompts=["the dog"], steps=2, call=dict(SIGMA.size))


@of_layers
@pytest.mark.parametrize("kind", [SIGMA], ids=str)
def test_layer_by_layer_with_strict_is_an_error(kind: Kind, offload: Change, undo: Change) -> None:
    pipe, draw = bare(kind)
    pipe = enable(copy.deepcopy(pipe), table_of(pipe), strict=True)
    offload(pipe)
    with pytest.raises(TrajectoryError, match="the model was changed"):
        draw(pipe)
