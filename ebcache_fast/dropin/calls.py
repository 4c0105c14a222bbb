"""How models are called: the arguments of the methods that are replaced, and what they return."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol

from torch import Tensor, nn

from ebcache_fast.dropin.model_call import ModelCall
from ebcache_fast.dropin.own_forward import Method
from ebcache_fast.models import DiffusersDiTDenoiser, DiTDenoiser, as_denoiser


class Answering(Protocol):
    """Who answers: see `CachedForward`."""

    guided_channels: int

    def answer(self, call: ModelCall | None, name: str, *args: Any) -> Any:
        """Our output (R, Cout, H, W), or whatever the model's own method of that name returns."""
        ...


class Calls(Protocol):
    """The methods that take the place of a model's own, bound to who answers."""

    def __init__(self, answering: Answering) -> None: ...

    @property
    def methods(self) -> Mapping[str, Method]:
        """By name."""
        ...

    @staticmethod
    def read(result: Any) -> Any:
        """The tensor in what the model's own forward returns."""
        ...


class OriginalCalls:
    """Of the original's DiT."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    @property
    def methods(self) -> Mapping[str, Method]:
        guided: dict[str, Method] = {"forward_with_cfg": self.forward_with_cfg}
        return {"forward": self.forward} | (guided if self._answering.guided_channels else {})

    @staticmethod
    def read(result: Any) -> Any:
        return result

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """As the model's: latents x (R, C, H, W), timesteps t (R,), labels y (R,) -> (R, out_channels, H, W)."""
        out: Tensor = self._answering.answer(ModelCall(x, t, y), "forward", x, t, y)
        return out

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """As the model's: the second half of the batch is unconditional, and takes the latents of the first."""
        call = ModelCall(x, t, y, cfg_scale, self._answering.guided_channels)
        out: Tensor = self._answering.answer(call, "forward_with_cfg", x, t, y, cfg_scale)
        return out


class DiffusersDiTCalls:
    """Of diffusers' DiTTransformer2DModel; its pipeline guides by itself."""

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    @property
    def methods(self) -> Mapping[str, Method]:
        return {"forward": self.forward}

    @staticmethod
    def read(result: Any) -> Any:
        return result.sample

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As the model's: latents (R, C, H, W), timesteps and labels (R,) -> Transformer2DModelOutput, or a tuple."""
        call = None
        if timestep is not None and class_labels is not None and not cross_attention_kwargs:
            call = ModelCall(hidden_states, timestep, class_labels)
        out = self._answering.answer(
            call, "forward", hidden_states, timestep, class_labels, cross_attention_kwargs, return_dict
        )
        if not isinstance(out, Tensor):  # the model's own
            return out
        if not return_dict:
            return (out,)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=out)


_CALLS: Final[Mapping[type, type[Calls]]] = MappingProxyType(
    {DiTDenoiser: OriginalCalls, DiffusersDiTDenoiser: DiffusersDiTCalls}
)


def calls_class(model: nn.Module) -> type[Calls]:
    """How models of this layout are called."""
    return _CALLS[type(as_denoiser(model))]
