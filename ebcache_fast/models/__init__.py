"""Families of models, `as_denoiser` that finds a model's, the original's DiT, and checkpoint loading."""

from typing import Any, Final

from torch import nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import Conditioning, Denoiser, Family, Modulation
from ebcache_fast.models.checkpoint import load_checkpoint, load_dit, save_weights
from ebcache_fast.models.cogvideox import CogVideoXConditioning, CogVideoXDenoiser
from ebcache_fast.models.diffusers_dit import DiffusersDiTDenoiser
from ebcache_fast.models.facebook_dit import DiTDenoiser
from ebcache_fast.models.modules import DIT_MODELS, DiT
from ebcache_fast.models.pixart import PixArtConditioning, PixArtDenoiser
from ebcache_fast.models.pretrained import load_pretrained

__all__ = [
    "DIT_MODELS",
    "FAMILIES",
    "CogVideoXConditioning",
    "CogVideoXDenoiser",
    "Conditioning",
    "Denoiser",
    "DiT",
    "DiTDenoiser",
    "DiffusersDiTDenoiser",
    "Family",
    "Modulation",
    "PixArtConditioning",
    "PixArtDenoiser",
    "as_denoiser",
    "load_checkpoint",
    "load_dit",
    "load_pretrained",
    "save_weights",
]


FAMILIES: Final[tuple[type[Family], ...]] = (DiTDenoiser, DiffusersDiTDenoiser, PixArtDenoiser, CogVideoXDenoiser)


def as_denoiser(model: nn.Module) -> Denoiser:
    """The model seen as one of its family.

    InputError for a model of no known family, which lists them and names what it lacks of the nearest, or that its
    family can't take.
    """
    family = next((family for family in FAMILIES if not family.layout.missing(model)), None)
    if family is None:
        name = type(model).__name__
        raise InputError(f"{name} is of no known family: {_known_and_near(model)}; pass a model of one of these")
    return family(model)


def _known_and_near(model: nn.Module) -> str:
    """The known families, and what a model lacks of the nearest if it is near at all."""
    layouts = [family.layout for family in FAMILIES]
    nearest = max(layouts, key=lambda layout: layout.likeness(model))
    known = ", ".join(layout.name for layout in layouts)
    if nearest.likeness(model) < 1 / 2:
        return known
    first, *others = nearest.missing(model)
    more = f" and {len(others)} more" if others else ""
    return f"{known}; of the nearest, {nearest.name}, it lacks {first!r}{more}"


def __getattr__(name: str) -> Any:
    """Former names, with a DeprecationWarning."""
    from ebcache_fast.former import former_name

    return former_name(__name__, name)
