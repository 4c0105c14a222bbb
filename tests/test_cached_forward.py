"""A model's forward under a plan, against the model and against the plain loop."""

import math
from collections.abc import Callable

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, BRANCHES, MLP, NO
from dropin import (
    LABELS,
    TIMESTEPS,
    TYPES,
    assert_close,
    at,
    call,
    drive,
    fresh_model,
    guided_rows,
    latents,
    naive_drive,
    null_labels,
    plan_of,
    reuse_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Kept, alpha_bars, empty_cache, naive_forward, naive_sample, relative_error
from torch import Tensor, nn

from ebcache_fast import enable, enabled, stats
from ebcache_fast.models import DiT
from ebcache_fast.plan import Plan, StepType, layered

SIZES: list[dict[str, object]] = [{}, {"learn_sigma": False, "in_channels": 3, "patch_size": 2, "depth": 3}]
MODELS = {
    (dtype, i): fresh_model(dtype=dtype, **sizes)
    for dtype in (torch.float64, torch.float32)
    for i, sizes in enumerate(SIZES)
}


# ------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 5e-2)],
)
@torch.no_grad()
def test_without_reuse_it_is_the_model(sizes: dict[str, object], dtype: torch.dtype, bound: float) -> None:
    model = fresh_model(dtype=dtype, **sizes)
    plan = plan_of([NO] * 3, eps_scale=1.0, depth=len(model.blocks))
    xs, twice = latents(model, steps=3), latents(model, 2 * len(LABELS), steps=3)
    t, y = at(700, 6), guided_rows(LABELS)
    theirs = [*drive(model, xs), *(model.forward_with_cfg(x, t, y, 3.0) for x in twice)]
    with enabled(model, plan, strict=True):
        ours = drive(model, xs)
    with enabled(model, plan):
        ours += [model.forward_with_cfg(x, t, y, 3.0) for x in twice]
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == dtype
        assert relative_error(one, other) <= bound


STEPS = st.lists(st.tuples(st.sampled_from((NO, ATTENTION, ATTN_MLP, MLP)), st.integers(1, 80)), max_size=7)


@given(
    steps=STEPS,
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    eps_scale=st.sampled_from([0.37, 1.0]),
    kind=st.sampled_from(list(MODELS)),
)
@settings(max_examples=25)
def test_every_order_of_steps_equals_the_plain_loop(
    steps: list[tuple[StepType, int]], labels: list[int], eps_scale: float, kind: tuple[torch.dtype, int]
) -> None:
    model = MODELS[kind]
    depth, y = len(model.blocks), torch.tensor(labels)
    types = [NO, *(step_type for step_type, _ in steps)]
    timesteps = [999 - sum(gap for _, gap in steps[:i]) for i in range(len(types))]
    xs = latents(model, len(y), len(types))
    with enabled(model, Plan.from_types(types, timesteps, layered(depth, BRANCHES)), eps_scale=eps_scale, strict=True):
        ours = [call(model, x, t, y) for x, t in zip(xs, timesteps, strict=True)]
    kept, theirs = empty_cache(model), []
    with torch.no_grad():
        for x, t, step_type in zip(xs, timesteps, types, strict=True):
            out = naive_forward(model, x, t, y, reuse_of(step_type, depth), kept)
            out[:, : model.in_channels] *= eps_scale
            theirs.append(out)
    assert_close(ours, theirs)


def naive_guided(
    model: DiT, x: Tensor, t: int, y: Tensor, step_type: StepType, kept: tuple[Kept, Kept], scale: float
) -> Tensor:
    """forward_with_cfg by its definition, eps scaled by 0.9; x (2N, C, H, W), of which the first half counts."""
    half, depth = len(x) // 2, len(model.blocks)
    cond, uncond = (
        naive_forward(model, x[:half], t, labels, reuse_of(step_type, depth), slots)
        for labels, slots in zip((y[:half], y[half:]), kept, strict=True)
    )
    guided = uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3])
    cond[:, :3] = uncond[:, :3] = guided
    out = torch.cat([cond, uncond])
    out[:, : model.in_channels] *= 0.9
    return out


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("as_number", [float, torch.tensor, lambda s: torch.tensor([s], dtype=torch.float64)])
@torch.no_grad()
def test_guidance_may_change_from_step_to_step(
    sizes: dict[str, object], as_number: Callable[[float], float | Tensor]
) -> None:
    model = fresh_model(**sizes)
    enable(model, plan_of(depth=len(model.blocks)), strict=True)
    kept, y = (empty_cache(model), empty_cache(model)), guided_rows(LABELS)
    for i, x in enumerate(latents(model, 6)):
        scale = 4.0 - i * 0.75
        out = model.forward_with_cfg(x, at(TIMESTEPS[i], 6), y, as_number(scale))
        assert_close([out], [naive_guided(model, x, TIMESTEPS[i], y, TYPES[i], kept, scale)])
        x[3:] = math.inf  # nobody looks at the second half
    assert stats(model).steps == {"NO_CACHE": 2, "ATTENTION": 1, "ATTN_MLP": 2, "MLP": 1}


