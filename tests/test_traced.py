"""An enabled model that is exported, traced, transformed or compiled: its own forward, or ours as it is."""

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from depth import deep
from diffusers_kinds import COG_2B, DIT, SIGMA, STEPS, Kind, ask, table_of
from diffusers_oracle import bare, replaying
from dropin import LABELS, TIMESTEPS, at, drive, fresh_model, guided_rows, latents, plan_of
from tiny import relative_error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebcache_fast import disable, enable, stats
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT

Traced = Callable[..., Any]
EXAMPLE = (TIMESTEPS[0], 0)


def arguments(model: DiT, t: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return latents(model, seed=seed)[0], at(t, 3), LABELS


# ------------------------------------------------------------------------------------------------ exported and traced

WAYS: dict[str, Callable[[DiT, Any], Traced]] = {
    "export": lambda model, args: torch.export.export(model, args, strict=False).module(),
    "export, strict": lambda model, args: torch.export.export(model, args, strict=True).module(),
    "export for any batch": lambda model, args: torch.export.export(
        model, args, dynamic_shapes={name: {0: torch.export.Dim("rows", min=2)} for name in "xty"}
    ).module(),
    "trace": lambda model, args: torch.jit.trace(model, args, check_trace=False),
    "trace, checked": lambda model, args: torch.jit.trace(model, args),
    "make_fx": lambda model, args: make_fx(model)(*args),
    "make_fx with fake tensors": lambda model, args: make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(
        *args
    ),
    "vmap": lambda model, _: lambda x, t, y: torch.vmap(lambda *one: model(*(each[None] for each in one))[0])(x, t, y),
}
OTHERS = [("trace", dict(strict=True)), ("export", dict(strict=True)), ("trace", dict(in_order=True))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("way", "options"), [*((way, {}) for way in WAYS), *OTHERS], ids=str)
@torch.no_grad()
def test_whoever_traces_an_enabled_model_gets_its_own_forward(way: str, options: dict[str, bool]) -> None:
    model = fresh_model(depth=1)
    other = arguments(model, 123, seed=5)
    right = model(*other)
    enable(model, plan_of(depth=1), **options)
    made = WAYS[way](model, arguments(model, TIMESTEPS[0]))
    assert relative_error(made(*other), right) < 1e-12
    untraced = int(way == "trace, checked")  # which calls the model as it is, to compare
    assert sum(stats(model).steps.values()) == untraced
    for ours, expected in zip(drive(model, latents(model)), drive(copy.deepcopy(model), latents(model)), strict=True):
        assert torch.equal(ours, expected)
    assert sum(stats(model).steps.values()) == len(TIMESTEPS) + untraced


@pytest.mark.parametrize("inside", [True, False], ids=["within the mode", "outside of it"])
@torch.no_grad()
def test_fake_tensors_get_fake_tensors(inside: bool) -> None:
    model, mode = enable(fresh_model(), plan_of(), strict=True), FakeTensorMode(allow_non_fake_inputs=True)
    given = [mode.from_tensor(one) for one in arguments(model, TIMESTEPS[0])]
    if inside:
        with mode:
            out = model(*given)
    else:
        out = model(*given)
    assert (type(out).__name__, out.shape) == ("FakeTensor", (3, 8, 8, 8))
    assert not stats(model).steps


@torch.no_grad()
def test_guidance_is_traced_too() -> None:
    model = fresh_model(depth=1)
    xs, y = latents(model, 6), guided_rows(LABELS)
    right = model.forward_with_cfg(xs[1], at(123, 6), y, 2.0)
    enable(model, plan_of(depth=1))

    def guided(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model.forward_with_cfg(x, t, y, 2.0)

    made = make_fx(guided)(xs[0], at(930, 6), y)
    assert relative_error(made(xs[1], at(123, 6), y), right) < 1e-12


@torch.no_grad()
def test_gradients_carried_forward_are_its_own() -> None:
    model = fresh_model()
    x, t, y = arguments(model, TIMESTEPS[0])

    def tangent() -> Tensor:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            out: Tensor = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)), t, y)).tangent
            return out.clone()

    right = tangent()
    assert torch.equal((enable(model, plan_of()), tangent())[1], right)
    assert stats(model).originals == {"gradients are carried forward": 1}


def test_scripting_is_refused() -> None:
    with pytest.raises(InputError, match=r"can't be scripted; call ebcache_fast\.disable\(model\) first"):
        torch.jit.script(enable(fresh_model(), plan_of()))


