"""Signatures of diffusers' transformers, whose pipelines guide by themselves."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from ebcache_fast.dropin.patching import Method
from ebcache_fast.dropin.signatures import Answering, FacebookDiTSignature, ForwardCall, Signature
from ebcache_fast.errors import InputError
from ebcache_fast.models import (
    CogVideoXConditioning,
    CogVideoXDenoiser,
    Conditioning,
    DiffusersDiTDenoiser,
    DiTDenoiser,
    PixArtConditioning,
    PixArtDenoiser,
    as_denoiser,
)


class _DiffusersSignature:
    """Base of the signatures of diffusers' transformers: one method, and what it returns."""

    unconditional_first = True
    forward: ClassVar[Any]

    def __init__(self, answering: Answering) -> None:
        self._answering = answering

    @property
    def methods(self) -> Mapping[str, Method]:
        return {"forward": self.forward}

    def _answer(self, call: ForwardCall | None, hidden_states: Tensor, return_dict: bool, **named: Any) -> Any:
        """Answer a call with these arguments; the model's own gets them by name, as its decorators want them."""
        out = self._answering.answer(call, "forward", hidden_states, return_dict=return_dict, **named)
        if not isinstance(out, Tensor):  # the model's own
            return out
        if not return_dict:
            return (self._ours(out),)
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=self._ours(out))

    def _ours(self, out: Tensor) -> Tensor:
        """The engine's output in the model's layout."""
        return out


class DiffusersDiTSignature(_DiffusersSignature):
    """Signature of DiTTransformer2DModel."""

    unconditional_first = False

    @staticmethod
    def ask(model: Any, call: ForwardCall) -> Any:
        return model(call.x, call.t, call.y).sample

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Answer as the model: latents (R, C, H, W), timesteps, labels (R,) -> Transformer2DModelOutput, or a tuple."""
        call = None
        if timestep is not None and class_labels is not None and not (cross_attention_kwargs or others):
            call = ForwardCall(hidden_states, timestep, class_labels)
        return self._answer(
            call,
            hidden_states,
            return_dict,
            timestep=timestep,
            class_labels=class_labels,
            cross_attention_kwargs=cross_attention_kwargs,
            **others,
        )


class PixArtSignature(_DiffusersSignature):
    """Signature of PixArtTransformer2DModel."""

    @staticmethod
    def ask(model: Any, call: ForwardCall) -> Any:
        text, mask, resolution, aspect_ratio = call.context
        sizes = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        return model(call.x, text, call.t, sizes, encoder_attention_mask=mask).sample

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor | None] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Answer as the model: latents (R, C, H, W), text (R, L, E), timesteps (R,) -> as `DiffusersDiTSignature`."""
        sizes = added_cond_kwargs or {}
        known = not (cross_attention_kwargs or others) and attention_mask is None
        known = known and sizes.keys() <= {"resolution", "aspect_ratio"}
        call = None
        if known and encoder_hidden_states is not None and timestep is not None:
            context = PixArtConditioning(
                encoder_hidden_states, encoder_attention_mask, sizes.get("resolution"), sizes.get("aspect_ratio")
            )
            of_each_row = all(tensor is None or tensor.shape[:1] == hidden_states.shape[:1] for tensor in context)
            if of_each_row and _is_known_mask(context):
                call = _of_label_0(hidden_states, timestep, context)
        return self._answer(
            call,
            hidden_states,
            return_dict,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            added_cond_kwargs=added_cond_kwargs,
            cross_attention_kwargs=cross_attention_kwargs,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            **others,
        )


class CogVideoXSignature(_DiffusersSignature):
    """Signature of CogVideoXTransformer3DModel."""

    @staticmethod
    def ask(model: Any, call: ForwardCall) -> Any:
        text, cos, sin, ofs = call.context
        rotary = None if cos is None else (cos, sin)
        out = model(call.x.transpose(1, 2), text, call.t, ofs=ofs, image_rotary_emb=rotary, return_dict=False)
        return out[0].transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: int | float | Tensor,
        timestep_cond: Tensor | None = None,
        ofs: int | float | Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Answer as the model: latents (R, F, C, H, W), text (R, L, E), timesteps (R,) -> as `PixArtSignature`."""
        call = None
        if timestep_cond is None and not (attention_kwargs or others) and hidden_states.ndim == 5:
            cos, sin = (None, None) if image_rotary_emb is None else image_rotary_emb
            shift = None if ofs is None else torch.as_tensor(ofs, device=hidden_states.device)
            context = CogVideoXConditioning(encoder_hidden_states, cos, sin, shift)
            is_one = shift is None or shift.numel() == 1  # not one for each row
            if is_one and encoder_hidden_states.shape[:1] == hidden_states.shape[:1]:
                call = _of_label_0(hidden_states.transpose(1, 2), torch.as_tensor(timestep), context)
        return self._answer(
            call,
            hidden_states,
            return_dict,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            timestep_cond=timestep_cond,
            ofs=ofs,
            image_rotary_emb=image_rotary_emb,
            attention_kwargs=attention_kwargs,
            **others,
        )

    def _ours(self, out: Tensor) -> Tensor:
        return out.transpose(1, 2).contiguous()


def _is_known_mask(context: PixArtConditioning) -> bool:
    """True if there is a mask of tokens, one to be added to the scores of all latents alike, or none."""
    mask, (rows, *tokens) = context.mask, context.text.shape[:2]
    if mask is None or mask.shape == (rows, *tokens):
        return True
    return mask.shape == (rows, 1, *tokens) and mask.dtype == context.text.dtype  # of bools attention makes another


def _of_label_0(x: Tensor, t: Tensor, context: Conditioning) -> ForwardCall:
    """The call of a model whose rows differ by their context alone."""
    return ForwardCall(x, t, torch.zeros(x.shape[:1], dtype=torch.int64, device=x.device), context=context)


_SIGNATURES: Final[Mapping[type, type[Signature]]] = MappingProxyType(
    {
        DiTDenoiser: FacebookDiTSignature,
        DiffusersDiTDenoiser: DiffusersDiTSignature,
        PixArtDenoiser: PixArtSignature,
        CogVideoXDenoiser: CogVideoXSignature,
    }
)


def signature_of(model: nn.Module) -> type[Signature]:
    """The signature of models of this layout, by their family or the nearest above it; InputError without any."""
    family = type(as_denoiser(model))
    found = next((_SIGNATURES[base] for base in family.__mro__ if base in _SIGNATURES), None)
    if found is None:
        raise InputError(
            f"{family.__name__}, the family of a {type(model).__name__}, has no signature, expected one of the "
            f"families {', '.join(base.__name__ for base in _SIGNATURES)}; add its line to the table in {__name__}"
        )
    return found
