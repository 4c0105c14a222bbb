"""The static memory of a trajectory: allocated before anything is captured, outside of any graph's pool."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ebcache_fast.engine.cache import FeatureCache
from ebcache_fast.engine.flags import Flags
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.order_guard import OrderGuard
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.errors import InputError
from ebcache_fast.models.base import Denoiser
from ebcache_fast.ops.operands import GuidanceArgs, Update
from ebcache_fast.plan import Memory
from ebcache_fast.samplers.coefficients import WITH_MEMORY, WITHOUT_MEMORY

SPARE_ROWS = 1  # of modulation, after those of the plan: for a timestep that nobody planned


@dataclass(frozen=True)
class Tail:
    """Last operation of a step, on the predicted noise: hands it out, or takes the sampler's step."""

    update: bool = False  # takes the sampler's step; else the output is the caller's, as of the model's own forward
    noise: bool = False  # the sampler's step adds noise
    memory: bool = False  # the sampler's step keeps something for the next
    guarded: bool = False  # an output handed out is checked: was it called in the planned order?

    @classmethod
    def of_sampler(cls, coefficients: Tensor, noise: Tensor) -> Self:
        """The tail of a sampler with coefficients (S, 6) or (S, 9), and noise unless that has entry 0 alone."""
        return cls(update=True, noise=len(noise) > 1, memory=coefficients.shape[1] > WITHOUT_MEMORY)


@dataclass(frozen=True)
class BufferSpec:
    """Spec of a trajectory's memory, all that decides its sizes: trajectories of equal specs can use it in turn."""

    tail: Tail
    samples: int
    copies: int  # 2 under guidance: the unconditional rows follow the conditional ones
    guided_channels: int
    conditions: int  # distinct ones that there is room for
    steps: int  # of the plan
    memory: Memory
    flags: Flags
    latents: tuple[int, ...]  # one of them, as the caller has it
    context: tuple[tuple[torch.Size, torch.dtype] | None, ...]  # what each tensor of it is like
    float8: bool = False  # whether branches take their input so where they can

    @property
    def rows(self) -> int:
        """Number of batch rows R: samples times copies."""
        return self.samples * self.copies


@dataclass(frozen=True)
class Buffers:
    """A trajectory's memory at fixed addresses. Every graph over it reads and writes here, and weights, alone."""

    guard: OrderGuard
    x: Tensor  # (N, C, H, W), or of videos (N, C, F, H, W): latents, float32 or float64
    out: Tensor  # (R, Cout, H, W) or (R, Cout, F, H, W), the same: what a step predicts
    update: Update  # the sampler's steps
    guide: GuidanceArgs
    modulation: ModulationTable
    cache: FeatureCache
    per_run: Workspace  # what `Denoiser.precompute` and `Float8Branches.prepare` wrote
    workspace: Workspace

    @property
    def tensors(self) -> Iterator[Tensor]:
        """Tensors of the memory that are allocated by now."""
        yield from (self.x, self.out, self.guide.settings, self.update.coefficients, *self.guard.tensors)
        for optional in (self.update.noise, self.update.previous):
            if optional is not None:
                yield optional
        for part in (self.modulation, self.cache, self.per_run, self.workspace):
            yield from part.tensors

    @property
    def nbytes(self) -> int:
        """Bytes allocated by now."""
        return sum(tensor.nbytes for tensor in self.tensors)


def room_for(distinct: int, rows: int) -> int:
    """Number of conditions to make room for, given so many distinct ones: one of few numbers, so that memory is reused.

    Under guidance half of the rows have the null label, so that half and one suffice.
    """
    usual = rows // 2 + 1
    return usual if distinct <= usual else max(distinct, rows)


def latent_dtype(denoiser: Denoiser) -> torch.dtype:
    """The dtype that latents are kept and updated in: float64 for a float64 model, float32 for all others."""
    return torch.float64 if denoiser.weight().dtype == torch.float64 else torch.float32


def allocate(spec: BufferSpec, denoiser: Denoiser) -> Buffers:
    """Memory for trajectories of ``spec``; InputError, with the size, where the device has too little."""
    weight, channels = denoiser.weight(), min(denoiser.latent_shape[0], denoiser.out_channels)
    stream_rows = spec.rows * (denoiser.shape.tokens if denoiser.text_tokens else 1)
    latents = spec.samples, *denoiser.latent_shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=latent_dtype(denoiser), device=weight.device)

    def update() -> Update:
        coefficients = empty(spec.steps, WITH_MEMORY if spec.tail.memory else WITHOUT_MEMORY)
        noise = empty(spec.steps, *latents) if spec.tail.noise else None
        return Update(coefficients, noise, empty(*latents) if spec.tail.memory else None)

    try:
        return Buffers(
            guard=OrderGuard.of(spec.rows, spec.steps + SPARE_ROWS, weight.device),
            x=empty(*latents),
            out=empty(spec.rows, denoiser.out_channels, *denoiser.latent_shape[1:]),
            update=update(),
            guide=GuidanceArgs(empty(2), min(spec.guided_channels, channels), channels, spec.copies),
            modulation=ModulationTable(
                denoiser, spec.steps + SPARE_ROWS, spec.conditions, stream_rows, spec.memory.extra
            ),
            cache=FeatureCache(denoiser.shape, spec.memory, spec.rows, weight.dtype, weight.device),
            per_run=Workspace(weight.dtype, weight.device),
            workspace=Workspace(weight.dtype, weight.device),
        )
    except torch.OutOfMemoryError as error:
        cache_bytes = len(spec.memory.live) * spec.rows * denoiser.shape.slot_elements * weight.itemsize
        raise InputError(
            f"a batch of {spec.rows} rows needs {cache_bytes / 2**30:.2f} GiB of cache and more for its modulation, "
            f"which {weight.device} does not have ({str(error).splitlines()[0]}); sample fewer at once"
        ) from error