class GuidesAll(DiT):
    """Guides every eps channel."""

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        eps, rest = self.forward(torch.cat([half, half]), t, y).split(4, dim=1)
        cond, uncond = eps.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class GuidesOtherwise(DiT):
    """Takes a longer list of arguments, and the latents of both halves."""

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, shift: float = 0.25) -> Tensor:
        cond, uncond = self.forward(x, t, y).chunk(2)
        return uncond + cfg_scale * (cond - uncond) + shift


@pytest.mark.parametrize(("kind", "guided"), [(GuidesAll, True), (GuidesOtherwise, False)])
@torch.no_grad()
def test_a_guidance_of_another_kind_keeps_its_meaning(kind: type[DiT], guided: bool, model: DiT) -> None:
    model.__class__ = kind
    x, t, y = latents(model, 6, steps=1)[0], at(930, 6), guided_rows(LABELS)
    theirs = model.forward_with_cfg(x, t, y, 2.5)
    enable(model, plan_of(eps_scale=1.0), strict=True)
    assert_close([model.forward_with_cfg(x, t, y, 2.5)], [theirs])
    assert ("forward_with_cfg" in vars(model)) == guided
    assert stats(model).originals == {}


@torch.no_grad()
def test_guidance_by_row_is_the_models_own(model: DiT) -> None:
    x, t, y = latents(model, 6, steps=1)[0], at(930, 6), guided_rows(LABELS)
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    theirs = model.forward_with_cfg(x, t, y, scales)  # type: ignore[arg-type]
    enable(model, plan_of())
    assert torch.equal(model.forward_with_cfg(x, t, y, scales), theirs)  # type: ignore[arg-type]
    assert stats(model).originals == {"cfg_scale differs within the batch": 1}


def their_ddpm(model: nn.Module, noise: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
    """A sampling loop as the original's users have it, with learned variances; knows nothing of any cache."""
    x = torch.cat([noise[0], noise[0]])
    bars = alpha_bars(TIMESTEPS)
    for i, t in enumerate(TIMESTEPS):
        out = model.forward_with_cfg(x, torch.tensor([t] * len(x)), guided_rows(y), cfg_scale=cfg_scale)
        eps, v = torch.split(out, x.shape[1], dim=1)
        here, there = bars[i], bars[i + 1]
        beta = 1 - here / there
        variance = beta * (1 - there) / (1 - here)
        x0 = (x - (1 - here) ** 0.5 * eps) / here**0.5
        x = (there**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - there) * x) / (1 - here)
        if i + 1 < len(TIMESTEPS):
            fraction = (v + 1) / 2
            log_variance = fraction * math.log(beta) + (1 - fraction) * math.log(variance)
            x = x + torch.exp(0.5 * log_variance) * torch.cat([noise[i + 1]] * 2)
    return x.chunk(2)[0]


@torch.no_grad()
def test_somebodys_own_loop_runs_unmodified(model: DiT) -> None:
    noise = torch.stack(latents(model, steps=len(TIMESTEPS) + 1))
    enable(model, plan_of(), strict=True)
    ours = their_ddpm(model, noise, LABELS, 2.0)
    reuse = [reuse_of(step_type) for step_type in TYPES]
    theirs = naive_sample(
        model, LABELS, noise, TIMESTEPS, reuse, "ddpm", cfg_scale=2.0, guided_channels=3, eps_scale=0.9
    )
    assert relative_error(ours, theirs) <= 1e-10  # 6 steps, each within 1e-12
    assert stats(model).hits == 2 * (1 + 1) + 4 * 2


@given(order=st.lists(st.booleans(), min_size=len(TIMESTEPS), max_size=len(TIMESTEPS)))
@settings(max_examples=6)
def test_guidance_in_two_calls_in_any_order(order: list[bool]) -> None:
    model = fresh_model()
    enable(model, plan_of(), strict=True)
    xs, both = latents(model), (LABELS, null_labels(LABELS))
    outs = [
        [call(model, x, t, both[j]) for j in (first, not first)]
        for x, t, first in zip(xs, TIMESTEPS, order, strict=True)
    ]
    for first_call in (False, True):
        ours = [out[first != first_call] for out, first in zip(outs, order, strict=True)]
        assert_close(ours, naive_drive(model, xs, both[first_call]))
