"""The engine over the Triton kernels: whole trajectories of tiny models, in the interpreter or on a GPU."""

import copy
from dataclasses import replace

import pytest
import torch
from accuracy import DEVICE
from constants import ATTENTION, ATTN_MLP, BRANCHES, CPU, MLP, NO
from depth import crossed, deep
from tiny import relative_error, tiny_dit
from torch import Tensor, nn

from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Batch, Engine
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.trajectory import Prediction, split
from ebcache_fast.kernels import launch
from ebcache_fast.models import DiT, DiTDenoiser
from ebcache_fast.ops import operations as ops
from ebcache_fast.plan import (
    COMPUTE,
    REUSE,
    Compute,
    Forecast,
    ForecastSpan,
    FullAndWindow,
    KeepSpan,
    Plan,
    Rule,
    SharedByGuidance,
    SkipSpan,
    StepPlan,
    StepType,
    Tokens,
    Window,
    layered,
)
from ebcache_fast.samplers import make_sampler, trajectory_noise

LABELS = torch.tensor([1, 4])
DEPTH = 2
SITES = layered(DEPTH, BRANCHES)
MIXED = [NO, ATTENTION, ATTN_MLP, MLP, NO, ATTN_MLP, ATTN_MLP, ATTN_MLP, ATTN_MLP, NO]
TRITON = replace(ops.own_matmul_operations(), attention=None)  # SDPA, as by default


def _each(attention: Rule, mlp: Rule) -> StepPlan:
    """The same rules in all layers."""
    return StepPlan(SITES, (attention, mlp) * DEPTH)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger tiles than on a GPU: the interpreter takes its time by the program. The kernels' own tests keep theirs."""
    table = {name: {80: ((launch.ALL, launch.Launch(16, 128, 4)),)} for name in launch.TABLE}
    table["linear_gelu"] = launch.TABLE["linear_gelu"]
    monkeypatch.setattr(launch, "TABLE", table)


@torch.no_grad()
def model_in(dtype: torch.dtype, **sizes: object) -> DiT:
    model = tiny_dit(5, torch.float64, depth=DEPTH, **sizes)
    model.final_layer.linear.weight.mul_(0.5)  # keeps 50 steps of an untrained model below 1e3
    return model.to(dtype)


def plan_of(types: list[StepType], sampler: str = "ddpm", eps_scale: float = 1.0) -> Plan:
    return Plan.from_types(types, make_sampler(sampler, len(types)).timesteps, SITES, eps_scale)


@torch.no_grad()
def run(
    model: DiT, plan: Plan, operations: ops.Operations, device: torch.device, sampler: str = "ddpm", scale: float = 1.5
) -> Tensor:
    """Our own loop over one plan; latents (2, C, H, W) in float32, or float64 for a float64 model."""
    model = copy.deepcopy(model).to(device)
    stepper, engine = make_sampler(sampler, len(plan)), Engine(model, operations=operations)
    drawn = len(plan) if stepper.draws_noise else 0
    noise = trajectory_noise(7, range(len(LABELS)), drawn, engine.denoiser.latent_shape)
    rows = torch.tensor(stepper.rows)
    with engine.sampling(plan, LABELS.to(device), Guidance(scale), rows, noise) as trajectory:
        while trajectory.advance():
            pass
        return trajectory.x.cpu().clone()


def cached_steps(turns: int = 12) -> Plan:
    """50 steps, or other turns, in the pattern of the released table, with ATTENTION steps among them."""
    types = [NO, *[kind for _ in range(turns) for kind in (NO, ATTENTION, ATTN_MLP, ATTN_MLP)], NO]
    return plan_of(types, eps_scale=0.97)


@pytest.mark.parametrize("turns", [2, deep(12)])
def test_fifty_cached_steps_in_float32(turns: int) -> None:
    plan = cached_steps(turns)
    exact = run(model_in(torch.float64), plan, ops.TORCH, CPU)
    ours = run(model_in(torch.float32), plan, TRITON, DEVICE)
    assert exact.abs().max() < 1e3
    assert relative_error(ours, exact) <= 1e-5


@pytest.mark.slow
def test_fifty_cached_steps_in_float16() -> None:
    plan, half = cached_steps(), model_in(torch.float16)
    exact = run(copy.deepcopy(half).double(), plan, ops.TORCH, CPU)  # the very weights
    ours, own = run(half, plan, TRITON, DEVICE), run(half, plan, ops.TORCH, DEVICE)
    assert exact.abs().max() < 1e3
    assert (ours - exact).abs().max() <= 2 * (own - exact).abs().max()


SIZES: tuple[dict[str, object], ...] = (
    {},
    {"learn_sigma": False},
    {"in_channels": 3, "patch_size": 2, "input_size": 6},
)


@crossed("sizes, scale, sampler", SIZES, [1.0, 1.5], ["ddpm", "ddim"])
def test_every_step_type(sizes: dict[str, object], scale: float, sampler: str) -> None:
    plan = plan_of(MIXED, sampler, 0.95)
    exact = run(model_in(torch.float64, **sizes), plan, ops.TORCH, CPU, sampler, scale)
    assert relative_error(run(model_in(torch.float32, **sizes), plan, TRITON, DEVICE, sampler, scale), exact) <= 1e-5


def test_a_sampler_with_a_memory() -> None:
    plan = plan_of(MIXED, "dpm-solver++", 0.95)
    exact = run(model_in(torch.float64), plan, ops.TORCH, CPU, "dpm-solver++")
    assert relative_error(run(model_in(torch.float32), plan, TRITON, DEVICE, "dpm-solver++"), exact) <= 1e-5


