"""The sizes of PixArt and CogVideoX: what they say of themselves, and which calls fit them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers_tiny import ROTARY, TEXT_LENGTH, TEXT_WIDTH, tiny_cogvideox, tiny_pixart
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.models import CogVideoXConditioning, Conditioning, PixArtConditioning, as_denoiser

pytest.importorskip("diffusers")

SIZED = partial(tiny_pixart, use_additional_conditions=True, attention_head_dim=12, cross_attention_dim=24)
LEARNED = partial(tiny_cogvideox, use_learned_positional_embeddings=True, **ROTARY)
ROTATED = partial(tiny_cogvideox, **ROTARY)
OF_FRAMES = partial(tiny_cogvideox, patch_size_t=2, sample_frames=7, **ROTARY)
OFFSET = partial(tiny_cogvideox, ofs_embed_dim=8)
PLAIN: list[Callable[[], Any]] = [tiny_pixart, SIZED, tiny_cogvideox, LEARNED, OF_FRAMES, OFFSET]


def text(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, TEXT_LENGTH, TEXT_WIDTH))


def angles(tokens: int = 48, width: int = 16) -> Tensor:
    return torch.zeros(tokens, width)


def test_what_they_are_made_for() -> None:
    pixart = as_denoiser(tiny_pixart(sample_size=16))
    assert (pixart.latent_shape, pixart.out_channels, pixart.text_tokens) == ((4, 16, 16), 8, 0)
    assert pixart.shape.tokens == 64
    video = as_denoiser(tiny_cogvideox(sample_height=6, sample_width=10))
    assert (video.latent_shape, video.out_channels, video.text_tokens) == ((4, 3, 6, 10), 4, TEXT_LENGTH)
    assert video.shape.tokens == TEXT_LENGTH + 3 * 3 * 5


FITTING: dict[str, tuple[Callable[[], Any], tuple[int, ...], Conditioning, int]] = {
    "another picture": (tiny_pixart, (4, 6, 10), PixArtConditioning(text()), 15),
    "another film": (tiny_cogvideox, (4, 2, 6, 10), CogVideoXConditioning(text()), TEXT_LENGTH + 30),
    "another text": (ROTATED, (4, 1, 4, 2), CogVideoXConditioning(text(2, 9, TEXT_WIDTH), angles(2), angles(2)), 11),
    "patches of two frames": (OF_FRAMES, (4, 2, 8, 4), CogVideoXConditioning(text(), angles(8), angles(8)), 14),
}


@pytest.mark.parametrize(("make", "latents", "context", "tokens"), FITTING.values(), ids=FITTING)
def test_calls_of_other_sizes(
    make: Callable[[], Any], latents: tuple[int, ...], context: Conditioning, tokens: int
) -> None:
    denoiser = as_denoiser(make())
    before = denoiser.shape
    for_shape = denoiser.for_shape(latents, context)
    assert (for_shape.latent_shape, for_shape.shape.tokens) == (latents, tokens)
    assert denoiser.shape == before


@pytest.mark.parametrize("make", PLAIN)
def test_whoever_gives_no_text_is_sent_to_the_pipeline(make: Callable[[], Any]) -> None:
    denoiser = as_denoiser(make())
    with pytest.raises(InputError, match="is given no text to follow here; use its pipeline instead"):
        denoiser.for_shape(denoiser.latent_shape, ())


@pytest.mark.parametrize("make", PLAIN)
def test_their_own_example_fits(make: Callable[[], Any]) -> None:
    denoiser = as_denoiser(make())
    latents, context = denoiser.probe_inputs(2)
    assert denoiser.for_shape(latents, context).latent_shape == latents


PICTURE, FILM = (4, 8, 8), (4, 3, 8, 8)
OTHER_TEXTS = (text(2, 6, 5), text(6, TEXT_WIDTH), text(2, 0, TEXT_WIDTH), text(2, 6, TEXT_WIDTH, 1))
LATENTS, TEXT, POSITIONS = "do(es)? not fit; this model takes", "^text of shape .* does not fit", "rotary embeddings of"
REFUSED: list[tuple[Callable[[], Any], tuple[int, ...], Conditioning, str]] = [
    *(
        (tiny_pixart, latents, PixArtConditioning(text()), LATENTS)
        for latents in ((4, 8), (*PICTURE, 8), (5, 8, 8), (4, 7, 8), (4, 8, 7), (4, 0, 8), (4, 8, 0))
    ),
    *((tiny_pixart, PICTURE, PixArtConditioning(one), TEXT) for one in OTHER_TEXTS),
    *(
        (SIZED, PICTURE, PixArtConditioning(text(), None, *sizes), "resolution or aspect_ratio is missing")
        for sizes in ((None, text(2, 1)), (text(2, 2), None), (None, None))
    ),
    *(
        (tiny_cogvideox, latents, CogVideoXConditioning(text()), LATENTS)
        for latents in ((4, 3, 8), (*FILM, 8), (5, 3, 8, 8), (4, 3, 7, 8), (4, 3, 8, 7), (4, 0, 8, 8), (4, 3, 0, 8))
    ),
    (OF_FRAMES, FILM, CogVideoXConditioning(text(), angles(), angles()), LATENTS),
    *((tiny_cogvideox, FILM, CogVideoXConditioning(one), TEXT) for one in OTHER_TEXTS),
    *(
        (
            make,
            FILM,
            CogVideoXConditioning(text(2, 5, TEXT_WIDTH)),
            "text of 5 tokens does not fit the model's positions",
        )
        for make in (tiny_cogvideox, LEARNED)
    ),
    *(
        (
            LEARNED,
            latents,
            CogVideoXConditioning(text()),
            "do not fit the model's learned positions; they must be .8, 8.",
        )
        for latents in ((4, 3, 6, 8), (4, 3, 8, 6))
    ),
    *(
        (ROTATED, FILM, CogVideoXConditioning(text(), *given), POSITIONS)
        for given in ((angles(), None), (None, angles()), (angles(47), angles(47)), (angles(), angles(48, 8)))
    ),
    (tiny_cogvideox, FILM, CogVideoXConditioning(text(), ofs=torch.ones(1)), "^ofs=.* does not fit"),
    (OFFSET, FILM, CogVideoXConditioning(text()), "^ofs=None does not fit"),
]


@pytest.mark.parametrize(("make", "latents", "context", "message"), REFUSED)
def test_calls_that_fit_none(
    make: Callable[[], Any], latents: tuple[int, ...], context: Conditioning, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        as_denoiser(make()).for_shape(latents, context)
