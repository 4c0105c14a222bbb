"""Whatever a captured step baked in, swapped behind its back: the next run follows, or the model's own forward does."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from constants import ATTN_MLP, NO
from depth import crossed, deep
from diffusers_kinds import COG_2B, DIT, SIGMA, STEPS, Kind, ask, table_of, timesteps
from diffusers_oracle import bare, replaying
from dropin import TIMESTEPS, call, drive, fresh_model, latents, naive_drive, plan_of
from fake_graphs import FakeGraphs
from fake_runs import SMALLEST, Job, enable_over, over, sampling
from tiny import relative_error, tiny_dit
from torch import Tensor, nn
from torch.nn import functional as F

from ebcache_fast import disable, enable, stats
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import CaptureError, InputError, TrajectoryError
from ebcache_fast.plan import Plan

pytest.importorskip("diffusers")

Swap = Callable[[], AbstractContextManager[None]]
SETTINGS_CHANGED = "torch's settings or functions changed within a run"


@contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def of(function: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """The function, but for a factor that shows.

    Once: under a mode torch's own functions call themselves again, by their names.
    """
    inside = []

    def scaled(*args: Any, **named: Any) -> Any:
        inside.append(1)
        try:
            out = function(*args, **named)
        finally:
            inside.pop()
        if inside:
            return out
        return tuple(factor * one for one in out) if isinstance(out, tuple) else out.mul_(factor)

    return scaled


def swapped(owner: Any, name: str, factor: float = 0.5) -> AbstractContextManager[None]:
    return put(owner, name, of(vars(owner)[name], factor))


def diffusers_attention(name: str) -> Any:
    return getattr(sys.modules["diffusers.models.attention_processor"], name)


FUNCTIONS: dict[str, Swap] = {
    **{
        f"F.{name}": partial(swapped, F, name)
        for name in ("scaled_dot_product_attention", "linear", "layer_norm", "gelu", "silu", "embedding", "conv2d")
    },
    "torch.addmm": partial(swapped, torch, "addmm"),
    "torch.einsum": partial(swapped, torch, "einsum"),  # which the engine does without
    "a norm's forward": partial(swapped, nn.LayerNorm, "forward"),
    "a linear map's forward": partial(swapped, nn.Linear, "forward"),
    "the forward of attention": lambda: swapped(diffusers_attention("Attention"), "forward"),
    "a processor's call": lambda: swapped(diffusers_attention("AttnProcessor2_0"), "__call__"),
    "a processor's call, of attention over videos": lambda: swapped(
        diffusers_attention("CogVideoXAttnProcessor2_0"), "__call__"
    ),
}


def enabled_over_graphs(pipe: Any, **options: Any) -> tuple[Any, FakeGraphs]:
    pipe, graphs = copy.deepcopy(pipe), FakeGraphs()
    enable_over(over(graphs), pipe.transformer, table_of(pipe), **options)
    return pipe, graphs


SWAPPED = [
    (pytest.param if kind is SIGMA or name.startswith("F.") else deep)(kind, name)
    for name in FUNCTIONS
    for kind in (DIT, SIGMA, COG_2B)
    if kind is SIGMA or "attention" in name
]


@pytest.mark.parametrize(("kind", "name"), SWAPPED, ids=str)
def test_a_function_that_was_swapped_is_followed_and_so_is_the_usual_one_again(kind: Kind, name: str) -> None:
    plain, draw = bare(kind)
    usual = draw(replaying(plain))
    pipe, graphs = enabled_over_graphs(plain)
    assert relative_error(draw(pipe), usual) < 1e-5
    assert graphs.captures
    with FUNCTIONS[name]():
        followed, own = draw(replaying(plain)), draw(plain)
        for _ in range(2):
            before = sum(stats(pipe).originals.values())
            ours = draw(pipe)
            counted = sum(stats(pipe).originals.values()) - before
            assert counted in (0, STEPS)
            assert relative_error(ours, own if counted else followed) < 1e-5
    captured = graphs.captures
    for _ in range(2):
        assert relative_error(draw(pipe), usual) < 1e-5
    assert graphs.captures == captured, "its graphs were kept"
    assert not stats(pipe).refreshed


@pytest.mark.parametrize("kind", [DIT, SIGMA, COG_2B], ids=str)
def test_a_method_that_a_layer_calls_is_followed_too(kind: Kind) -> None:
    plain, draw = bare(kind)
    usual = draw(replaying(plain))
    pipe, graphs = enabled_over_graphs(plain)
    assert relative_error(draw(pipe), usual) < 1e-5
    with swapped(sys.modules["diffusers.models.activations"].GELU, "gelu"):
        assert relative_error(draw(pipe), draw(replaying(plain))) < 1e-5
    assert relative_error(draw(pipe), usual) < 1e-5
    assert graphs.replays
    assert not stats(pipe).originals


# ------------------------------------------------------------------------------------- numbers in the place of others

Change = Callable[[Any], Callable[[], object]]  # returns how to undo it


def number(path: str, name: str, value: object) -> Change:
    def change(pipe: Any) -> Callable[[], object]:
        module = pipe.transformer.get_submodule(path)
        before = getattr(module, name)
        setattr(module, name, value)
        return lambda: setattr(module, name, before)

    return change


def mode(path: str, p: float) -> Change:
    def change(pipe: Any) -> Callable[[], object]:
        module = pipe.transformer.get_submodule(path)
        module.p = p
        module.train()
        return lambda: (setattr(module, "p", 0.0), module.eval())

    return change


BLOCK = "transformer_blocks.1"
NUMBERS: dict[str, tuple[Kind, Change]] = {
    "an epsilon of DiT": (DIT, number(f"{BLOCK}.norm3", "eps", 0.5)),
    "an epsilon of PixArt": (SIGMA, number(f"{BLOCK}.norm2", "eps", 0.5)),
    "the last epsilon": (SIGMA, number("norm_out", "eps", 0.5)),
    "an epsilon of CogVideoX": (COG_2B, number(f"{BLOCK}.norm1.norm", "eps", 0.5)),
    "an epsilon of keys": (COG_2B, number(f"{BLOCK}.attn1.norm_k", "eps", 0.5)),
    "heads": (SIGMA, number(f"{BLOCK}.attn1", "heads", 4)),
    "heads of the text": (SIGMA, number(f"{BLOCK}.attn2", "heads", 4)),
    "a factor of attention": (SIGMA, number(f"{BLOCK}.attn1", "rescale_output_factor", 2.0)),
    "a residual": (DIT, number(f"{BLOCK}.attn1", "residual_connection", True)),
    "an exact GELU": (COG_2B, number(f"{BLOCK}.ff.net.0", "approximate", "none")),
    "frequencies": (COG_2B, number("time_proj", "downscale_freq_shift", 1)),
    "dropout of nothing": (SIGMA, mode(f"{BLOCK}.ff.net.1", 0.0)),
}


@pytest.mark.parametrize(("kind", "change"), NUMBERS.values(), ids=NUMBERS)
def test_a_number_that_was_changed_is_followed_and_so_is_the_usual_one_again(kind: Kind, change: Change) -> None:
    plain, draw = bare(kind)
    other = copy.deepcopy(plain)
    pipe, graphs = enabled_over_graphs(plain)
    usual = draw(pipe)
    change(other)
    undo = change(pipe)
    ours, counted = draw(pipe), sum(stats(pipe).originals.values())
    assert counted in (0, STEPS)
    assert relative_error(ours, draw(other) if counted else draw(replaying(other))) < 1e-5
    undo()
    before = stats(pipe)
    assert torch.equal(draw(pipe), usual)
    assert stats(pipe).originals == before.originals
    assert stats(pipe).replays > before.replays
    assert graphs.captures


@pytest.mark.parametrize(("kind", "norm"), [(DIT, "norm3"), (SIGMA, "norm2"), (COG_2B, "norm2.norm")], ids=str)
def test_a_number_changed_within_a_run_is_counted(kind: Kind, norm: str) -> None:
    plain, _ = bare(kind)
    full = kind.pipeline()
    (pipe, _), steps, given = enabled_over_graphs(plain), timesteps(full), kind.call(full)
    ask(pipe.transformer, given, steps[0])
    for model in (pipe.transformer, full.transformer):
        model.get_submodule(f"{BLOCK}.{norm}").eps = 0.5
    assert relative_error(ask(pipe.transformer, given, steps[1]), ask(full.transformer, given, steps[1])) < 1e-5
    assert stats(pipe).refreshed == {"weights changed within a run": 1}


def test_a_hook_on_all_modules_is_the_models_own_and_gone_again_it_is_cached() -> None:
    model, plan = fresh_model(), plan_of(eps_scale=1.0)
    xs = latents(model)
    usual = drive(enable(model, plan), xs)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: 0.5 * out)
    try:
        ours = drive(model, xs)
        assert sum(stats(model).originals.values()) == len(TIMESTEPS)
        disable(model)
        assert all(map(torch.equal, ours, drive(model, xs)))
    finally:
        handle.remove()
    assert all(map(torch.equal, drive(enable(model, plan), xs), usual))


def test_a_layer_in_training_mode_is_left_to_the_model_and_refused_at_first() -> None:
    plain, draw = bare(SIGMA)
    pipe, _ = enabled_over_graphs(plain)
    draw(pipe)
    undo = mode(f"{BLOCK}.ff.net.1", 0.25)(pipe)
    draw(pipe)
    (why,) = stats(pipe).originals
    assert "its transformer_blocks.1.ff.net.1 is in training mode" in why
    disable(pipe)
    with pytest.raises(InputError, match=r"transformer_blocks\.1\.ff\.net\.1 is in training mode; call model\.eval"):
        enable(pipe, table_of(pipe))
    undo()
    enable(pipe, table_of(pipe))


# ------------------------------------------------------------------------------------------------ in the middle of one


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_within_a_run_a_step_computes_everything_anew_and_is_counted(graphs: bool) -> None:
    model = fresh_model()
    xs, plan = latents(model), plan_of(eps_scale=1.0)
    usual, ours = naive_drive(model, xs, eps_scale=1.0), copy.deepcopy(model)
    ours = enable_over(over(FakeGraphs()), ours, plan) if graphs else enable(ours, plan)
    y = torch.tensor([1, 4, 1])
    for step in range(2):
        assert relative_error(call(ours, xs[step], TIMESTEPS[step], y), usual[step]) < 1e-12
    with swapped(F, "scaled_dot_product_attention"):
        with torch.no_grad():
            full = model(xs[2], torch.full((3,), TIMESTEPS[2]), y)
        assert relative_error(call(ours, xs[2], TIMESTEPS[2], y), full) < 1e-12
    assert stats(ours).refreshed == {SETTINGS_CHANGED: 1}
    assert relative_error(call(ours, xs[3], TIMESTEPS[3], y), call(model, xs[3], TIMESTEPS[3], y)) < 1e-12
    assert stats(ours).refreshed == {SETTINGS_CHANGED: 2}
    for out, expected in zip(drive(ours, xs), usual, strict=True):
        assert relative_error(out, expected) < 1e-12


EMBEDDED = ("torch.sin", "torch.exp", "torch.arange", "diffusers.models.embeddings.get_timestep_embedding")


@crossed("kind, name", [DIT, SIGMA, COG_2B], EMBEDDED)
def test_what_is_computed_as_a_run_begins_is_computed_again(kind: Kind, name: str) -> None:
    plain, _ = bare(kind)
    full = kind.pipeline()
    (pipe, _), steps, given = enabled_over_graphs(plain), timesteps(full), kind.call(full)
    ask(pipe.transformer, given, steps[0])
    owner, _, function = name.rpartition(".")
    with swapped(sys.modules[owner], function):
        own = ask(full.transformer, given, steps[1])
        assert relative_error(ask(pipe.transformer, given, steps[1]), own) < 1e-5
    assert sum(stats(pipe).refreshed.values()) == 1


@pytest.mark.parametrize("options", [dict(strict=True), dict(in_order=True)], ids=str)
def test_within_a_run_whoever_asked_for_an_error_gets_it(options: dict[str, bool]) -> None:
    model = fresh_model()
    xs, y = latents(model), torch.tensor([1, 4, 1])
    expected = drive(enable(copy.deepcopy(model), plan_of()), xs)
    enable(model, plan_of(), **options)
    call(model, xs[0], TIMESTEPS[0], y)
    with swapped(F, "scaled_dot_product_attention"), pytest.raises(TrajectoryError, match=SETTINGS_CHANGED):
        call(model, xs[1], TIMESTEPS[1], y)
    for out, right in zip(drive(model, xs), expected, strict=True):
        assert torch.equal(out, right)


def test_our_own_loop_goes_on_eagerly_and_is_counted_or_ends_if_strict() -> None:
    model, job = (
        tiny_dit(0, torch.float32, **SMALLEST),
        Job(Plan.from_types((NO, NO, ATTN_MLP), (900, 500, 0), plan_of().sites), labels=(2,)),
    )
    eager = Engine(model)

    def draw(engine: Engine) -> list[Tensor]:
        states = []
        with sampling(engine, job) as trajectory:
            trajectory.advance()
            with swapped(F, "scaled_dot_product_attention"):
                while trajectory.advance():
                    states.append(trajectory.x.clone())
        return states

    engine = Engine(model, make_graphs=over(FakeGraphs()))
    for ours, right in zip(draw(engine), draw(eager), strict=True):
        assert torch.equal(ours, right)
    assert engine.stats.eager == {SETTINGS_CHANGED: 2}
    with pytest.raises(CaptureError, match=SETTINGS_CHANGED):
        draw(Engine(model, EngineOptions(strict=True), make_graphs=over(FakeGraphs())))
