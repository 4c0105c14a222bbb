"""PixArt-Sigma and -Alpha with caching enabled: masks, text, sizes, what their transformer alone takes."""

from typing import Any

import pytest
import torch
from constants import MLP, NO
from depth import deep
from diffusers_kinds import (
    ALPHA_1024,
    PIXARTS,
    SIGMA,
    STEPS,
    Kind,
    ask,
    by_prompt,
    drive,
    table_of,
    timesteps,
    uncached,
)
from diffusers_oracle import by_timestep, drive_replaying, replaying
from diffusers_tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_pixart
from tiny import assert_all_same, relative_error
from torch import Tensor

from ebcache_fast import enable, stats
from ebcache_fast.errors import InputError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")


@pytest.fixture
def pipe() -> Any:
    return SIGMA.pipeline()


# -------------------------------------------------------------------------------------------- text and masks


def masked(lengths: tuple[int, int]) -> Tensor:
    """A mask (2, S) that keeps so many tokens of each row."""
    return (torch.arange(TEXT_LENGTH) < torch.tensor(lengths).unsqueeze(1)).long()


MASKS = {
    "of all": masked((TEXT_LENGTH, TEXT_LENGTH)),
    "of each row": masked((2, 5)),
    "one token": masked((1, TEXT_LENGTH)),
    "in bool": masked((2, 5)).bool(),
    "in float": masked((2, 5)).float(),
    "as a bias": ((1 - masked((4, 2))) * -10000.0).unsqueeze(1),
    "none": None,
}


@pytest.mark.parametrize("in_order", [False, True])
def test_masks_of_every_kind_that_change_from_run_to_run(pipe: Any, in_order: bool) -> None:
    ts, call = timesteps(pipe), SIGMA.call(pipe)
    expected, found = {}, {}
    for name, mask in MASKS.items():
        expected[name] = drive_replaying(pipe, call | dict(encoder_attention_mask=mask), ts)
    enable(pipe, table_of(pipe), in_order=in_order)
    for name, mask in MASKS.items():
        found[name] = drive(pipe.transformer, call | dict(encoder_attention_mask=mask), ts)
        assert_all_same(found[name], expected[name])
    assert relative_error(found["of each row"][0], found["of all"][0]) > 1e-3
    assert not stats(pipe).refreshed


def test_what_a_mask_hides_does_not_matter(pipe: Any) -> None:
    ts, call = timesteps(pipe), SIGMA.call(pipe) | dict(encoder_attention_mask=masked((2, 3)))
    enable(pipe, table_of(pipe))
    ours = drive(pipe.transformer, call, ts)
    text = call["encoder_hidden_states"].clone()
    text[0, 2:], text[1, 3:] = 5.0, -5.0
    assert_all_same(drive(pipe.transformer, call | dict(encoder_hidden_states=text), ts), ours)


def test_several_pictures_of_each_prompt(pipe: Any) -> None:
    replayed = SIGMA.draw(replaying(pipe), num_images_per_prompt=2)
    enable(pipe, table_of(pipe))
    ours = SIGMA.draw(pipe, num_images_per_prompt=2)
    assert ours.shape[0] == 4
    assert relative_error(ours, replayed) < 1e-5


# ------------------------------------------------------------------------------------------------ resolutions


def test_resolution_and_aspect_ratio_are_conditions_of_their_own() -> None:
    pipe = ALPHA_1024.pipeline()
    ts, call = timesteps(pipe), ALPHA_1024.call(pipe)
    assert call["added_cond_kwargs"]["resolution"].tolist() == [[8, 8], [8, 8]]
    added = [
        call["added_cond_kwargs"],
        dict(resolution=torch.tensor([[8.0, 8], [512, 96]]), aspect_ratio=torch.tensor([[1.0], [0.2]])),
        dict(resolution=torch.tensor([[8.0, 8], [8, 8]]), aspect_ratio=torch.tensor([[1.0], [3.0]])),
    ]
    expected = [drive_replaying(pipe, call | dict(added_cond_kwargs=each), ts) for each in added]
    assert relative_error(expected[1][0][1], expected[0][0][1]) > 1e-3
    assert relative_error(expected[2][0][1], expected[0][0][1]) > 1e-3
    enable(pipe, table_of(pipe))
    for each, theirs in zip(added, expected, strict=True):
        assert_all_same(drive(pipe.transformer, call | dict(added_cond_kwargs=each), ts), theirs)
    with pytest.raises(ValueError, match=r"added_cond_kwargs|resolution"):  # what it says itself, or we do
        ask(pipe.transformer, call | dict(added_cond_kwargs=None), ts[0])


def test_binned_resolutions(pipe: Any) -> None:
    pipe.transformer = tiny_pixart(sample_size=32)
    pipe.vae_scale_factor = 8  # as of a VAE that halves thrice; latents are all that is asked for
    other = replaying(pipe)
    enable(pipe, table_of(pipe))
    for size in ((256, 256), (200, 350), (512, 512), (256, 256)):
        named = dict(height=size[0], width=size[1], use_resolution_binning=True)
        ours, theirs = (SIGMA.draw(one, rows=(2,), **named) for one in (pipe, other))
        assert relative_error(ours, theirs) < 1e-5
    assert not stats(pipe).originals