@pytest.mark.parametrize("kind", [DIT, SIGMA, COG_2B], ids=str)
@torch.no_grad()
def test_models_of_diffusers_are_exported_as_they_are(kind: Kind) -> None:
    pipe = kind.pipeline()
    call = kind.call(pipe)
    call |= dict(timestep=torch.full((2,), 900))
    given, right = call | dict(return_dict=False), ask(pipe.transformer, call, 123)
    enable(pipe, table_of(pipe))
    exported = torch.export.export(pipe.transformer, (), given, strict=False).module()
    x = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(0))
    assert relative_error(exported(**(given | dict(hidden_states=x, timestep=torch.full((2,), 123))))[0], right) < 1e-5


# ------------------------------------------------------------------------------------------------------------ compiled


def in_place(pipe: Any, **options: Any) -> None:
    pipe.transformer.compile(backend="eager", **options)


def around(pipe: Any, **options: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", **options)


@pytest.fixture
def no_frames() -> None:
    torch._dynamo.reset()


FULL = dict(fullgraph=True)
ORDERS = [
    (DIT, in_place, True, FULL),
    deep(DIT, in_place, False, FULL),
    deep(DIT, around, True, FULL),
    deep(DIT, around, False, FULL),
    deep(SIGMA, around, True, FULL | dict(dynamic=True)),
    deep(SIGMA, in_place, False, {}),
    deep(COG_2B, in_place, True, FULL),
    (COG_2B, around, False, FULL),
]


@pytest.mark.usefixtures("no_frames")
@pytest.mark.parametrize(("kind", "how", "enabled_first", "options"), ORDERS)
def test_a_compiled_model_is_cached_and_compiled_again_when_it_is_not(
    kind: Kind, how: Callable[..., None], enabled_first: bool, options: dict[str, bool]
) -> None:
    plain, draw = bare(kind)
    own, expected = draw(plain), draw(replaying(plain))
    pipe = copy.deepcopy(plain)
    if not enabled_first:
        how(pipe, **options)
    enable(pipe, table_of(pipe))
    if enabled_first:
        how(pipe, **options)
    for _ in range(2):
        assert relative_error(draw(pipe), expected) < 1e-5
    assert sum(stats(pipe).steps.values()) == 2 * STEPS
    assert stats(pipe).hidden_by is None
    assert relative_error(draw(disable(pipe)), own) < 1e-5
    assert relative_error(draw(enable(pipe, table_of(pipe))), expected) < 1e-5
    assert relative_error(draw(disable(pipe)), own) < 1e-5


@pytest.mark.usefixtures("no_frames")
def test_compiled_blocks_are_no_matter() -> None:
    plain, draw = bare(SIGMA)
    pipe = copy.deepcopy(plain)
    enable(pipe, table_of(pipe))
    for block in pipe.transformer.transformer_blocks:  # as compile_repeated_blocks does
        block.compile(backend="eager", fullgraph=True)
    assert relative_error(draw(pipe), draw(replaying(plain))) < 1e-5
    assert not stats(pipe).originals
    assert relative_error(draw(disable(pipe)), draw(plain)) < 1e-5


@pytest.mark.usefixtures("no_frames")
@torch.no_grad()
def test_a_function_around_it_breaks_there_or_is_told_why_it_cannot() -> None:
    model = fresh_model()
    xs, expected = latents(model), drive(enable(copy.deepcopy(model), plan_of()), latents(model))
    enable(model, plan_of())

    class Around(nn.Module):
        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return 2 * model(x, t, y)

    loose = torch.compile(Around(), backend="eager")
    for ours, right in zip(drive(loose, xs), expected, strict=True):
        assert torch.equal(ours, 2 * right)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"ebcache_fast answers .*: leave out fullgraph=True"):
        drive(torch.compile(Around(), backend="eager", fullgraph=True), xs)


COMPILED_LATER = """
model.compile(backend="eager", fullgraph=True)
assert all(map(torch.equal, drive(model, latents(model)), expected))
assert sum(stats(model).steps.values()) == 2 * len(TIMESTEPS)
"""


@pytest.mark.parametrize("later", ["", deep(COMPILED_LATER)], ids=["as it is", "compiled later"])
def test_enabling_imports_no_compiler_and_whoever_compiles_later_is_served(later: str) -> None:
    """In a process of its own: others have imported it here."""
    program = """
import sys, torch
from dropin import *
from ebcache_fast import enable, stats
model = fresh_model()
expected = drive(enable(model, plan_of()), latents(model))
assert "torch._dynamo" not in sys.modules
"""
    here = Path(__file__).parent
    subprocess.run([sys.executable, "-c", program + later], cwd=here, env=None, check=True)
