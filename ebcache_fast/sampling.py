"""``sample``: labels in, latents out, under any plan."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ebcache_fast.engine.buffers import latent_dtype
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.guidance import GUIDED_CHANNELS, Guidance
from ebcache_fast.errors import InputError, TableError
from ebcache_fast.models import Denoiser
from ebcache_fast.plan import Plan
from ebcache_fast.plan.table import CacheTable, SamplerSpec
from ebcache_fast.plan.table_set import TableSet
from ebcache_fast.samplers import Sampler, make_sampler, sampler_over, trajectory_noise
from ebcache_fast.samplers.schedule import TRAIN_STEPS, NoiseSchedule

DEFAULT_STEPS = 50
DEFAULT_SAMPLER = "ddpm"
DEFAULT_CFG_SCALE = 1.5
MAX_TRAIN_STEPS = 100_000  # a table's schedule is computed step by step: no file may fill the memory


@torch.no_grad()
def sample(
    model: nn.Module,
    labels: Sequence[int] | Tensor,
    *,
    table: CacheTable | Plan | None = None,
    steps: int | None = None,
    sampler: str | Sampler | None = None,
    cfg_scale: float = DEFAULT_CFG_SCALE,
    guided_channels: int = GUIDED_CHANNELS,
    eps_scale: float | None = None,
    allow_amplify: bool = False,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = 64,
    on_step: Callable[[int], None] | None = None,
    engine: Engine | None = None,
) -> Tensor:
    """Sample one latent for each label.

    Args:
        model: a DiT of the original's layout, on any device, in float64, float32, bfloat16 or float16.
        labels: (N,) class labels.
        table: which steps reuse what: a CacheTable, or a Plan made for this model; None caches nothing.
        steps: number of steps; None means the table's, or 50 without one.
        sampler: "ddpm", "ddim", "dpm-solver++", or a Sampler, as `sampler_of` makes of a diffusers scheduler; None
            means the table's, or "ddpm".
        cfg_scale: guidance scale; 1 samples without guidance, at half the cost.
        guided_channels: how many eps channels guidance reaches, the first three in the original.
        eps_scale: the factor b on the guided eps; None means the table's, or 1.
        allow_amplify: lets ``eps_scale`` exceed 1; a table that does has said so itself.
        seed, first_index: sample k draws its noise from (seed, first_index + k) alone, so that it does not
            depend on the batch it is in, beyond rounding.
        batch_size: samples run at once.
        on_step: called with the number of samples that advanced, after each step of each batch.
        engine: an Engine of this very model, whose memory and CUDA graphs the next call can use again; None
            makes one for this call.

    Returns:
        Latents (N, C, H, W) on the model's device, float32 (float64 for a float64 model).

    Raises:
        TableError: the table is for another model, other steps or another sampler.
        InputError: any other argument is out of range; the message says which, and the range.
    """
    engine = engine or Engine(model)
    if engine.model is not model:
        raise InputError(f"engine is of another {type(engine.model).__name__}; make one of this model: Engine(model)")
    denoiser = engine.denoiser
    y = check_labels(denoiser, labels)
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is below 1; 64 suits a CPU")
    plan, stepper = resolve_run(denoiser, table, steps, sampler, eps_scale, allow_amplify)
    stepper, factor = stepper.scaling_eps(plan.eps_scale, plan.corrections)
    plan = dataclasses.replace(plan, eps_scale=factor, corrections=())
    guidance = Guidance(float(cfg_scale), guided_channels)
    batches = [
        _sample_batch(
            engine,
            y[start : start + batch_size],
            plan,
            stepper,
            guidance,
            seed,
            first_index + start,
            on_step,
        )
        for start in range(0, len(y), batch_size)
    ]
    return torch.cat(batches)


def resolve_run(
    denoiser: Denoiser,
    table: CacheTable | Plan | None,
    steps: int | None,
    sampler: str | Sampler | None,
    eps_scale: float | None,
    allow_amplify: bool = False,
) -> tuple[Plan, Sampler]:
    """The plan and the sampler that the arguments of `sample` mean together; raises as `sample` does."""
    if isinstance(sampler, Sampler):
        plan, stepper = _plan_of(denoiser, table, steps, sampler), sampler
    elif table is None:
        stepper = make_sampler(sampler or DEFAULT_SAMPLER, DEFAULT_STEPS if steps is None else steps)
        plan = _uncached(denoiser, stepper)
    else:
        plan, name, train_steps = _read_table(denoiser, table, sampler)
        if steps is not None and steps != len(plan):
            raise TableError(f"steps={steps}: the table is for {len(plan)} steps; use one made for {steps}")
        stepper = sampler_over(name, NoiseSchedule.linear(train_steps).respace(plan.timesteps))
    return with_eps_scale(plan, eps_scale, allow_amplify), stepper


def plan_for(denoiser: Denoiser, table: CacheTable | Plan) -> Plan:
    """The plan that a table means for this model; TableError where it is for another one, InputError for no table."""
    if isinstance(table, TableSet):
        raise InputError("table is a TableSet, and a run follows one of its tables; pass tables.of_steps(steps)")
    if not isinstance(table, CacheTable | Plan):
        raise InputError(
            f"table={table!r} is no table but a {type(table).__name__}; pass a Plan, or a CacheTable, which "
            "CacheTable.load(path) reads"
        )
    plan = table.plan(denoiser.shape) if isinstance(table, CacheTable) else table
    plan.macs(denoiser.shape)  # raises where the plan is for another model
    return plan


def with_eps_scale(plan: Plan, eps_scale: float | None, allow_amplify: bool) -> Plan:
    """The plan with another b, if one is given; InputError unless it is in (0, 1], or above where that is allowed."""
    if eps_scale is None:
        return plan
    highest = float("inf") if allow_amplify else 1.0
    if not 0 < eps_scale <= highest or eps_scale == float("inf"):
        raise InputError(f"eps_scale={eps_scale} is outside (0, 1]; allow_amplify=True permits values above 1")
    return dataclasses.replace(plan, eps_scale=float(eps_scale))


def check_labels(denoiser: Denoiser, labels: Sequence[int] | Tensor) -> Tensor:
    """Labels as (N,) int64 on the model's device; InputError unless they are one or more of its classes."""
    try:
        y = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"labels are not a row of integers ({error}); give at least one") from None
    if y.ndim != 1 or not len(y) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"labels of shape {tuple(y.shape)} and {y.dtype} are not a row of integers; give at least one")
    y = y.to(denoiser.weight().device, torch.int64)
    outside = y[(y < 0) | (y >= denoiser.num_classes)]
    if len(outside):
        raise InputError(
            f"label {int(outside[0])} is outside [0, {denoiser.num_classes - 1}]; this model has "
            f"{denoiser.num_classes} classes"
        )
    return y


