"""Other caches: refused where they are there already, and counted or told of where they come on top of ours."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers_kinds import COG_2B, SIGMA, STEPS, Kind, families, table_of
from diffusers_oracle import bare, replaying
from dropin import LABELS, call, drive, fresh_model, latents, plan_of
from tiny import relative_error
from torch import Tensor, nn

from ebcache_fast import disable, enable, stats
from ebcache_fast.engine.module_watch import Watch
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT
from ebcache_fast.models.layers import walk

pytest.importorskip("diffusers")
three = families(COG_2B)


# ------------------------------------------------------------------------------------------ any graph of modules


class Holder(nn.Module):
    """A module that has others, whatever they are."""

    def __init__(self, **others: nn.Module) -> None:
        super().__init__()
        for name, other in others.items():
            setattr(self, name, other)


def cycle() -> nn.Module:
    top, below = Holder(), Holder()
    top.below, below.top, below.itself = below, top, below
    return top


def deep() -> nn.Module:
    top = Holder()
    for _ in range(5000):
        top = Holder(below=top)
    return top


def shared() -> nn.Module:
    """2**40 paths."""
    top = Holder()
    for _ in range(40):
        top = Holder(one=top, other=top)
    return top


GRAPHS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a cycle": (cycle, 2),
    "one below another": (deep, 5001),
    "one in many places": (shared, 41),
    "many": (lambda: nn.ModuleList(nn.Identity() for _ in range(10_000)), 10_001),
}


@pytest.mark.parametrize(("make", "count"), GRAPHS.values(), ids=GRAPHS)
def test_walks_end_on_any_graph_of_modules(make: Callable[[], nn.Module], count: int) -> None:
    graph = make()
    found = [module for _, module in walk(graph)]
    assert len(found) == len({*found}) == count
    watch = Watch(graph)
    assert watch.look() is watch.look()


@pytest.mark.parametrize("make", [cycle, deep, shared], ids=lambda make: make.__name__)
@torch.no_grad()
def test_a_model_that_holds_any_graph_of_modules_is_cached(make: Callable[[], nn.Module]) -> None:
    model = fresh_model()
    xs = latents(model)
    expected = drive(enable(copy.deepcopy(model), plan_of()), xs)
    model.extra = make()
    if make is cycle:
        model.extra.below.top = model
    for ours, right in zip(drive(enable(model, plan_of()), xs), expected, strict=True):
        assert torch.equal(ours, right)
    model.blocks[0].mlp.extra = model.extra
    for ours, right in zip(drive(model, xs), expected, strict=True):
        assert torch.equal(ours, right)
    assert not stats(model).originals
    del model.extra, model.blocks[0].mlp.extra  # deeper than torch itself could go


# ------------------------------------------------------------------------------------------- there before ours


class Unified(nn.Module):
    """All blocks in one, which holds the whole model too."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner, self.transformer = model.transformer_blocks, model

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **named: Any) -> Any:
        for block in self.inner:
            out = block(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, **named)
            hidden_states, encoder_hidden_states = out if isinstance(out, tuple) else (out, encoder_hidden_states)
        return out


def blocks_in_one(model: Any) -> None:
    """As cache-dit does for the length of a call."""
    inner, unified = model.forward, nn.ModuleList([Unified(model)])

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        with mock.patch.object(self, "transformer_blocks", unified):
            return inner(*args, **named)

    model.forward = partial(forward, model)
    model._original_forward = inner


def signed(name: str, value: object) -> Callable[[Any], object]:
    return lambda pipe: setattr(pipe.transformer, name, value)


def signed_in_the_class(pipe: Any) -> None:
    """As TeaCache's users do, but in a class of its own."""
    kind = type(pipe.transformer)
    pipe.transformer.__class__ = type(kind.__name__, (kind,), {"enable_teacache": True, "__module__": kind.__module__})


def by_steps(model: Any) -> None:
    """Every second call gets the answer of the one before it."""
    usual, kept = model.forward, []

    def forward(*args: Any, **named: Any) -> Any:
        if kept:
            return kept.pop()
        kept.append(usual(*args, **named))
        return kept[0]

    model.forward = forward


