"""Caches that a user of diffusers would pick instead of ours, on its transformer: cache-dit's, and those it has.

    cache_dit                    follows the table; keeps what all blocks but the first add
    mag_cache                    follows the table; keeps what all blocks add
    first_block_cache            keeps what `cache_dit` does; decides by the first block, so it awaits the GPU each step
    pyramid_attention_broadcast  keeps each attention's ungated output, as our ATTENTION steps do
    taylorseer_cache             extrapolates each attention's and MLP's ungated output

The last three can't be given a table: they reuse as many steps as it does, or the most that they can, at steps of their
own choosing. To those that reuse whole steps, a step that computes anything is a computed one.

Of diffusers' other ways to do less, none works on DiT:

    FasterCache    halves the batch but not the class labels, which raises; expects the unconditional half first
    SeaCache       computes every step, with a warning: it wants a video's latents and a flow's sigma
    TaylorSeer     as it is by default its patterns match no layer; in lite mode only blocks, which then answer zeros
    TextKVCache    belongs to another model; DiT has no text
    layer skip     is no cache: it leaves the same layers out at every step
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch

from bench.rivals.case import Case
from bench.rivals.compiled import compiler
from bench.rivals.layouts import call, trajectory, transformer
from bench.rivals.loop import Run, sample
from bench.rivals.plain import timesteps_of
from bench.rivals.rival import Trajectory
from ebcache_fast.plan import Branch, StepType

THRESHOLDS = 1e-3, 1.0  # of the first block's relative change: between them the search looks
TRIALS = 8  # trajectories that the search may take
PAB_TIMESTEPS = 100, 800  # within them diffusers' default reuses attention
TAYLOR_WARM_UP = 3  # steps, its default


def cache_dit(case: Case) -> Trajectory:
    """DBCache with a static mask of steps; a mask knows no ATTENTION steps, so they are computed."""
    model = _with_cache_dit(case)
    return _refreshed(model, trajectory(case, model))


def cache_dit_compiled(case: Case) -> Trajectory:
    """The same under torch.compile.

    Without `set_compile_configs`: that rewrites inductor's settings for everybody in the process, and is for shapes
    that change. Without CUDA graphs: what is kept between steps would lie in memory that the next replay overwrites.
    """
    model = _with_cache_dit(case)
    compile_it = compiler(case, "max-autotune-no-cudagraphs", fullgraph=False)
    return _refreshed(model, trajectory(case, compile_it(model)))


def _with_cache_dit(case: Case) -> Any:
    """One block computed at reused steps is the least that cache-dit takes, and its fastest setting."""
    from cache_dit import DBCacheConfig, enable_cache

    config = DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        num_inference_steps=len(case.plan),
        steps_computation_mask=[int(not reused) for reused in _whole_steps(case)],
        steps_computation_policy="static",
    )
    model = transformer(case)
    enable_cache(model, cache_config=config)  # in place; what it returns is a list
    return model


def _refreshed(model: Any, inner: Trajectory) -> Trajectory:
    """Told when a trajectory begins: cache-dit, left to count, would notice a step late and reuse the one before."""
    from cache_dit import refresh_context

    def run() -> Run:
        refresh_context(model)
        return inner()

    return run


def mag_cache(case: Case) -> Trajectory:
    """MagCache reuses a step whose residual is said to have kept its size: ratios of 1 and 2 spell out the table."""
    from diffusers import MagCacheConfig

    model, steps = _cacheable(case), len(case.plan)
    ratios = [1.0 if reused else 2.0 for reused in _whole_steps(case)]
    config = MagCacheConfig(mag_ratios=ratios, num_inference_steps=steps, max_skip_steps=steps, retention_ratio=0.0)
    model.enable_cache(config)
    return _reset(model, trajectory(case, model))


def first_block_cache(case: Case) -> Trajectory:
    """FirstBlockCache, at the threshold that comes nearest to the table's number of reused steps."""
    from diffusers import FirstBlockCacheConfig

    model = _cacheable(case)
    run = _reset(model, trajectory(case, model))

    def set_threshold(threshold: float) -> None:
        if model.is_cache_enabled:
            model.disable_cache()
        model.enable_cache(FirstBlockCacheConfig(threshold))

    def reused(threshold: float) -> int:
        set_threshold(threshold)
        computed: list[None] = []
        handle = model.transformer_blocks[-1].attn1.register_forward_hook(lambda *_: computed.append(None))
        run()
        handle.remove()
        return len(case.plan) - len(computed)

    set_threshold(_threshold(sum(_whole_steps(case)), reused))
    return run


