"""Models: the ``Denoiser`` protocol, its adapters, the original's DiT and checkpoint loading."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from ebcache_fast.models.base import Conditioning, Denoiser, Modulation
from ebcache_fast.models.checkpoint import load_checkpoint, load_dit, save_weights
from ebcache_fast.models.cogvideox import CogVideoXDenoiser
from ebcache_fast.models.cogvideox_sizes import CogVideoXConditioning
from ebcache_fast.models.diffusers_dit import DiffusersDiTDenoiser
from ebcache_fast.models.facebook_dit import DiTDenoiser
from ebcache_fast.models.modules import DIT_MODELS, DiT
from ebcache_fast.models.pixart import PixArtDenoiser
from ebcache_fast.models.pixart_sizes import PixArtConditioning
from ebcache_fast.models.pretrained import load_pretrained

__all__ = [
    "DIT_MODELS",
    "CogVideoXConditioning",
    "CogVideoXDenoiser",
    "Conditioning",
    "Denoiser",
    "DiT",
    "DiTDenoiser",
    "DiffusersDiTDenoiser",
    "Modulation",
    "PixArtConditioning",
    "PixArtDenoiser",
    "as_denoiser",
    "load_checkpoint",
    "load_dit",
    "load_pretrained",
    "save_weights",
]


# The adapter of models that have an attribute, the first that is there.
_MARKS: Final[Mapping[str, Callable[[nn.Module], Denoiser]]] = MappingProxyType(
    {
        "adaln_single": PixArtDenoiser,
        "patch_embed": CogVideoXDenoiser,
        "transformer_blocks": DiffusersDiTDenoiser,
    }
)


def as_denoiser(model: nn.Module) -> Denoiser:
    """The adapter that fits ``model``; InputError if none does."""
    return next((adapter for mark, adapter in _MARKS.items() if hasattr(model, mark)), DiTDenoiser)(model)


def __getattr__(name: str) -> Any:
    """Former names, with a DeprecationWarning."""
    from ebcache_fast.former import former_name

    return former_name(__name__, name)