def test_plans_that_reuse_layer_by_layer() -> None:
    """More than two pending branches, at the start of a step, amidst it and at its end."""
    row = {c: tuple(COMPUTE if letter == "C" else REUSE for letter in c) for c in ("CC", "CR", "RC", "RR")}
    steps = [["CC"] * 4, ["RR", "RC", "RR", "CR"], ["RR", "RR", "CC", "RR"], ["CR", "RR", "RR", "RR"], ["CC"] * 4]
    timesteps = make_sampler("ddpm", len(steps)).timesteps
    plan = Plan(tuple(StepPlan.by_layer(BRANCHES, tuple(row[c] for c in rows)) for rows in steps), timesteps, 1.0)
    models = [tiny_dit(5, dtype, depth=4) for dtype in (torch.float64, torch.float32)]
    exact, ours = run(models[0], plan, ops.TORCH, CPU), run(models[1], plan, TRITON, DEVICE)
    assert relative_error(ours, exact) <= 1e-5


def test_own_attention() -> None:
    plan = plan_of([NO, MLP, NO])
    exact = run(model_in(torch.float64), plan, ops.TORCH, CPU)
    ours = run(model_in(torch.float32), plan, ops.own_matmul_operations(), DEVICE)
    assert relative_error(ours, exact) <= 1e-5


def predictions(model: DiT, operations: ops.Operations, device: torch.device) -> list[Prediction]:
    """The drop-in's form: eps and variance of each step of MIXED for given latents."""
    model = copy.deepcopy(model).to(device)
    dtype = torch.float64 if DiTDenoiser(model).weight().dtype == torch.float64 else torch.float32
    xs = torch.randn(len(MIXED), len(LABELS), 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    engine, guidance = Engine(model, operations=operations), Guidance(1.5)
    rows = guidance.row_labels(engine.denoiser, LABELS.to(device))
    run = engine.forward_run(
        plan_of(MIXED), Batch(rows, len(LABELS), guidance.channels, engine.denoiser.latent_shape), Tail()
    )
    run.guide(1.5)
    return [split(run.predict(i, x), len(x), x.shape[1]) for i, x in enumerate(xs)]


def test_predictions_of_every_step_type() -> None:
    ours = predictions(model_in(torch.float32), TRITON, DEVICE)
    for one, exact in zip(ours, predictions(model_in(torch.float64), ops.TORCH, CPU), strict=True):
        assert relative_error(one.eps.cpu(), exact.eps) <= 1e-5
        assert relative_error(one.variance.cpu(), exact.variance) <= 1e-5


def doubled(module: nn.Module, _: object, out: Tensor) -> Tensor:
    return 2 * out


@pytest.mark.parametrize(
    "part",
    ["x_embedder", deep("x_embedder.proj"), "final_layer.linear", deep("blocks.1.mlp.act"), "blocks.0.attn.proj"],
)
def test_a_layer_with_a_hook_runs_as_a_module(part: str) -> None:
    """At the ends it must leave the fused operations, in every step type; inside, the fused MLP."""
    models = [model_in(dtype) for dtype in (torch.float64, torch.float32)]
    plain = run(models[0], plan_of(MIXED), ops.TORCH, CPU)
    for model in models:
        model.get_submodule(part).register_forward_hook(doubled)
    hooked = run(models[0], plan_of(MIXED), ops.TORCH, CPU)
    assert relative_error(hooked, plain) > 1e-3
    assert relative_error(run(models[1], plan_of(MIXED), TRITON, DEVICE), hooked) <= 1e-5


RULES: dict[str, tuple[StepPlan, ...]] = {
    "windows and tokens": (
        _each(FullAndWindow(2), COMPUTE),
        _each(Window(2), Tokens(3)),
        _each(REUSE, Tokens(1)),
    ),
    "forecasts": (
        _each(COMPUTE, COMPUTE),
        _each(Compute(1), Compute(1)),
        _each(Forecast(1), Forecast(1)),
        _each(Forecast(1), COMPUTE),
    ),
    "forecasts of all layers": tuple(
        StepPlan(SITES, (COMPUTE,) * 2 * DEPTH, (span,))
        for span in (
            KeepSpan(0, 3),
            KeepSpan(0, 3, 1),
            ForecastSpan(0, 3, 1, "newton"),
            KeepSpan(0, 3, 2),
            *[ForecastSpan(0, 3, 2, "newton")] * 4,
        )
    ),
    "a share, and spans": (
        StepPlan(SITES, (SharedByGuidance(), COMPUTE) * DEPTH, (KeepSpan(1, 2),)),
        StepPlan(SITES, (REUSE, COMPUTE) * DEPTH, (SkipSpan(1, 2),)),
    ),
}


@pytest.mark.parametrize("steps", RULES.values(), ids=RULES)
def test_every_rule_over_the_kernels(steps: tuple[StepPlan, ...]) -> None:
    """Window attention in its own kernel too."""
    plan = Plan(steps, make_sampler("ddim", len(steps)).timesteps, 0.97)
    kernels = replace(TRITON, window_attention=ops.own_matmul_operations().window_attention)
    exact = run(model_in(torch.float64), plan, ops.TORCH, CPU, sampler="ddim")
    assert relative_error(run(model_in(torch.float32), plan, kernels, DEVICE, sampler="ddim"), exact) < 1e-5