def _threshold(wanted: int, reused: Callable[[float], int]) -> float:
    """By halving the logarithm's range; of those tried the one nearest to ``wanted``."""
    if not wanted:
        return 0.0
    low, high = THRESHOLDS
    tried: dict[float, int] = {}
    while len(tried) < TRIALS and wanted not in tried.values():
        middle = sqrt(low * high)
        tried[middle] = reused(middle)
        low, high = (middle, high) if tried[middle] < wanted else (low, middle)
    return min(tried, key=lambda each: abs(tried[each] - wanted))


def pyramid_attention_broadcast(case: Case) -> Trajectory:
    """PAB with its default of every second step, or more where the table reuses attention more often.

    It asks for the timestep in every layer. A pipeline would answer with a tensor on the GPU; here it's a number.
    """
    from diffusers import PyramidAttentionBroadcastConfig

    t, timesteps, now = timesteps_of(case), case.plan.timesteps, [0]
    last, first = PAB_TIMESTEPS
    allowed = [i for i, each in enumerate(timesteps) if last < each < first]
    wanted = sum(Branch.SELF_ATTN in step_type.reuses for step_type in case.types)
    interval, steps = _shortest(case, wanted, lambda interval: [i for i in allowed if i % interval])
    model = _cacheable(case)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=interval,
        spatial_attention_timestep_skip_range=(timesteps[steps[-1]] - 1 if steps else first, first),
        current_timestep_callback=lambda: now[0],
    )
    model.enable_cache(config)
    once = call(case, model)

    def predict(x: torch.Tensor, i: int) -> torch.Tensor:
        now[0] = timesteps[i]
        return once(x, t[i])

    return _reset(model, lambda: sample(case, predict))


def taylorseer_cache(case: Case) -> Trajectory:
    """TaylorSeer of order 1, its default, told DiT's names for what its paper forecasts."""
    from diffusers import TaylorSeerCacheConfig

    def reused_at(interval: int) -> list[int]:
        return [i for i in range(TAYLOR_WARM_UP, len(case.plan)) if (i - TAYLOR_WARM_UP - 1) % interval]

    interval, steps = _shortest(case, sum(_whole_steps(case)), reused_at)
    model = _cacheable(case)
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=TAYLOR_WARM_UP,
        disable_cache_after_step=steps[-1] + 1 if steps else 0,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|ff)"],
    )
    model.enable_cache(config)
    return _reset(model, trajectory(case, model))


def _shortest(case: Case, wanted: int, reused_at: Callable[[int], list[int]]) -> tuple[int, list[int]]:
    """The shortest interval that reuses ``wanted`` steps, and these; where none does, the longest and all it reuses."""
    longest = max(len(case.plan), 2)
    interval = next((each for each in range(2, longest) if len(reused_at(each)) >= wanted), longest)
    return interval, reused_at(interval)[:wanted]


def _whole_steps(case: Case) -> list[bool]:
    """Whether each step computes no branch."""
    return [step_type == StepType.ATTN_MLP for step_type in case.types]


def _cacheable(case: Case) -> Any:
    """A user's subclass, by which a model that knows no caches gets diffusers' way to turn them on."""
    from diffusers import CacheMixin

    model = transformer(case)
    model.__class__ = type("CacheableDiT", (type(model), CacheMixin), {})
    return model


def _reset(model: Any, inner: Trajectory) -> Trajectory:
    """Nothing kept from the trajectory before, and all rows in one context, entered once instead of at every step."""

    def run() -> Run:
        model._reset_stateful_cache()
        with model.cache_context("guided"):
            return inner()

    return run
