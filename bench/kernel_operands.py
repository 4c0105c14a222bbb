"""Operands of every kernel at a model's real shapes, on any device: for compiles (meta), benchmarks and tuning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ebcache_fast.ops.operands import Advance, GuidanceArgs, Linear, Norm, Patches, Quantised, StepIndex, Update

STEPS = 50


@dataclass(frozen=True)
class ModelSizes:
    """What decides the kernels' shapes."""

    name: str
    side: int  # of the square latents
    channels: int
    patch: int
    width: int
    hidden: int
    heads: int
    slots: int  # two a layer

    @property
    def tokens(self) -> int:
        return (self.side // self.patch) ** 2


XL_256 = ModelSizes("DiT-XL/2 256 px", side=32, channels=4, patch=2, width=1152, hidden=4608, heads=16, slots=56)
XL_512 = ModelSizes("DiT-XL/2 512 px", side=64, channels=4, patch=2, width=1152, hidden=4608, heads=16, slots=56)
PATCH_8 = ModelSizes("DiT-XL/8 256 px", side=32, channels=4, patch=8, width=1152, hidden=4608, heads=16, slots=56)
WIDE = ModelSizes("3072 wide", side=32, channels=16, patch=2, width=3072, hidden=12288, heads=48, slots=84)
LETTERS = ModelSizes("letters", side=24, channels=3, patch=4, width=96, hidden=384, heads=3, slots=16)


class KernelOperands:
    """Random operands for a guided batch of ``samples``: rows are twice as many, conditional ones first."""

    def __init__(self, model: ModelSizes, samples: int, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self.rows = 2 * samples
        stream = self.rows, model.tokens, model.width
        latents = samples, model.channels, model.side, model.side
        features = 2 * model.channels * model.patch**2
        self.h, self.u, self.first, self.second = (self.draw(*stream) for _ in range(4))
        self.x = self.draw(*latents, dtype=torch.float32)
        self.out = self.draw(self.rows, 2 * model.channels, model.side, model.side, dtype=torch.float32)
        layers = self.draw(STEPS, model.slots // 2, 2, 3, samples + 1, model.width)  # one condition a sample, and null
        self.gates = layers[:, :, :, 2].flatten(1, 2)  # (S, K, U, D)
        self.norm = Norm(layers[:, 0, 0, 0], layers[:, 0, 0, 1], 1e-6)
        head = self.draw(STEPS, 2, samples + 1, model.width)
        self.head_norm = Norm(head[:, 0], head[:, 1], 1e-6)
        conditions = torch.arange(samples, dtype=torch.int32, device=device)
        step = torch.ones(1, dtype=torch.int32, device=device)
        row_of = torch.cat([conditions, torch.full_like(conditions, samples)])
        self.at = StepIndex(step, row_of, Advance(torch.zeros_like(step), 1))
        self.patches = Patches(
            self.draw(model.width, model.channels, model.patch, model.patch),
            self.draw(model.width),
            self.draw(model.tokens, model.width),
        )
        self.linear = Linear(self.draw(features, model.width), self.draw(features))
        settings = torch.tensor([1.5, 0.98], device=device)
        self.guide = GuidanceArgs(settings, 3, model.channels, copies=2)
        noise = self.draw(STEPS, *latents, dtype=torch.float32)
        self.update = Update(self.draw(STEPS, 6, dtype=torch.float32), noise)
        self.solver_update = Update(
            self.draw(STEPS, 9, dtype=torch.float32), None, self.draw(*latents, dtype=torch.float32)
        )

    def draw(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Small normal numbers: zeros would run faster than what a model computes with."""
        return torch.randn(shape, dtype=dtype or self.dtype, device=self.device).mul_(0.1)

    def quantised(self) -> Quantised:
        """Memory for a branch's input in float8, with a scale a token; zeros, which the call overwrites."""
        values = torch.zeros(self.u.shape, dtype=torch.float8_e4m3fn, device=self.device)
        return Quantised(values, torch.zeros(self.u.shape[:2], device=self.device))

    def chosen(self) -> Tensor:
        """A quarter of each row's tokens, at random, as `select_tokens` leaves them: (R, k) int32."""
        order = torch.rand(self.rows, self.model.tokens, device=self.device).argsort(dim=1)
        return order[:, : -(-self.model.tokens // 4)].sort(dim=1).values.int()

    def slots(self) -> Tensor:
        """Every cache slot, (K, R, T, D): made when asked for, because they are by far the largest."""
        return self.draw(self.model.slots, *self.h.shape)

    def sums(self, steps: int) -> Tensor:
        """The gated sums of a run, (n, R, T, D)."""
        return self.draw(steps, *self.h.shape)
