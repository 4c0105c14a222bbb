"""Models: the ``Denoiser`` protocol, its adapters, the original's DiT and checkpoint loading."""

from torch import nn

from ebcache_fast.models.checkpoint import load_checkpoint, load_dit, save_weights
from ebcache_fast.models.denoiser import Context, Denoiser, Modulation
from ebcache_fast.models.diffusers_dit_denoiser import DiffusersDiTDenoiser
from ebcache_fast.models.dit import DIT_MODELS, DiT
from ebcache_fast.models.dit_denoiser import DiTDenoiser
from ebcache_fast.models.pixart_denoiser import PixArtContext, PixArtDenoiser

__all__ = [
    "DIT_MODELS",
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
    "save_weights",
]


def as_denoiser(model: nn.Module) -> Denoiser:
    """The adapter that fits ``model``; InputError if none does."""
    if not hasattr(model, "transformer_blocks"):
        return DiTDenoiser(model)
    return PixArtDenoiser(model) if hasattr(model, "adaln_single") else DiffusersDiTDenoiser(model)