def test_captions_of_another_width_for_another_processor(pipe: Any) -> None:
    pipe.transformer = tiny_pixart(caption_channels=None, cross_attention_dim=TEXT_WIDTH, attention_head_dim=12)
    for block in pipe.transformer.transformer_blocks:
        block.attn2.set_processor(diffusers.models.attention_processor.AttnProcessor())
    replayed = SIGMA.draw(replaying(pipe))
    assert relative_error(SIGMA.draw(enable(pipe, table_of(pipe))), replayed) < 1e-5
    assert not stats(pipe).originals


# ------------------------------------------------------------------------------------------------ eps scaling


@pytest.mark.parametrize("kind", PIXARTS, ids=str)
@pytest.mark.parametrize("guidance_scale", [deep(1.0), 4.0])
def test_noise_is_scaled_once(kind: Kind, guidance_scale: float) -> None:
    pipe = kind.pipeline()
    replayed = kind.draw(replaying(pipe, eps_scale=0.8), guidance_scale=guidance_scale)
    assert relative_error(kind.draw(replaying(pipe), guidance_scale=guidance_scale), replayed) > 1e-3
    for named in (dict(eps_scale=0.8), dict(eps_scale=0.8, in_order=True)):
        enable(pipe, table_of(pipe), **named)
        assert relative_error(kind.draw(pipe, guidance_scale=guidance_scale), replayed) < 1e-5
    enable(pipe, table_of(pipe, eps_scale=0.8))
    assert relative_error(kind.draw(pipe, guidance_scale=guidance_scale), replayed) < 1e-5
    with pytest.raises(InputError, match=r"eps_scale=1\.2"):
        enable(pipe, table_of(pipe), eps_scale=1.2)


def test_the_variance_is_not_scaled(pipe: Any) -> None:
    ts, call, model = timesteps(pipe), SIGMA.call(pipe), pipe.transformer
    outs = []
    for b in (1.0, 0.5):
        enable(model, uncached(pipe), eps_scale=b)  # the module alone is enough: it predicts eps
        outs.append(ask(model, call, ts[0]))
    whole, half = outs
    assert torch.equal(half[:, 4:], whole[:, 4:])
    torch.testing.assert_close(half[:, :4], 0.5 * whole[:, :4])
    steps_of_its_own = dict(cross_attention_kwargs={"scale": 1.0})
    own = ask(model, call | steps_of_its_own, ts[0])
    assert relative_error(own, whole) < 1e-5  # and what the model itself answers is not scaled at all


# ------------------------------------------------------------------------------------------- the model's own


UNKNOWN_MASKS = {
    "bools for scores": masked((4, 2)).bool().unsqueeze(1),
    "one for each token of the latents": masked((4, 2)).unsqueeze(1).float() * torch.arange(16.0).view(1, 16, 1),
    "of four dimensions": masked((4, 2)).float().view(2, 1, 1, TEXT_LENGTH),
}


@pytest.mark.parametrize("name", UNKNOWN_MASKS)
def test_masks_that_the_method_does_not_know(pipe: Any, name: str) -> None:
    ts, call = timesteps(pipe), SIGMA.call(pipe) | dict(encoder_attention_mask=UNKNOWN_MASKS[name])
    plain = drive(pipe.transformer, call, ts)
    enable(pipe, table_of(pipe))
    assert all(map(torch.equal, drive(pipe.transformer, call, ts), plain))
    assert [*stats(pipe).originals.values()] == [STEPS]


def test_a_mask_that_is_too_short_is_refused_as_the_model_does(pipe: Any) -> None:
    call = SIGMA.call(pipe) | dict(encoder_attention_mask=masked((2, 2))[:, :1])
    enable(pipe, table_of(pipe))
    with pytest.raises(RuntimeError, match="size of tensor"):  # what it says itself
        ask(pipe.transformer, call, timesteps(pipe)[0])


def test_conditions_that_it_does_not_know_are_its_own_error(pipe: Any) -> None:
    ts, call = timesteps(pipe), SIGMA.call(pipe)
    replayed = drive_replaying(pipe, call, ts)
    enable(pipe, table_of(pipe))
    assert_all_same(drive(pipe.transformer, call | dict(added_cond_kwargs=None), ts), replayed)
    with pytest.raises(TypeError, match="sharpness"):  # what it says itself
        ask(pipe.transformer, call | dict(added_cond_kwargs={"sharpness": torch.ones(2, 1)}), ts[0])


def test_a_step_of_the_mlp_alone_computes_both_attentions(pipe: Any) -> None:
    types = (NO, MLP, MLP, NO, MLP)
    replayed = SIGMA.draw(replaying(pipe, by_timestep(pipe, types)))
    assert relative_error(SIGMA.draw(pipe), replayed) > 1e-3
    enable(pipe, table_of(pipe, types))
    assert relative_error(SIGMA.draw(pipe), replayed) < 1e-5
    assert stats(pipe).hits == 2 * 3


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "DPMSolverSinglestepScheduler"])
def test_other_samplers(pipe: Any, name: str) -> None:
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    replayed = SIGMA.draw(replaying(pipe))
    enable(pipe, table_of(pipe))
    assert relative_error(SIGMA.draw(pipe), replayed) < 3e-5  # their first step makes more of the last digits
    assert not stats(pipe).refreshed


def test_one_prompt_as_a_string(pipe: Any) -> None:
    named = by_prompt((0,)) | dict(prompt="the red dog", height=8, width=8, use_resolution_binning=False)
    drawn = []
    for one in (replaying(pipe), enable(pipe, table_of(pipe))):
        generator = torch.Generator().manual_seed(1)
        drawn.append(one(**named, num_inference_steps=STEPS, generator=generator).images)
    assert relative_error(drawn[1], drawn[0]) < 1e-5
