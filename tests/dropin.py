"""A model called step by step as somebody's own loop would, and the same calls written out naively."""

from collections.abc import Sequence

import torch
from constants import ATTENTION, ATTN_MLP, BRANCHES, MLP, NO
from tiny import CLASSES, RELATIVE, LayerReuse, empty_cache, naive_forward, relative_error, tiny_dit
from torch import Tensor, nn

from ebcache_fast.models import DiT
from ebcache_fast.plan import Branch, Plan, StepType, layered

DEPTH = 2
TIMESTEPS = (930, 700, 420, 260, 111, 3)
TYPES = (NO, ATTENTION, ATTN_MLP, MLP, NO, ATTN_MLP)
LABELS = torch.tensor([1, 4, 1])
# Why a step was computed in full, or by the model itself, as statistics say it.
FRESH = "a run did not begin with the first step"
AGAIN = "a timestep came again"
LEFT_OUT = "steps were left out"
UNPLANNED = "a timestep is not in the plan"
ALIKE = "runs of the same tensors can't be told apart"
GAVE_WAY = "more runs took turns than max_trajectories"
MIXED = "timesteps differ within the batch"


def plan_of(types: Sequence[StepType] = TYPES, eps_scale: float = 0.9, depth: int = DEPTH) -> Plan:
    """A plan of these step types at the first of ``TIMESTEPS``."""
    return Plan.from_types(types, TIMESTEPS[: len(types)], layered(depth, BRANCHES), eps_scale)


def reuse_of(step_type: StepType, depth: int = DEPTH) -> list[LayerReuse]:
    """What such a step reuses, layer by layer."""
    return [(Branch.SELF_ATTN in step_type.reuses, Branch.MLP in step_type.reuses)] * depth


def latents(model: DiT, rows: int = len(LABELS), steps: int = len(TIMESTEPS), seed: int = 0) -> list[Tensor]:
    """Random latents (rows, C, H, W) for every step, in the model's dtype."""
    weight, side = model.pos_embed, int(model.pos_embed.shape[1] ** 0.5) * model.patch_size
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, rows, model.in_channels, side, side, generator=generator, dtype=torch.float64)
    return list(noise.to(weight.dtype))


def at(t: float, rows: int) -> Tensor:
    """A batch of equal timesteps."""
    return torch.full((rows,), t)


@torch.no_grad()
def call(model: nn.Module, x: Tensor, t: float, y: Tensor) -> Tensor:
    """The model at one timestep."""
    out: Tensor = model(x, at(t, len(x)), y)
    return out


def drive(model: nn.Module, xs: Sequence[Tensor], y: Tensor = LABELS) -> list[Tensor]:
    """A whole run, or the beginning of one: a call a step."""
    return [call(model, x, t, y) for x, t in zip(xs, TIMESTEPS, strict=False)]


@torch.no_grad()
def naive_drive(
    model: DiT,
    xs: Sequence[Tensor],
    y: Tensor = LABELS,
    types: Sequence[StepType] = TYPES,
    timesteps: Sequence[int] = TIMESTEPS,
    eps_scale: float = 0.9,
) -> list[Tensor]:
    """The same by the definitions."""
    kept = empty_cache(model)
    outs = []
    for x, t, step_type in zip(xs, timesteps, types, strict=False):
        out = naive_forward(model, x, t, y, reuse_of(step_type, len(model.blocks)), kept)
        out[:, : model.in_channels] *= eps_scale
        outs.append(out)
    return outs


def full_step(model: DiT, x: Tensor, t: int, y: Tensor = LABELS, eps_scale: float = 0.9) -> Tensor:
    """A step that computes everything, by the definitions."""
    with torch.no_grad():
        out = naive_forward(model, x, t, y, reuse_of(NO, len(model.blocks)), empty_cache(model))
    out[:, : model.in_channels] *= eps_scale
    return out


def null_labels(y: Tensor) -> Tensor:
    """As many null labels."""
    return torch.full_like(y, CLASSES)


def guided_rows(y: Tensor) -> Tensor:
    """The labels of a batch for ``forward_with_cfg``."""
    return torch.cat([y, null_labels(y)])


def fresh_model(**sizes: object) -> DiT:
    """A tiny model for a test of its own."""
    return tiny_dit(5, **sizes)  # type: ignore[arg-type]


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Each of them within the bound of its dtype."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) <= RELATIVE[one.dtype]


def assert_bitwise(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Each of them to the bit."""
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))
