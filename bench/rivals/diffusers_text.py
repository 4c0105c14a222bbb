"""diffusers' PixArt and CogVideoX: themselves, as their pipelines call them, and under EB-Cache in plain torch."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, cast

from torch import Tensor, nn

from bench.rivals.case import Case
from bench.rivals.loop import Call, Run, sample
from bench.rivals.plain import timesteps_of
from bench.rivals.rival import Trajectory
from ebcache_fast.models import CogVideoXConditioning, PixArtConditioning
from ebcache_fast.plan import Branch, StepType

PARTS = {"attn1": Branch.SELF_ATTN, "attn2": Branch.CROSS_ATTN, "ff": Branch.MLP}  # of a layer: its branches


def transformer(case: Case) -> Any:
    """Another module of the same weights, whose parts can be replaced without replacing the model's."""
    tensors = (*case.model.parameters(), *case.model.buffers())
    return deepcopy(case.model, {id(one): one for one in tensors})


def pixart_call(case: Case, model: Callable[..., Any]) -> Call:
    """The transformer as PixArtSigmaPipeline calls it."""
    given = cast(PixArtConditioning, case.context)
    text = given.text.to(case.dtype)
    sizes = {"resolution": given.resolution, "aspect_ratio": given.aspect_ratio}

    def once(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = model(
            x,
            encoder_hidden_states=text,
            encoder_attention_mask=given.mask,
            timestep=t,
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return out

    return once


def cogvideox_call(case: Case, model: Callable[..., Any]) -> Call:
    """The transformer as CogVideoXPipeline calls it, which has frames before channels."""
    text = cast(CogVideoXConditioning, case.context).text.to(case.dtype)

    def once(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = model(x.transpose(1, 2), encoder_hidden_states=text, timestep=t, return_dict=False)[0]
        return out.transpose(1, 2)

    return once


class Reused(nn.Module):
    """A branch whose output of the last step that computed it stands for those of the steps that reuse it."""

    def __init__(self, part: nn.Module, branch: Branch, now: list[StepType]) -> None:
        super().__init__()
        self.part, self._branch, self._now = part, branch, now
        self._output: Any = None

    def forward(self, *args: Any, **named: Any) -> Any:
        if self._branch not in self._now[0].reuses:
            self._output = self.part(*args, **named)
        return self._output


def eb_cache(case: Case, call: Callable[[Case, Any], Call]) -> Trajectory:
    """The method around the transformer's own layers: each branch's ungated output, kept and given again."""
    model, t, now = transformer(case), timesteps_of(case), [StepType.NO_CACHE]
    for layer in model.transformer_blocks:
        for name, branch in PARTS.items():
            if getattr(layer, name, None) is not None:
                setattr(layer, name, Reused(getattr(layer, name), branch, now))
    once = call(case, model)

    def predict(x: Tensor, i: int) -> Tensor:
        now[0] = case.types[i]
        return once(x, t[i])

    def run() -> Run:
        return sample(case, predict)

    return run
