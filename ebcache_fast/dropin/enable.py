"""``enable`` and its kin: caching for a model, in place, behind its own forward."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from torch import nn

from ebcache_fast.dropin.cached_forward import ATTRIBUTE, CachedForward
from ebcache_fast.dropin.courses import Course, choice_of
from ebcache_fast.dropin.in_order import InOrderForward
from ebcache_fast.dropin.other_caches import refuse_other_caches
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.stats import Stats
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan.table_set import Tables, tables_of
from ebcache_fast.sampling import plan_for, with_eps_scale

Target = TypeVar("Target")  # a module, or a pipeline with one


def enable(
    model: Target,
    table: Tables,
    *,
    eps_scale: float | None = None,
    allow_amplify: bool = False,
    in_order: bool = False,
    trust_order: bool | None = None,
    strict: bool = False,
    fp8: bool = False,
    max_graphs: int = 64,
    max_trajectories: int = 4,
    release: bool = False,
    max_cache_bytes: int | None = None,
) -> Target:
    """Let ``model``'s own ``forward`` and ``forward_with_cfg`` follow ``table``; returns the model.

    Of a diffusers pipeline it is the transformer that follows; the pipeline itself stays as it is.

    Signatures, shapes, dtypes and devices stay as they are, the parameters are not touched, and the caller's loop
    needs no change. Enabling an enabled model gives it the new table.

    Under autocast, with gradients, in training mode, with timesteps that differ within a batch, or when it was changed
    so that its parts no longer say what it computes, the model itself answers, uncached and unscaled, and is counted.
    Runs may take turns, also from several threads, also of the same labels or prompts: each is known by the tensors
    that it holds. Where runs share one tensor, or make theirs anew at each step, steps that could be either's compute
    everything, and are counted. Within a run prompts may not be written to through ``.data``, which nothing shows.

    Args:
        model: in eval mode a module of the original DiT's layout, or of diffusers a DiTTransformer2DModel, a
            PixArtTransformer2DModel or a CogVideoXTransformer3DModel; or a pipeline of one of these.
        table: which timesteps reuse what: a CacheTable, or a Plan made for this model. Of a TableSet, or a list or
            tuple of tables, each run follows the table that has the timesteps of the pipeline's scheduler, or, of a
            module alone, the one that begins with the run's first timestep.
        eps_scale: the factor b on predicted noise; None means the table's. The variance output is never scaled. Of
            the velocity that CogVideoX predicts it scales the noise alone, by the alphas of the pipeline's scheduler:
            enable a pipeline again that got another one.
        allow_amplify: lets ``eps_scale`` exceed 1.
        in_order: the caller promises one call a step, in the table's order, and that each run holds tensors of its
            own; then only the first call of a run waits for the device. A broken promise gives NaN and
            TrajectoryError, and never a wrong picture.
        trust_order: what ``in_order`` was called before; it goes with the next release.
        strict: raise TrajectoryError or CaptureError where the model would be run uncached, or without CUDA graphs.
        fp8: QKV's and fc1's products in float8; see `EngineOptions`. The model is still held against what it computes
            without.
        max_graphs: CUDA graphs held at most; steps beyond that run eagerly.
        max_trajectories: runs that can be interleaved, each with caches of its own; the one that was called longest
            ago gives way to a new one.
        release: keep no caches, graphs or prompts between runs: they go at a run's last step, at a pipeline's end, and
            when the model moves to another device. So they always do under ``enable_model_cpu_offload``.
        max_cache_bytes: what the caches of all runs together may take; where a run's would be above it, the model's
            own forward answers, counted, or under ``strict`` InputError is raised, before anything is taken.

    Raises:
        TableError: the table is for another model.
        InputError: the model is of another layout, in training mode, or computes something else than its parts
            say; another library caches it; or an argument is out of range.
    """
    if trust_order is not None:
        in_order = _renamed(trust_order, in_order, stacklevel=3)
    module = module_of(model)
    refuse_other_caches(model, module)
    denoiser = as_denoiser(module)
    if module.training:
        raise InputError(f"{type(module).__name__} is in training mode, where labels are dropped; call model.eval()")
    plans = [with_eps_scale(plan_for(denoiser, single), eps_scale, allow_amplify) for single in tables_of(table)]
    options = EngineOptions(
        strict=strict,
        fp8=fp8,
        max_graphs=max_graphs,
        max_trajectories=max_trajectories,
        release=release,
        max_cache_bytes=max_cache_bytes,
    )
    before = _cached_forward(module)
    with before.patch.asked() if before is not None else nullcontext():
        courses = [Course.of(model, module, plan) for plan in plans]
        choice = choice_of(model, courses, in_order=in_order)
        cached = (InOrderForward if in_order else CachedForward)(module, courses[0], options, choice)
    disable(module)
    cached.install()
    return model


def disable(model: Target) -> Target:
    """Give ``model`` its own forward back, bit for bit, and free what caching held; returns the model.

    A model that is not enabled stays as it is.
    """
    cached = _cached_forward(module_of(model))
    if cached is not None:
        cached.remove()
        cached.forget()
    return model


@contextmanager
def enabled(model: Target, table: Tables, **options: Any) -> Iterator[Target]:
    """`enable`, with its options, for the length of a with statement; what was enabled before is so again after it."""
    if (trust_order := options.pop("trust_order", None)) is not None:
        options["in_order"] = _renamed(trust_order, options.get("in_order", False), stacklevel=4)
    before = _cached_forward(module_of(model))
    if before is not None:
        before.remove()
    try:
        enable(model, table, **options)
        yield model
    finally:
        disable(model)
        if before is not None:
            before.install()


def stats(model: Any) -> Stats:
    """Counts of what caching did for ``model`` since it was enabled; InputError where it is not."""
    cached = _cached_forward(module_of(model))
    if cached is None:
        raise InputError(f"{type(model).__name__} is not enabled; call ebcache_fast.enable(model, table) first")
    return cached.stats


def module_of(model: Any) -> nn.Module:
    """The module itself, or a pipeline's transformer, within what peft and torch.compile wrap around it.

    InputError for anything else.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "transformer", None)
    if not isinstance(module, nn.Module):
        raise InputError(f"{type(model).__name__} is no module and has no transformer; pass a model or its pipeline")
    wrapped: Any = getattr(module, "_orig_mod", module)
    inner: nn.Module = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    return inner


def _renamed(trust_order: bool, in_order: bool, stacklevel: int) -> bool:
    """The promise, by whichever of its two names it was made."""
    warnings.warn("trust_order is called in_order now", DeprecationWarning, stacklevel=stacklevel)
    return in_order or trust_order


def _cached_forward(model: nn.Module) -> CachedForward | None:
    cached: CachedForward | None = vars(model).get(ATTRIBUTE)
    return cached if cached is not None and cached.model is model else None  # else copied together with its attributes
