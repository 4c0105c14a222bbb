"""Operands of the kernels at a step's two ends, for any sizes."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from accuracy import DEVICE, amid_nan, draw, in_float64
from torch import Tensor

from ebcache_fast.ops.operands import Advance, GuidanceArgs, Linear, Norm, Patches, StepIndex, Update

STEPS, CONDITIONS, STEP = 5, 3, 1  # of the tables, and the step that is asked for


@dataclass(frozen=True)
class Sizes:
    """What a model and a batch are made of."""

    samples: int = 2
    channels: int = 4
    patch: int = 2
    grid: tuple[int, int] = (3, 5)  # tokens down and across
    width: int = 40
    variance: bool = True
    copies: int = 2
    guided: int = 3
    noise: bool = True
    memory: bool = False

    @property
    def rows(self) -> int:
        return self.samples * self.copies

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def image(self) -> tuple[int, int]:
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def out_channels(self) -> int:
        return self.channels * (1 + self.variance)


# Every size that a kernel branches on or pads, and the real ones with few tokens.
SIZES = {
    "plain": Sizes(),
    "DiT-XL/2": Sizes(samples=1, grid=(2, 9), width=1152),
    "the bundled model": Sizes(channels=3, patch=4, grid=(3, 3), width=96),
    "one token": Sizes(samples=1, channels=1, patch=1, grid=(1, 1), width=1, copies=1, guided=1),
    "primes": Sizes(channels=5, patch=3, grid=(3, 7), width=131, guided=2),
    "no guidance": Sizes(copies=1, guided=3),
    "no variance": Sizes(variance=False),
    "no noise": Sizes(noise=False),
    "no variance, noise or guidance": Sizes(variance=False, noise=False, copies=1),
    "memory": Sizes(memory=True),
    "memory, no noise": Sizes(memory=True, noise=False, copies=1),
    "all channels guided": Sizes(guided=4),
    "no channel guided": Sizes(guided=0),
    "a tile and a token": Sizes(samples=1, grid=(1, 17), width=144),
}
# Of which no tile is full, in patches and as single pixels.
RAGGED = {
    "patches": Sizes(samples=1, channels=5, patch=3, grid=(1, 3), width=19, guided=2),
    "pixels": Sizes(samples=1, channels=5, patch=1, grid=(1, 3), width=19, guided=2, variance=False, memory=True),
}


@dataclass(frozen=True)
class StepOperands:
    """One call's operands; of the tables only the rows from `STEP` on are right to read."""

    sizes: Sizes
    x: Tensor  # (B, C, H, W)
    h: Tensor  # (R, T, D)
    sums: Tensor  # (3, R, T, D)
    branches: list[Tensor]  # (R, T, D) each
    gates: list[Tensor]  # (S, U, D) each
    norm: Norm
    at: StepIndex
    patches: Patches
    linear: Linear
    guide: GuidanceArgs
    update: Update

    @classmethod
    def of(cls, s: Sizes, dtype: torch.dtype, branches: int = 2) -> "StepOperands":
        stream, latents = (s.rows, s.tokens, s.width), (s.samples, s.channels, *s.image)
        layers = draw(STEPS, 2, CONDITIONS, s.width, dtype=dtype, seed=1)  # gates
        head = draw(STEPS, 2, CONDITIONS, s.width, dtype=dtype, seed=2)  # another table, of other strides
        fan_in, fan_out = s.channels * s.patch**2, s.out_channels * s.patch**2
        coefficients = draw(STEPS, 9 if s.memory else 6, dtype=torch.float32, seed=3, scale=0.5)
        return cls(
            sizes=s,
            x=draw(*latents, dtype=torch.float32, seed=4),
            h=draw(*stream, dtype=dtype, seed=5, scale=2.0, offset=0.5),
            sums=draw(3, *stream, dtype=dtype, seed=6),
            branches=[draw(*stream, dtype=dtype, seed=10 + k) for k in range(branches)],
            gates=[layers[:, k] for k in range(branches)],
            norm=Norm(head[:, 0], head[:, 1], 1e-6),
            at=StepIndex(
                torch.tensor([STEP], dtype=torch.int32, device=DEVICE),
                (torch.arange(s.rows, dtype=torch.int32, device=DEVICE) * 2) % CONDITIONS,
            ),
            patches=Patches(
                draw(s.width, s.channels, s.patch, s.patch, dtype=dtype, seed=20, scale=fan_in**-0.5),
                draw(s.width, dtype=dtype, seed=21),
                draw(s.tokens, s.width, dtype=dtype, seed=22),
            ),
            linear=Linear(
                draw(fan_out, s.width, dtype=dtype, seed=23, scale=s.width**-0.5),
                draw(fan_out, dtype=dtype, seed=24),
            ),
            guide=GuidanceArgs(torch.tensor([1.5, 0.9], device=DEVICE), s.guided, s.channels, s.copies),
            update=Update(
                coefficients,
                draw(STEPS, *latents, dtype=torch.float32, seed=25) if s.noise else None,
                draw(*latents, dtype=torch.float32, seed=26) if s.memory else None,
            ),
        )

    @property
    def written(self) -> Tensor:
        """What a step of our loop writes: the latents, and behind them what the sampler keeps of them."""
        return self.x if self.update.previous is None else torch.cat([self.x, self.update.previous])

    def exact(self) -> "StepOperands":
        """The same numbers in float64."""
        return self.map(in_float64)

    def with_norm_parameters(self) -> "StepOperands":
        """The same with a weight and a bias of the norm itself."""
        weight, bias = (draw(self.sizes.width, dtype=self.h.dtype, seed=seed) for seed in (31, 32))
        return dataclasses.replace(self, norm=self.norm._replace(weight=weight, bias=bias))

    def clone(self) -> "StepOperands":
        """The same in memory of their own."""
        return self.map(partial(_with_tensors, Tensor.clone))

    def amid_nan(self) -> "StepOperands":
        """The same, with NaN before and after every floating tensor."""
        return self.map(partial(_with_tensors, lambda one: amid_nan(one) if one.is_floating_point() else one))

    def map(self, change: object) -> "StepOperands":
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return StepOperands(**{name: change(value) for name, value in values.items()})  # type: ignore[operator]


def advancing(at: StepIndex) -> StepIndex:
    """The same, and a count that the operation advances by 2, between others that it must leave alone."""
    counts = torch.full((3,), 7, dtype=torch.int32, device=DEVICE)
    return at._replace(advance=Advance(counts[1:2], 2))


def assert_advanced(at: StepIndex) -> None:
    """That an operation did what ``advancing(at)`` asked for."""
    assert at.advance is not None
    step = int(at.step)
    assert at.advance.to._base is not None
    assert at.advance.to._base.tolist() == [7, step + 2, 7]


Change = Callable[[StepOperands], StepOperands]
NORMS: dict[str, Change] = {
    "a norm without parameters": StepOperands.clone,
    "a norm with parameters": StepOperands.with_norm_parameters,
}


def _with_tensors(change: Callable[[Tensor], Tensor], value: object) -> object:
    """Every tensor in nested tuples and lists changed, the rest as it is."""
    if isinstance(value, Tensor):
        return change(value)
    inner = partial(_with_tensors, change)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(inner, value))
    return [inner(one) for one in value] if isinstance(value, list) else value