def _uncached(denoiser: Denoiser, stepper: Sampler) -> Plan:
    return Plan.uncached(stepper.timesteps, denoiser.shape.sites)


def _plan_of(denoiser: Denoiser, table: CacheTable | Plan | None, steps: int | None, stepper: Sampler) -> Plan:
    """The table's plan, or one that caches nothing, for this very sampler."""
    if steps not in (None, stepper.steps):
        raise InputError(f"steps={steps}: the sampler given has {stepper.steps}; make it for {steps} steps")
    if table is None:
        return _uncached(denoiser, stepper)
    _sampler_of_table(table, stepper.name)
    plan = plan_for(denoiser, table)
    if len(plan) != stepper.steps:
        raise TableError(f"the table is for {len(plan)} steps, the sampler given has {stepper.steps}; use equal ones")
    for i, (planned, executed) in enumerate(zip(plan.timesteps, stepper.timesteps, strict=True)):
        if planned != executed:
            raise TableError(f"step {i}: the table is for timestep {planned}, the sampler is at {executed}; retime it")
    return plan


def _read_table(denoiser: Denoiser, table: CacheTable | Plan, sampler: str | None) -> tuple[Plan, str, int]:
    """The table's plan for this model, the sampler's name, and the length of its training schedule."""
    spec = _sampler_of_table(table, sampler)
    plan = plan_for(denoiser, table)
    if spec is None:
        return plan, sampler or DEFAULT_SAMPLER, TRAIN_STEPS
    if spec.train_steps > MAX_TRAIN_STEPS:
        raise TableError(
            f"sampler.train_steps={spec.train_steps} is above {MAX_TRAIN_STEPS}; models are trained with 1000"
        )
    return plan, spec.name, spec.train_steps


def _sampler_of_table(table: CacheTable | Plan, sampler: str | None) -> SamplerSpec | None:
    """The sampler that a table states, None if it states none; TableError where another one is asked for by name."""
    spec: SamplerSpec | None = getattr(table, "sampler", None)
    if spec is not None and sampler not in (None, spec.name):
        raise TableError(f"sampler={sampler!r}: the table is for {spec.name!r}; leave the argument out, or retime it")
    return spec


def _sample_batch(
    engine: Engine,
    y: Tensor,
    plan: Plan,
    stepper: Sampler,
    guidance: Guidance,
    seed: int,
    first_index: int,
    on_step: Callable[[int], None] | None,
) -> Tensor:
    indices = range(first_index, first_index + len(y))
    drawn = stepper.steps if stepper.draws_noise else 0
    denoiser = engine.denoiser
    noise = trajectory_noise(seed, indices, drawn, denoiser.latent_shape, latent_dtype(denoiser))
    with engine.sampling(plan, y, guidance, torch.tensor(stepper.rows), noise) as trajectory:
        while steps := trajectory.advance():
            if on_step is not None:
                for _ in range(steps):
                    on_step(len(y))
        return trajectory.x.clone()
