"""The kinds of diffusers' pipelines, each asked for the same in its own words: rows of a batch, steps, a seed."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, MLP, NO
from depth import deep
from diffusers_tiny import (
    TEXT_LENGTH,
    tiny_cogvideox_2b,
    tiny_cogvideox_5b,
    tiny_image_to_video,
    tiny_pipeline,
    tiny_pixart_alpha,
    tiny_pixart_sigma,
    tiny_video_to_video,
)
from torch import Tensor

from ebcache_fast import CacheTable
from ebcache_fast.plan import StepType

TYPES = (NO, ATTN_MLP, ATTENTION, NO, MLP)
STEPS = len(TYPES)
PROMPTS = ("a red cat sleeps", "the dog", "small green house", "old bird runs", "cat", "a bird sleeps")
Call = dict[str, Any]  # one of the transformer's, by the names of its arguments


def by_label(rows: Sequence[int]) -> dict[str, Any]:
    """DiT's own words for rows of a batch."""
    return dict(class_labels=list(rows), output_type="pt")


def by_prompt(rows: Sequence[int]) -> dict[str, Any]:
    """Prompts of several lengths; images as latents."""
    prompts = [PROMPTS[row] for row in rows]
    return dict(prompt=prompts, max_sequence_length=TEXT_LENGTH, output_type="latent")


def by_image(rows: Sequence[int]) -> dict[str, Any]:
    """With an image for each row."""
    return by_prompt(rows) | dict(image=torch.stack([pixels(row)[0] for row in rows]))


def by_video(rows: Sequence[int]) -> dict[str, Any]:
    """With a video for each row."""
    return by_prompt(rows) | dict(video=torch.stack([pixels(row) for row in rows]))


def pixels(row: int) -> Tensor:
    """Five frames (5, 3, 16, 16) of a row."""
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(row))


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of pipeline: how it is made and asked."""

    name: str
    make: Callable[[], Any]
    words: Callable[[Sequence[int]], dict[str, Any]]
    size: Mapping[str, Any] = field(default_factory=dict)
    other_sizes: tuple[Mapping[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name

    def pipeline(self) -> Any:
        """One for a test of its own, whatever that does to any part of it."""
        return copy.deepcopy(_made(self.make))

    def draw(
        self, pipe: Any, rows: Sequence[int] = (0, 1), steps: int = STEPS, seed: int = 1, **options: Any
    ) -> Tensor:
        """What the pipeline returns for these rows."""
        usual = dict(generator=torch.Generator().manual_seed(seed), guidance_scale=4.0, num_inference_steps=steps)
        drawn: Tensor = pipe(**(self.words(rows) | dict(self.size) | usual | options), return_dict=False)[0]
        return drawn

    def call(self, pipe: Any, rows: Sequence[int] = (0, 1), **options: Any) -> Call:
        """The transformer's first call for these rows, as the pipeline makes it; without guidance unless asked for."""
        seen: list[Call] = []

        def look(_: Any, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            seen.append(dict(zip(("hidden_states",), args, strict=False)) | named)

        handle = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
        try:
            self.draw(pipe, rows, **(dict(guidance_scale=1.0, steps=2) | options))
        finally:
            handle.remove()
        return seen[0]


def twin(pipe: Any) -> Any:
    """The pipeline with a transformer and a scheduler of its own; the rest is shared."""
    other = copy.copy(pipe)
    own = dict(transformer=copy.deepcopy(pipe.transformer), scheduler=copy.deepcopy(pipe.scheduler))
    vars(other).update(own)  # past the pipeline's own setter, which would rewrite its configuration
    return other


@cache
def _made(make: Callable[[], Any]) -> Any:
    return make()


UNBINNED = dict(height=8, width=8, use_resolution_binning=False, clean_caption=False)
OTHER_IMAGES = tuple(dict(height=h, width=w) for h, w in ((16, 8), (16, 16)))
OTHER_VIDEOS = tuple(dict(height=h, width=w, num_frames=f) for h, w, f in ((16, 16, 1), (16, 24, 3)))
FIVE_FRAMES = dict(height=16, width=16, num_frames=5)

DIT = Kind("DiT", tiny_pipeline, by_label)
SIGMA = Kind("PixArt-Sigma", tiny_pixart_sigma, by_prompt, UNBINNED, OTHER_IMAGES)
ALPHA = Kind("PixArt-Alpha", tiny_pixart_alpha, by_prompt, UNBINNED, OTHER_IMAGES)
ALPHA_1024 = Kind(
    "PixArt-Alpha-1024", lambda: tiny_pixart_alpha(additional_conditions=True), by_prompt, UNBINNED, OTHER_IMAGES
)
COG_2B = Kind("CogVideoX-2b", tiny_cogvideox_2b, by_prompt, FIVE_FRAMES, OTHER_VIDEOS)
COG_5B = Kind("CogVideoX-5b", tiny_cogvideox_5b, by_prompt, FIVE_FRAMES, OTHER_VIDEOS)
COG_IMAGE = Kind("CogVideoX-image", tiny_image_to_video, by_image, FIVE_FRAMES)
COG_VIDEO = Kind("CogVideoX-video", tiny_video_to_video, by_video, dict(height=16, width=16, strength=1.0))

PIXARTS = (SIGMA, ALPHA, ALPHA_1024)
COGS = (COG_2B, COG_5B, COG_IMAGE, COG_VIDEO)
THREE = (DIT, SIGMA, COG_2B)  # one of each


def families(*slow: Kind) -> pytest.MarkDecorator:
    """Parametrize ``kind`` by one of each family; what is alike in all of them need not be quick in every one."""
    return pytest.mark.parametrize("kind", [deep(kind) if kind in slow else kind for kind in THREE], ids=str)


def timesteps(pipe: Any, steps: int = STEPS) -> tuple[float, ...]:
    """Those that the pipeline's scheduler runs."""
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    return tuple(scheduler.timesteps.tolist())


def table_of(pipe: Any, types: Sequence[StepType] = TYPES, **options: Any) -> CacheTable:
    """A table of these step types over the timesteps of the pipeline's scheduler."""
    return CacheTable(timesteps(pipe, len(types)), types, **options)


def uncached(pipe: Any, steps: int = STEPS) -> CacheTable:
    """A table that reuses nothing."""
    return table_of(pipe, [NO] * steps)


@torch.no_grad()
def ask(model: Any, call: Call, t: float, seed: int = 0) -> Tensor:
    """The module itself, called as in ``call`` but for a timestep and latents of this seed."""
    like = call["hidden_states"]
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)
    out: Tensor = model(**(call | dict(hidden_states=x, timestep=torch.full((len(x),), t), return_dict=False)))[0]
    return out


def drive(model: Any, call: Call, ts: Sequence[float], seed: int = 0) -> list[Tensor]:
    """A call a step, with latents of each step's own."""
    return [ask(model, call, t, seed + i) for i, t in enumerate(ts)]
