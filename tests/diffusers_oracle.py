"""The method written around diffusers' own blocks, and what an enabled pipeline may return beside it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from constants import NO
from diffusers_kinds import STEPS, TYPES, Call, Kind, drive, table_of, timesteps, twin
from tiny import relative_error
from torch import Tensor, nn

from ebcache_fast import enable, stats
from ebcache_fast.errors import InputError
from ebcache_fast.plan import Branch, StepType

BRANCHES = {"attn1": Branch.SELF_ATTN, "attn2": Branch.CROSS_ATTN, "ff": Branch.MLP}
LEAST_ALPHA = 0.05  # below it, v-prediction is not scaled


class Replaying(nn.Module):
    """A branch that keeps what it computed last, ungated, and gives it again in steps that reuse it.

    In each of its places: a layer may stand in a model more than once.
    """

    def __init__(self, inner: nn.Module, branch: Branch) -> None:
        super().__init__()
        self.inner, self.branch = inner, branch
        self.kept: dict[int, Any] = {}
        self.begin(NO)

    def begin(self, step_type: StepType) -> None:
        """A step of this type comes next."""
        self.step_type, self.place = step_type, 0

    def forward(self, *args: Any, **named: Any) -> Any:
        self.place += 1
        if self.branch not in self.step_type.reuses:
            self.kept[self.place] = self.inner(*args, **named)
        return self.kept[self.place]


def replaying(pipe: Any, types: Mapping[float, StepType] | None = None, eps_scale: float = 1.0) -> Any:
    """A copy of a plain pipeline that follows ``types``, by timestep; one that is not there computes everything.

    None stands for `TYPES` over as many steps of its scheduler.
    """
    pipe = twin(pipe)
    model, of_step = pipe.transformer, by_timestep(pipe) if types is None else types
    assert "forward" not in vars(model), "a pipeline that is enabled is no oracle"
    found: list[Replaying] = []
    for block in dict.fromkeys(model.transformer_blocks):
        for name, branch in BRANCHES.items():
            if getattr(block, name, None) is not None:
                found.append(Replaying(getattr(block, name), branch))
                setattr(block, name, found[-1])

    def set_step(_: nn.Module, args: Any, named: dict[str, Any]) -> None:
        for each in found:
            each.begin(of_step.get(named["timestep"][0].item(), NO))

    model.register_forward_pre_hook(set_step, with_kwargs=True)
    if eps_scale != 1.0:
        scale(pipe, eps_scale)
    return pipe


def by_timestep(pipe: Any, types: Sequence[StepType] = TYPES) -> dict[float, StepType]:
    """Step types by the timesteps of the pipeline's scheduler."""
    return dict(zip(timesteps(pipe, len(types)), types, strict=True))


def scale(pipe: Any, b: float) -> None:
    """Scale the noise that the transformer predicts, in place: its first channels, or what v says of it."""
    is_v = pipe.scheduler.config.prediction_type == "v_prediction"

    def hook(model: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any], out: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0] if args else named["hidden_states"]
        if is_v:
            return (scaled_v(out[0], x[:, :, : out[0].shape[2]], alpha_bar(pipe, named["timestep"]), b),)
        if out[0].ndim == 5:  # of a film there is no variance
            return (b * out[0],)
        channels = x.shape[1]
        return (torch.cat([b * out[0][:, :channels], out[0][:, channels:]], dim=1),)

    pipe.transformer.register_forward_hook(hook, with_kwargs=True)


def alpha_bar(pipe: Any, t: Tensor) -> float:
    """alpha_t squared, of the pipeline's scheduler."""
    return float(pipe.scheduler.alphas_cumprod[int(t[0])])


def scaled_v(v: Tensor, x: Tensor, squared: float, b: float) -> Tensor:
    """The v of the same x that stands for b times the noise, v = alpha eps - sigma x0 and x = alpha x0 + sigma eps."""
    alpha, sigma = math.sqrt(squared), math.sqrt(1 - squared)
    if alpha < LEAST_ALPHA:
        return v
    eps = b * (alpha * v + sigma * x)
    x0 = (x - sigma * eps) / alpha
    return alpha * eps - sigma * x0


def drive_replaying(pipe: Any, call: Call, ts: Sequence[float], types: Sequence[StepType] = TYPES) -> list[Tensor]:
    """A call a step of the module, by the oracle."""
    other = replaying(pipe, dict(zip(ts, types, strict=False)))
    return drive(other.transformer, call, ts)


# ------------------------------------------------------------------------------ whatever was done to a pipeline


def fate(pipe: Any, draw: Callable[[Any], Tensor], before: Callable[[Any], Any], after: Callable[[Any], Any]) -> str:
    """What becomes of an enabled pipeline that was changed ``before`` and ``after`` enabling it.

    "refused" where enabling raises InputError, "counted" where the model itself answers every call, bit for bit,
    "cached" where the method does; anything else in words.
    """
    plain, pipe = pipe, twin(pipe)
    before(pipe)
    try:
        enable(pipe, table_of(pipe))
    except InputError as error:
        message = str(error)
        has_remedy = ";" in message and "\n" not in message
        return "refused" if has_remedy else f"refused without a remedy: {message}"
    if after is not nothing:
        draw(pipe)
    after(pipe)
    done = stats(pipe)
    ours, counted = draw(pipe), stats(pipe)
    calls = sum(counted.originals.values()) - sum(done.originals.values())
    other = twin(plain)  # that was never enabled
    before(other)
    after(other)
    if calls:
        is_own = torch.equal(ours, draw(other)) and calls == STEPS
        return "counted" if is_own else f"{calls} calls were the model's own, of a result that is not"
    error = relative_error(ours, draw(replaying(other)))
    return "cached" if error < 1e-5 else f"differs from the method by {error:.2g}"


@dataclass
class Bare:
    """A transformer and a scheduler in the place of a pipeline, which takes long to copy and to run."""

    transformer: Any
    scheduler: Any


@cache
def bare(kind: Kind) -> tuple[Bare, Callable[[Any], Tensor]]:
    """Such a stand-in, for all who ask, and how to draw from it or a copy: the outputs of a run, all at once."""
    pipe = kind.pipeline()
    ts, call = timesteps(pipe), kind.call(pipe)
    return Bare(pipe.transformer, pipe.scheduler), lambda one: torch.stack(drive(one.transformer, call, ts))


def nothing(_: Any) -> None:
    """Leave the pipeline as it is."""


def assert_as_exact_as_its_own(kind: Kind, pipe: Any, dtype: torch.dtype) -> None:
    """Assert that the enabled module in ``dtype`` errs at most twice as much as its own replayed in it."""
    ts, call = timesteps(pipe), kind.call(pipe)
    exact = drive_replaying(pipe, call, ts)
    call |= {name: call[name].to(dtype) for name in ("hidden_states", "encoder_hidden_states")}
    pipe.transformer.to(dtype)
    own = drive_replaying(pipe, call, ts)
    enable(pipe, table_of(pipe))
    for ours, theirs, truth in zip(drive(pipe.transformer, call, ts), own, exact, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, truth) < 2 * relative_error(theirs, truth)
    assert not stats(pipe).originals
