"""The static memory of a trajectory: allocated before anything is captured, outside of any graph's pool."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ebcache_fast.engine.feature_cache import FeatureCache
from ebcache_fast.engine.modulation import ModulationTable
from ebcache_fast.engine.numerics import Numerics
from ebcache_fast.engine.order_guard import OrderGuard
from ebcache_fast.engine.workspace import Workspace
from ebcache_fast.errors import InputError
from ebcache_fast.models.denoiser import Denoiser
from ebcache_fast.operands import Guide, Update
from ebcache_fast.plan import Memory
from ebcache_fast.samplers.coefficients import WITH_MEMORY, WITHOUT_MEMORY

SPARE_ROWS = 1  # of modulation, after those of the plan: for a timestep that nobody planned


class Ending(Enum):
    """What the last operation of a step does with the predicted noise."""

    PREDICT = "predict"  # hands it out: the model's own forward
    PREDICT_GUARDED = "predict, guarded"  # the same, and checks that it was called in the planned order
    UPDATE = "update"  # takes the sampler's step
    UPDATE_WITH_NOISE = "update with noise"  # takes the sampler's step, which adds noise
    UPDATE_WITH_MEMORY = "update with memory"  # takes the sampler's step, which keeps something for the next
    UPDATE_WITH_NOISE_AND_MEMORY = "update with noise and memory"

    @classmethod
    def of_sampler(cls, rows: Tensor, noise: Tensor) -> "Ending":
        """That of a sampler with these coefficients, (S, 6) or (S, 9), and this noise, none beyond entry 0 or more."""
        memory = rows.shape[1] > WITHOUT_MEMORY
        if len(noise) > 1:
            return cls.UPDATE_WITH_NOISE_AND_MEMORY if memory else cls.UPDATE_WITH_NOISE
        return cls.UPDATE_WITH_MEMORY if memory else cls.UPDATE

    @property
    def draws_noise(self) -> bool:
        """Whether there is noise for every step."""
        return self in (Ending.UPDATE_WITH_NOISE, Ending.UPDATE_WITH_NOISE_AND_MEMORY)

    @property
    def has_memory(self) -> bool:
        """Whether a step leaves something to the next."""
        return self in (Ending.UPDATE_WITH_MEMORY, Ending.UPDATE_WITH_NOISE_AND_MEMORY)


@dataclass(frozen=True)
class BufferSpec:
    """Whatever decides the sizes of a trajectory's memory: trajectories of equal specs can use it in turn."""

    ending: Ending
    samples: int
    copies: int  # 2 under guidance: the unconditional rows follow the conditional ones
    guided_channels: int
    conditions: int  # distinct ones that there is room for
    steps: int  # of the plan
    memory: Memory
    numerics: Numerics
    latents: tuple[int, ...]  # one of them, as the caller has it
    context: tuple[tuple[torch.Size, torch.dtype] | None, ...]  # what each tensor of it is like
    float8: bool = False  # whether branches take their input so where they can

    @property
    def rows(self) -> int:
        """Batch rows R."""
        return self.samples * self.copies


@dataclass(frozen=True)
class Buffers:
    """A trajectory's memory at fixed addresses. Every graph over it reads and writes here, and weights, alone."""

    guard: OrderGuard
    x: Tensor  # (N, C, H, W), or of videos (N, C, F, H, W): latents, float32 or float64
    out: Tensor  # (R, Cout, H, W) or (R, Cout, F, H, W), the same: what a step predicts
    update: Update  # the sampler's steps
    guide: Guide
    modulation: ModulationTable
    cache: FeatureCache
    constants: Workspace  # what `Denoiser.prepare` and `Float8Branches.prepare` wrote
    workspace: Workspace

    @property
    def tensors(self) -> Iterator[Tensor]:
        """All of it that is allocated by now."""
        yield from (self.x, self.out, self.guide.settings, self.update.rows, *self.guard.tensors)
        for optional in (self.update.noise, self.update.previous):
            if optional is not None:
                yield optional
        for part in (self.modulation, self.cache, self.constants, self.workspace):
            yield from part.tensors

    @property
    def nbytes(self) -> int:
        """Bytes allocated by now."""
        return sum(tensor.nbytes for tensor in self.tensors)


def room_for(distinct: int, rows: int) -> int:
    """For how many distinct conditions to make room, given so many now: of few numbers, so that memory is reused.

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
        coefficients = empty(spec.steps, WITH_MEMORY if spec.ending.has_memory else WITHOUT_MEMORY)
        noise = empty(spec.steps, *latents) if spec.ending.draws_noise else None
        return Update(coefficients, noise, empty(*latents) if spec.ending.has_memory else None)

    try:
        return Buffers(
            guard=OrderGuard.of(spec.rows, spec.steps + SPARE_ROWS, weight.device),
            x=empty(*latents),
            out=empty(spec.rows, denoiser.out_channels, *denoiser.latent_shape[1:]),
            update=update(),
            guide=Guide(empty(2), min(spec.guided_channels, channels), channels, spec.copies),
            modulation=ModulationTable(
                denoiser, spec.steps + SPARE_ROWS, spec.conditions, stream_rows, spec.memory.extra
            ),
            cache=FeatureCache(denoiser.shape, spec.memory, spec.rows, weight.dtype, weight.device),
            constants=Workspace(weight.dtype, weight.device),
            workspace=Workspace(weight.dtype, weight.device),
        )
    except torch.OutOfMemoryError as error:
        cache_bytes = len(spec.memory.live) * spec.rows * denoiser.shape.slot_elements * weight.itemsize
        raise InputError(
            f"a batch of {spec.rows} rows needs {cache_bytes / 2**30:.2f} GiB of cache and more for its modulation, "
            f"which {weight.device} does not have ({str(error).splitlines()[0]}); sample fewer at once"
        ) from error
