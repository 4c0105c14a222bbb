"""What depends on a case's model: how the method runs on it in plain torch, and what diffusers' transformer of it is.

A model's layout is known by the context that its calls have: none but labels, PixArt's or CogVideoX's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from torch import Tensor

from bench.rivals import diffusers_dit, diffusers_text, plain
from bench.rivals.case import Case
from bench.rivals.compiled import options_of
from bench.rivals.loop import Call, Run, sample
from bench.rivals.plain import timesteps_of
from bench.rivals.rival import Trajectory
from ebcache_fast.models import CogVideoXConditioning, PixArtConditioning


@dataclass(frozen=True)
class Layout:
    """One kind of model."""

    method: Callable[[Case], Trajectory]  # EB-Cache in plain torch
    transformer: Callable[[Case], Any]  # diffusers', of the case's weights
    call: Callable[[Case, Any], Call]  # it, or what somebody made of it, in a pipeline's words


def _with_text(call: Callable[[Case, Any], Call]) -> Layout:
    return Layout(partial(diffusers_text.eb_cache, call=call), diffusers_text.transformer, call)


_LAYOUTS: Final[Mapping[type, Layout]] = MappingProxyType(
    {
        tuple: Layout(plain.eager, diffusers_dit.transformer, diffusers_dit.call),
        PixArtConditioning: _with_text(diffusers_text.pixart_call),
        CogVideoXConditioning: _with_text(diffusers_text.cogvideox_call),
    }
)


def method(case: Case) -> Trajectory:
    """EB-Cache in plain torch, operation by operation."""
    return _LAYOUTS[type(case.context)].method(case)


def transformer(case: Case) -> Any:
    """diffusers' transformer that computes what the case's model does, in a module of its own."""
    return _LAYOUTS[type(case.context)].transformer(case)


def call(case: Case, model: Callable[..., Any]) -> Call:
    """How a pipeline calls it."""
    return _LAYOUTS[type(case.context)].call(case, model)


def trajectory(case: Case, model: Callable[..., Any]) -> Trajectory:
    """It, or what somebody made of it, at every step."""
    t, once = timesteps_of(case), call(case, model)

    def predict(x: Tensor, i: int) -> Tensor:
        return once(x, t[i])

    def run() -> Run:
        return sample(case, predict)

    return run


def eager(case: Case) -> Trajectory:
    """diffusers' transformer operation by operation, uncached."""
    return trajectory(case, transformer(case))


def compiled_by_layer(case: Case) -> Trajectory:
    """Each layer under torch.compile, as diffusers recommends it.

    One compilation serves all layers but the first, whose input lies otherwise in memory. Without CUDA graphs: these
    steps take so long that the host is ahead.
    """
    model = transformer(case)
    for layer in model.transformer_blocks:
        layer.compile(**options_of(case, "max-autotune-no-cudagraphs"))
    return trajectory(case, model)