def by_likeness(model: Any) -> None:
    """Latents that differ little from those before get the answer that these got."""
    usual, kept = model.forward, []

    def forward(*args: Any, **named: Any) -> Any:
        x = next(iter((*args, *named.values())))
        if not kept or kept[0].shape != x.shape or (x - kept[0]).abs().mean() > 0.2 * kept[0].abs().mean():
            kept[:] = x, usual(*args, **named)
        return kept[1]

    model.forward = forward


def in_part(cache: Callable[[Any], object], path: str) -> Callable[[Any], object]:
    return lambda pipe: cache(pipe.transformer.get_submodule(path))


CACHED: dict[str, Callable[[Any], object]] = {
    "cache-dit's module": signed("_context_manager", object()),
    "cache-dit's pipeline": lambda pipe: setattr(pipe, "_context_manager", object()),
    "a flag": signed("_is_cached", True),
    "another flag": signed("enable_my_cache", True),
    "a library's name": signed("_teacache_state", {"cnt": 0}),
    "a class's flag": signed_in_the_class,
    "by steps": in_part(by_steps, ""),
    "by likeness": in_part(by_likeness, ""),
    "attention by steps": in_part(by_steps, "transformer_blocks.0.attn1"),
    "an MLP by likeness": in_part(by_likeness, "transformer_blocks.1.ff"),
    "a block by steps": in_part(by_steps, "transformer_blocks.1"),
}


@pytest.mark.parametrize("cache", CACHED.values(), ids=CACHED)
@three
def test_what_another_library_caches_is_refused(kind: Kind, cache: Callable[[Any], object]) -> None:
    pipe = copy.deepcopy(bare(kind)[0])
    cache(pipe)
    before = dict(vars(pipe.transformer))
    with pytest.raises(InputError, match=r"cache.*; .*take that one away") as refused:
        enable(pipe, table_of(pipe))
    assert "\n" not in str(refused.value)
    assert vars(pipe.transformer) == before


