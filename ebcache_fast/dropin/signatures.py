"""How models are called: the arguments of the methods that are replaced, and what they return."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from ebcache_fast.dropin.forward_call import ForwardCall
from ebcache_fast.dropin.patching import Method


class Answering(Protocol):
    """Who answers: see `CachedForward`."""

    @property
    def guided_channels(self) -> int:
        """How many of them ``forward_with_cfg`` guides; 0 where the model's own has to run."""
        ...

    def answer(self, call: ForwardCall | None, name: str, *args: Any, **named: Any) -> Any:
        """Our output (R, Cout, H, W), or whatever the model's own method of that name returns."""
        ...


class Signature(Protocol):
    """The methods that take the place of a model's own, bound to who answers."""

    unconditional_first: bool  # how their pipelines order the rows of a guided batch

    def __init__(self, answering: Answering) -> None: ...

    @property
    def methods(self) -> Mapping[str, Method]:
        """By name."""
        ...

    @staticmethod
    def ask(model: Any, call: ForwardCall) -> Any:
        """The tensor that the model's own method returns for a call."""
        ...


class FacebookDiTSignature:
    """Of the original's DiT."""

    unconditional_first = False

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    @property
    def methods(self) -> Mapping[str, Method]:
        guided: dict[str, Method] = {"forward_with_cfg": self.forward_with_cfg}
        return {"forward": self.forward} | (guided if self._answering.guided_channels else {})

    @staticmethod
    def ask(model: Any, call: ForwardCall) -> Any:
        if call.guided_channels:
            return model.forward_with_cfg(call.x, call.t, call.y, call.cfg_scale)
        return model(call.x, call.t, call.y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *more: Any, **others: Any) -> Tensor:
        """As the model's: latents x (R, C, H, W), timesteps t (R,), labels y (R,) -> (R, out_channels, H, W)."""
        call = None if more or others else ForwardCall(x, t, y)
        out: Tensor = self._answering.answer(call, "forward", x, t, y, *more, **others)
        return out

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """As the model's: the second half of the batch is unconditional, and takes the latents of the first."""
        call = ForwardCall(x, t, y, cfg_scale, self._answering.guided_channels)
        out: Tensor = self._answering.answer(call, "forward_with_cfg", x, t, y, cfg_scale)
        return out
