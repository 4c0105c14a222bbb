"""Operations at a step's two ends, with operands of any sizes: embedding, head, and runs of steps."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accuracy import DEVICE, draw, in_float64
from kernel_operations import EPSILON, OF_ITS_OWN, Call, Change, Form, Operation, mapped, step_index, with_mean
from torch import Tensor

from ebcache_fast.kernels.embed import embed, embed_norm_modulate
from ebcache_fast.kernels.head import head_predict, head_update
from ebcache_fast.kernels.run import run_update
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import GuidanceArgs, Linear, Norm, Patches, StepIndex, Update

STEPS, CONDITIONS, STEP = 6, 3, 3  # of the tables, and the step that is asked for


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
            at=step_index(s.rows, STEP, CONDITIONS),
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

    def clone(self) -> "StepOperands":
        """The same in memory of their own."""
        return self.map(lambda value: mapped(lambda _, tensor: tensor.clone(), value))

    def map(self, change: Callable[[object], object]) -> "StepOperands":
        values = {f.name: change(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return StepOperands(**values)  # type: ignore[arg-type]


def made(*names: str, **outputs: Callable[[StepOperands], Tensor]) -> Callable[[Sizes, torch.dtype], Call]:
    """What makes calls with these operands and outputs."""

    def make(sizes: Sizes, dtype: torch.dtype) -> Call:
        case = StepOperands.of(sizes, dtype)
        return {name: getattr(case, name) for name in names} | {name: of(case) for name, of in outputs.items()}

    return make


def stream(case: StepOperands) -> Tensor:
    return torch.empty_like(case.h)


def image(case: StepOperands) -> Tensor:
    return case.x.new_empty(case.sizes.rows, case.sizes.out_channels, *case.sizes.image)


def of_branches(count: int) -> Change:
    return lambda call: call | dict(branches=call["branches"][:count], gates=call["gates"][:count])


def without_branches(change: Change) -> Change:
    return lambda call: change(of_branches(0)(call))


def constant(call: Call) -> Call:
    return call | dict(h=torch.full_like(call["h"], 100.0))


def of_steps(count: int) -> Change:
    return lambda call: call | dict(sums=call["sums"][:count])


PLAIN = SIZES["plain"]
OF_NORMS = {"an epsilon that counts": Form((PLAIN,), EPSILON)} | {
    f"a norm with parameters, ragged {name}": Form((sizes,), OF_ITS_OWN) for name, sizes in RAGGED.items()
}
OF_HEADS = {
    **OF_NORMS,
    "one branch": Form((PLAIN,), of_branches(1)),
    "no branch": Form((PLAIN,), of_branches(0)),
    "an epsilon without branches": Form((PLAIN,), without_branches(EPSILON)),
    "a large mean": Form((SIZES["DiT-XL/2"],), without_branches(with_mean(1e3))),
    # Nor do its means reach float16's end in the channels that only fill a tile up.
    "a constant stream": Form((PLAIN,), without_branches(constant), torch.float16),
}
OF_RUNS = OF_NORMS | {f"{n} steps": Form((SIZES["memory"],), of_steps(n)) for n in (1, 2)}
HEAD = ("h", "branches", "gates", "norm", "at", "linear", "guide")
EVERY_SIZE = (SIZES | {f"ragged {name}": sizes for name, sizes in RAGGED.items()},)
LATENTS = ("x", "update.previous")

EMBED = Operation(embed, reference.embed, made("x", "patches", h=stream), EVERY_SIZE, (PLAIN,), ("h",))
EMBED_NORM = Operation(
    embed_norm_modulate,
    reference.embed_norm_modulate,
    made("x", "patches", "norm", "at", h=stream, u=stream),
    EVERY_SIZE,
    (PLAIN,),
    ("h", "u"),
    OF_NORMS,
)
PREDICT = Operation(
    head_predict, reference.head_predict, made(*HEAD, out=image), EVERY_SIZE, (PLAIN,), ("out",), OF_HEADS
)
UPDATE = Operation(
    head_update, reference.head_update, made("x", *HEAD, "update"), EVERY_SIZE, (PLAIN,), LATENTS, OF_HEADS
)
RUN = Operation(
    run_update,
    reference.run_update,
    made("x", "sums", "patches", "norm", "at", "linear", "guide", "update"),
    EVERY_SIZE,
    (PLAIN,),
    LATENTS,
    OF_RUNS,
)