def put_around(part: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Another forward for a module that has one tensor as its output."""
    usual = type(part).forward
    part.forward = lambda *args, **named: change(usual(part, *args, **named))


OTHERWISE: dict[str, Callable[[Any], object]] = {
    "a flag that is off": signed("_is_cached", False),
    "no context": signed("_context_manager", None),
    "another name": signed("rope_cache", torch.ones(3)),
    "a function": signed("enable_cache", lambda: None),
    "a forward around its own": lambda pipe: setattr(pipe.transformer, "forward", partial(pipe.transformer.forward)),
}
PARTS = {"more": lambda out: 1.5 * out, "nothing": torch.zeros_like}


@pytest.mark.parametrize("change", OTHERWISE.values(), ids=OTHERWISE)
@three
def test_what_is_no_cache_is_not_refused(kind: Kind, change: Callable[[Any], object]) -> None:
    plain, draw = bare(kind)
    pipe = copy.deepcopy(plain)
    change(pipe)
    assert relative_error(draw(enable(pipe, table_of(pipe))), draw(replaying(plain))) < 1e-5
    assert stats(pipe).hidden_by is None


@pytest.mark.parametrize("change", PARTS.values(), ids=PARTS)
@three
def test_a_part_that_keeps_nothing_may_give_what_it_likes(kind: Kind, change: Callable[[Tensor], Tensor]) -> None:
    plain, draw = bare(kind)
    plain = copy.deepcopy(plain)
    put_around(plain.transformer.transformer_blocks[0].ff, change)
    pipe = copy.copy(plain)
    pipe.transformer = copy.deepcopy(plain.transformer)
    put_around(pipe.transformer.transformer_blocks[0].ff, change)
    assert relative_error(draw(enable(pipe, table_of(pipe))), draw(replaying(plain))) < 1e-5


# ------------------------------------------------------------------------------------------------- on top of ours


@pytest.mark.parametrize("kind", [SIGMA, COG_2B], ids=str)
def test_blocks_that_are_put_into_one_are_left_to_the_model(kind: Kind) -> None:
    plain, draw = bare(kind)
    pipe = copy.deepcopy(plain)
    enable(pipe, table_of(pipe))
    draw(pipe)
    ours = pipe.transformer.forward
    blocks_in_one(pipe.transformer)
    assert relative_error(draw(pipe), draw(plain)) < 1e-5
    ((why, calls),) = stats(pipe).originals.items()
    assert why.startswith("the model was changed: ")
    assert (calls, stats(pipe).hidden_by) == (STEPS, None)
    pipe.transformer.forward = ours
    assert relative_error(draw(pipe), draw(replaying(plain))) < 1e-5


@pytest.mark.parametrize("path", ["transformer_blocks.0.attn1", "transformer_blocks.1.ff"])
@three
def test_a_part_that_keeps_its_output_is_left_to_the_model(kind: Kind, path: str) -> None:
    plain, draw = bare(kind)
    pipe, plain = copy.deepcopy(plain), copy.deepcopy(plain)
    enable(pipe, table_of(pipe))
    draw(pipe)
    by_likeness(pipe.transformer.get_submodule(path))
    draw(pipe)
    ((why, calls),) = stats(pipe).originals.items()
    assert f"{path} answers a call with what it kept of another" in why
    assert calls == STEPS


def around(model: DiT) -> None:
    """As LoRA's loaders, loggers and casts do."""
    inner = model.forward
    model.forward = lambda *args, **named: inner(*args, **named)  # type: ignore[method-assign]


class Timed:
    """A forward and how often it was called."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.calls = call, 0

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.calls += 1
        return self.call(*args, **named)


def in_an_object(model: DiT) -> None:
    """As profilers do."""
    model.forward = Timed(model.forward)  # type: ignore[method-assign]


def by_an_object(model: DiT) -> None:
    """By a method of one."""
    model.forward = Timed(model.forward).__call__  # type: ignore[method-assign]


def instead(model: DiT) -> None:
    """As cache-dit does with DiT."""

    def patched(self: DiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return DiT.forward(self, x, t, y)

    model.forward = patched.__get__(model)  # type: ignore[method-assign]


def taken_away(model: DiT) -> None:
    del model.forward


@pytest.mark.parametrize("put", [around, in_an_object, by_an_object])
@torch.no_grad()
def test_a_forward_around_ours_does_not_hide_it(put: Callable[[DiT], None]) -> None:
    model = enable(fresh_model(), plan_of())
    put(model)
    put(model)
    drive(model, latents(model))
    assert stats(model).hidden_by is None
    assert sum(stats(model).steps.values()) == 6


@pytest.mark.parametrize(
    ("hide", "name"),
    [(instead, "test_other_caches.instead.patched"), (taken_away, "ebcache_fast.models.modules.DiT.forward")],
)
@torch.no_grad()
def test_a_forward_in_the_place_of_ours_is_told_and_disable_and_enable_still_work(
    hide: Callable[[DiT], None], name: str
) -> None:
    model = fresh_model()
    xs = latents(model)
    own, expected = drive(model, xs), drive(enable(copy.deepcopy(model), plan_of()), xs)
    for _ in range(2):
        enable(model, plan_of())
        assert stats(model).hidden_by is None
        for ours, right in zip(drive(model, xs), expected, strict=True):
            assert torch.equal(ours, right)
        hide(model)
        assert stats(model).hidden_by == name
        assert torch.equal(call(model, xs[0], 930, LABELS), own[0])
    disable(model)
    assert torch.equal(call(model, xs[0], 930, LABELS), own[0])


# ---------------------------------------------------------------------------------------------------- cache-dit itself


@three
def test_cache_dit_before_and_after(kind: Kind) -> None:
    cache_dit = pytest.importorskip("cache_dit")
    plain, draw = bare(kind)
    pipe = copy.deepcopy(plain)
    exact = cache_dit.DBCacheConfig(Fn_compute_blocks=1, residual_diff_threshold=0.0, num_inference_steps=STEPS)
    cache_dit.enable_cache(pipe.transformer, cache_config=exact)
    with pytest.raises(InputError, match="cache_dit caches it already"):
        enable(pipe, table_of(pipe))
    cache_dit.disable_cache(pipe.transformer)
    enable(pipe, table_of(pipe))
    assert relative_error(draw(pipe), draw(replaying(plain))) < 1e-5
    cache_dit.enable_cache(pipe.transformer, cache_config=exact)
    assert relative_error(draw(pipe), draw(plain)) < 1e-4
    assert stats(pipe).hidden_by or sum(stats(pipe).originals.values()) == STEPS
    cache_dit.disable_cache(pipe.transformer)
    assert relative_error(draw(enable(pipe, table_of(pipe))), draw(replaying(plain))) < 1e-5
    assert relative_error(draw(disable(pipe)), draw(plain)) < 1e-5
