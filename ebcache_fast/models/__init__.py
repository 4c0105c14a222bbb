"""Models: the ``Denoiser`` protocol, its adapters, the original's DiT and checkpoint loading."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from torch import nn

from ebcache_fast.models.checkpoint import load_checkpoint, load_dit, save_weights
from ebcache_fast.models.cogvideox_denoiser import CogVideoXDenoiser
from ebcache_fast.models.cogvideox_sizes import CogVideoXContext
from ebcache_fast.models.denoiser import Context, Denoiser, Modulation
from ebcache_fast.models.diffusers_dit_denoiser import DiffusersDiTDenoiser
from ebcache_fast.models.dit import DIT_MODELS, DiT
from ebcache_fast.models.dit_denoiser import DiTDenoiser
from ebcache_fast.models.pixart_denoiser import PixArtDenoiser
from ebcache_fast.models.pixart_sizes import PixArtContext
from ebcache_fast.models.pretrained import load_pretrained

__all__ = [
    "DIT_MODELS",
    "CogVideoXContext",
    "CogVideoXDenoiser",
    "Context",
    "Denoiser",
    "DiT",
    "DiTDenoiser",
    "DiffusersDiTDenoiser",
    "Modulation",
    "PixArtContext",
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
