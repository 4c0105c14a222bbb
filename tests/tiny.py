"""Tiny diffusion transformers with every weight random, and the method written out naively for them.

The naive half is made from the definitions alone: plain lists for caches, conditional and unconditional passes
one after the other, textbook sampler steps. It shares nothing with the engine but the modules' layers.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, repeat

import torch
from torch import Tensor, nn

from ebcache_fast.models import DiT

CLASSES = 5
SIZES = {"patch_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}  # of a tiny DiT
RELATIVE = {torch.float64: 1e-12, torch.float32: 1e-5}

LayerReuse = tuple[bool, bool]  # whether a layer's attention, and its MLP, come from the cache
Stepper = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, float, float], Tensor]
Kept = list[list[Tensor]]  # by layer: the ungated attention output and MLP output that were computed last


def tiny_dit(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: object) -> DiT:
    """A DiT of width 16 and depth 2; nothing in it is zero, least of all what a fresh model starts at zero."""
    defaults: dict[str, object] = {
        "input_size": 8,
        "in_channels": 4,
        "num_classes": CLASSES,
        **SIZES,
    }
    model = DiT(**(defaults | sizes)).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        std = 0.2 if parameter.ndim == 1 else max(fan_in, 4) ** -0.5
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.to(dtype)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest magnitude; NaN where anything is not a number."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def assert_same(ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    """The same numbers, as float32 has them, in the same dtype."""
    assert ours.dtype == theirs.dtype
    assert relative_error(ours, theirs) < bound


def assert_all_same(ours: Sequence[Tensor], theirs: Sequence[Tensor], bound: float = 1e-5) -> None:
    """`assert_same` of one after another."""
    for one, other in zip(ours, theirs, strict=True):
        assert_same(one, other, bound)


# ------------------------------------------------------------------------------------------------ one step


def empty_cache(model: DiT) -> Kept:
    """A cache that nothing can be read from yet."""
    return [[torch.tensor(math.nan)] * 2 for _ in model.blocks]


def naive_forward(model: DiT, x: Tensor, t: int, y: Tensor, reuse: Sequence[LayerReuse], kept: Kept) -> Tensor:
    """The model layer by layer; what is not reused is computed and kept, ungated."""
    c = model.t_embedder(torch.full((len(x),), t)) + model.y_embedder(y)
    h = model.x_embedder(x) + model.pos_embed
    for block, (reuse_attention, reuse_mlp), slots in zip(model.blocks, reuse, kept, strict=True):
        vectors = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=2)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        if not reuse_attention:
            slots[0] = block.attn(block.norm1(h) * (1 + scale_a) + shift_a)
        h = h + gate_a * slots[0]
        if not reuse_mlp:
            slots[1] = block.mlp(block.norm2(h) * (1 + scale_m) + shift_m)
        h = h + gate_m * slots[1]
    side, patch = x.shape[2] // model.patch_size, model.patch_size
    grid = model.final_layer(h, c).view(len(x), side, side, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", grid).reshape(len(x), -1, *x.shape[2:])


def naive_predict(
    model: DiT,
    x: Tensor,
    t: int,
    y: Tensor,
    reuse: Sequence[LayerReuse],
    kept: tuple[Kept, Kept],
    cfg_scale: float,
    guided_channels: int,
) -> tuple[Tensor, Tensor | None]:
    """Guided, unscaled eps and the conditional variance output; ``kept`` of the two passes apart."""
    channels = x.shape[1]
    out = naive_forward(model, x, t, y, reuse, kept[0])
    eps = out[:, :channels].clone()
    if cfg_scale != 1.0:
        null = torch.full_like(y, CLASSES)
        uncond = naive_forward(model, x, t, null, reuse, kept[1])
        for c in range(min(guided_channels, channels)):
            eps[:, c] = uncond[:, c] + cfg_scale * (eps[:, c] - uncond[:, c])
    return eps, out[:, channels:] if model.learn_sigma else None


# ------------------------------------------------------------------------------------------------ samplers


def naive_timesteps(steps: int) -> list[int]:
    """``steps`` of 1000 timesteps, evenly spread over both ends, in execution order."""
    stride = 999 / (steps - 1) if steps > 1 else 0.0
    return [round(position) for position in accumulate(repeat(stride, steps - 1), initial=0.0)][::-1]


def naive_solver_timesteps(steps: int) -> list[int]:
    """``steps`` of 1000 timesteps, evenly spread from 999 to where the next one would be 0."""
    return [round(999 * k / steps) for k in range(steps, 0, -1)]


def alpha_bars(timesteps: Sequence[int]) -> list[float]:
    """alpha_bar of each timestep of the linear schedule and, last, 1."""
    by_t = list(accumulate((1 - (1e-4 + (2e-2 - 1e-4) * t / 999) for t in range(1000)), float.__mul__))
    return [by_t[t] for t in timesteps] + [1.0]


def naive_update(
    sampler: str, x: Tensor, eps: Tensor, v: Tensor | None, noise: Tensor | None, here: float, there: float
) -> Tensor:
    """A step from alpha_bar ``here`` to ``there``, by way of the x_0 that x and eps predict."""
    x0 = (x - math.sqrt(1 - here) * eps) / math.sqrt(here)
    if sampler == "ddim":
        again = (x - math.sqrt(here) * x0) / math.sqrt(1 - here)
        return math.sqrt(there) * x0 + math.sqrt(1 - there) * again
    beta = 1 - here / there
    mean = (math.sqrt(there) * beta * x0 + math.sqrt(1 - beta) * (1 - there) * x) / (1 - here)
    if there == 1.0:
        return mean
    posterior = beta * (1 - there) / (1 - here)
    if v is None:
        return mean + math.sqrt(posterior) * noise
    share = (v + 1) / 2
    return mean + torch.exp((share * math.log(beta) + (1 - share) * math.log(posterior)) / 2) * noise


class NaiveSolver:
    """DPM-Solver++(2M), step by step, each as `naive_update`: the data D extrapolated from two predictions of x_0."""

    def __init__(self) -> None:
        self._before: tuple[Tensor, float] | None = None  # the last x_0, and lambda there

    def __call__(
        self, x: Tensor, eps: Tensor, v: Tensor | None, noise: Tensor | None, here: float, there: float
    ) -> Tensor:
        x0 = (x - math.sqrt(1 - here) * eps) / math.sqrt(here)
        if there == 1.0:
            return x0
        at, then = (math.log(bar / (1 - bar)) / 2 for bar in (here, there))
        data = x0
        if self._before is not None:
            ratio = (at - self._before[1]) / (then - at)
            data = (1 + 1 / (2 * ratio)) * x0 - 1 / (2 * ratio) * self._before[0]
        self._before = x0, at
        return math.sqrt((1 - there) / (1 - here)) * x - math.sqrt(there) * math.expm1(at - then) * data


def naive_stepper(sampler: str) -> Stepper:
    """What takes the steps of one trajectory."""
    return NaiveSolver() if sampler == "dpm-solver++" else partial(naive_update, sampler)


@torch.no_grad()
def naive_sample(
    model: DiT,
    y: Tensor,
    noise: Tensor,
    timesteps: Sequence[int],
    reuse: Sequence[Sequence[LayerReuse]],
    sampler: str,
    *,
    cfg_scale: float,
    guided_channels: int,
    eps_scale: float,
) -> Tensor:
    """The whole cached run; noise (steps + 1, N, C, H, W), the first the initial latents."""
    kept = empty_cache(model), empty_cache(model)
    bars, advance = alpha_bars(timesteps), naive_stepper(sampler)
    x = noise[0]
    for i, t in enumerate(timesteps):
        eps, v = naive_predict(model, x, t, y, reuse[i], kept, cfg_scale, guided_channels)
        x = advance(x, eps * eps_scale, v, noise[i + 1], bars[i], bars[i + 1])
    return x
