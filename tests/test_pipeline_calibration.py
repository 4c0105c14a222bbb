"""``calibrate`` of pipelines: its trajectory is the pipeline's own, and its table fits the pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_kinds import COG_IMAGE, COG_VIDEO, Kind
from diffusers_oracle import replaying
from diffusers_tiny import (
    tiny_cogvideox_2b,
    tiny_cogvideox_5b,
    tiny_image_to_video,
    tiny_pipeline,
    tiny_pixart_alpha,
    tiny_pixart_sigma,
)
from tiny import relative_error
from torch import Tensor

from ebcache_fast import calibrate, enable, stats
from ebcache_fast.calibration import algorithm1, guided_run
from ebcache_fast.calibration import pipeline as pipeline_calibration
from ebcache_fast.calibration.capture_call import capture_call
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.samplers import trajectory_noise

diffusers = pytest.importorskip("diffusers")

STEPS = 6
PROMPTS = ["the red cat", "a small old house"]
PICTURE = dict(height=8, width=8, use_resolution_binning=False, clean_caption=False)
SIGMA = PICTURE | dict(max_sequence_length=6, negative_prompt="dog")
VIDEO = dict(height=16, width=16, num_frames=5, max_sequence_length=6)
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "PixArt-Sigma": (tiny_pixart_sigma, SIGMA),
    "PixArt-Alpha with sizes": (
        lambda: tiny_pixart_alpha(additional_conditions=True),
        PICTURE | dict(height=16),
    ),
    "CogVideoX-2b": (tiny_cogvideox_2b, VIDEO),
}


@pytest.fixture
def advanced(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The latents after each step of a calibration."""
    seen: list[Tensor] = []
    update = algorithm1.sampler_update

    def watched(*args: Any) -> Tensor:
        seen.append(update(*args))
        return seen[-1]

    for module in (algorithm1, guided_run):
        monkeypatch.setattr(module, "sampler_update", watched)
    return seen


@pytest.mark.parametrize("method", ["path", "algorithm1"])
@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize(("make", "call"), CASES.values(), ids=CASES)
def test_it_goes_the_way_of_the_pipeline(
    make: Callable[[], Any], call: dict[str, Any], scale: float, method: str, advanced: list[Tensor]
) -> None:
    pipe = make()
    calibrate(pipe, method=method, prompts=PROMPTS, call=call, steps=STEPS, cfg_scale=scale, seed=3, batch_size=2)
    last = advanced[STEPS - 1]
    shape = last.shape
    noise = trajectory_noise(3, range(shape[0]), 0, tuple(shape[1:]))[0]
    is_video = len(shape) == 5
    latents = noise.transpose(1, 2) if is_video else noise
    run = call | dict(num_inference_steps=STEPS, guidance_scale=scale, latents=latents, output_type="latent")
    run |= {"negative_prompt": [call["negative_prompt"]] * 2} if "negative_prompt" in call else {}
    drawn = pipe(prompt=PROMPTS, **run)
    drawn = drawn.frames.transpose(1, 2) if is_video else drawn.images
    assert relative_error(last, drawn) < 1e-5


@pytest.mark.parametrize(("make", "call"), [*CASES.values(), (tiny_cogvideox_5b, VIDEO)], ids=[*CASES, "CogVideoX-5b"])
def test_the_table_is_for_the_pipeline(make: Callable[[], Any], call: dict[str, Any]) -> None:
    pipe = make()
    table = calibrate(
        pipe, prompts=PROMPTS, call=call, steps=STEPS, algorithm=algorithm1.Algorithm1(a=9.0, k=9.0, max_run=1)
    )
    assert table.model == tuple(sorted(as_denoiser(pipe.transformer).shape.sizes))
    assert table.made is not None
    assert table.made.options["samples"] == len(PROMPTS)
    enable(pipe, table, strict=False)
    pipe(prompt=PROMPTS[0], num_inference_steps=STEPS, output_type="latent", **call)
    counted = stats(pipe)
    assert not counted.refreshed
    assert not counted.originals
    assert counted.steps["ATTN_MLP"] == sum(kind.name == "ATTN_MLP" for kind in table.step_types) > 0


@pytest.mark.parametrize(("make", "call"), [*CASES.values(), (tiny_cogvideox_5b, VIDEO)], ids=[*CASES, "CogVideoX-5b"])
def test_a_path_is_for_the_pipeline_too(make: Callable[[], Any], call: dict[str, Any]) -> None:
    """Its forecasts and corrections in the pipeline's own loop, of eps or of v, stay near what it draws without."""
    pipe = make()
    table = calibrate(pipe, prompts=PROMPTS, call=call, steps=STEPS, target_speedup=1.3)
    assert table.corrections

    def draw() -> Tensor:
        run = dict(num_inference_steps=STEPS, output_type="latent", generator=torch.Generator().manual_seed(0))
        drawn = pipe(prompt=PROMPTS[0], **run, **call)
        found: Tensor = drawn.frames if hasattr(drawn, "frames") else drawn.images
        return found

    uncached = draw()
    enable(pipe, table)
    assert 0 < relative_error(draw(), uncached) < 0.05
    counted = stats(pipe)
    assert not counted.refreshed
    assert not counted.originals
    assert counted.steps == {name: table.type_names.count(name) for name in dict.fromkeys(table.type_names)}


def test_labels_of_a_dit_pipeline() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False)
    table = calibrate(pipe, labels=[3, 7], samples=4, steps=STEPS)
    pipe.scheduler.set_timesteps(STEPS)
    assert list(table.timesteps) == pipe.scheduler.timesteps.tolist()
    assert table.made is not None
    assert table.made.options["cfg_scale"] == 4.0  # the pipeline's own
    assert table.made.options["guided_channels"] == 4
    assert table.made.options["samples"] == 4


def test_it_is_the_same_again_and_resumes_for_the_same_prompts_alone(tmp_path: Path) -> None:
    pipe, progress = tiny_pixart_sigma(), tmp_path / "progress.json"
    options = dict(call=SIGMA, steps=STEPS, progress_file=progress)
    first = calibrate(pipe, prompts=PROMPTS, **options)
    assert calibrate(pipe, prompts=PROMPTS, **options) == first
    with pytest.raises(Exception, match="progress"):
        calibrate(pipe, prompts=PROMPTS[::-1], **options)
    enable(pipe, first)
    assert calibrate(pipe, prompts=PROMPTS, call=SIGMA, steps=STEPS) == first
    assert stats(pipe).steps == {}
    pipe(prompt=PROMPTS[0], num_inference_steps=STEPS, output_type="latent", **SIGMA)
    assert sum(stats(pipe).steps.values()) == STEPS  # it is enabled still


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The prompts of each encoding."""
    seen: list[list[str]] = []

    def watched(pipe: Any, **arguments: Any) -> Any:
        seen.append(arguments["prompt"])
        return capture_call(pipe, **arguments)

    monkeypatch.setattr(pipeline_calibration, "capture_call", watched)
    return seen


def test_samples_take_the_prompts_in_turn_and_each_is_encoded_once(encoded: list[list[str]]) -> None:
    calibrate(tiny_pixart_sigma(), prompts=PROMPTS, call=SIGMA, steps=STEPS, samples=3)
    assert encoded == [[prompt] for prompt in PROMPTS]


def test_a_search_encodes_each_prompt_once(encoded: list[list[str]]) -> None:
    tight = algorithm1.Algorithm1(a=1e-5, k=1e-5)  # so that several thresholds are tried
    table = calibrate(
        tiny_pixart_sigma(), prompts=PROMPTS, call=SIGMA, steps=STEPS, target_speedup=1.3, algorithm=tight, batch_size=2
    )
    assert table.made is not None
    assert table.made.options["rounds"] > 2
    assert encoded == [PROMPTS]


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no prompts": (tiny_pixart_sigma, {}, "prompts=None must be a list of one or more for PixArtSigmaPipeline"),
    "one string": (tiny_pixart_sigma, {"prompts": "a cat"}, "prompts='a cat' must be a list"),
    "prompts for labels": (tiny_pipeline, {"prompts": ["a cat"], "steps": 2}, "DiTPipeline takes labels"),
    "a call for labels": (
        tiny_pipeline,
        {"labels": [1], "call": {"height": 8}, "steps": 2},
        "DiTPipeline takes labels",
    ),
    "a call for a module": (
        lambda: tiny_pipeline().transformer,
        {"call": {"height": 8}, "steps": 2},
        "pass its pipeline",
    ),
    "prompts for a module": (lambda: tiny_pipeline().transformer, {"prompts": ["a"], "steps": 2}, "pass its pipeline"),
    "more than latents": (
        tiny_image_to_video,
        {"prompts": ["a cat"], "call": VIDEO | {"image": torch.zeros(1, 3, 16, 16)}, "steps": 4},
        "more than latents, 8 channels for 4; calibrate the text-to-video pipeline",
    ),
    "less than no guidance": (
        tiny_pixart_sigma,
        {"prompts": ["a cat"], "call": SIGMA, "steps": 4, "cfg_scale": 0.5},
        "use 1 for no guidance or more than 1",
    ),
    "several pictures a prompt": (
        tiny_pixart_sigma,
        {"prompts": ["a cat"], "call": SIGMA | {"num_images_per_prompt": 2}, "steps": 4},
        "4 rows for 1 prompts",
    ),
    "steps in the call": (
        tiny_pixart_sigma,
        {"prompts": ["a cat"], "call": SIGMA | {"num_inference_steps": 4}},
        "call has num_inference_steps=4, which can't be chosen there; pass steps",
    ),
    "timesteps of one's own": (
        tiny_pixart_sigma,
        {"prompts": ["a cat"], "call": SIGMA | {"timesteps": [900, 500, 100]}, "steps": 3},
        "call has timesteps=.900, 500, 100., which can't be chosen there; the scheduler's are taken",
    ),
    "another sampler": (
        tiny_pixart_sigma,
        {"prompts": ["a cat"], "call": SIGMA, "sampler": "ddpm"},
        "sampler='ddpm' is decided by the PixArtSigmaPipeline; leave it out",
    ),
    "a module that follows a text": (
        lambda: tiny_cogvideox_2b().transformer,
        {"samples": 1, "steps": 8},
        "CogVideoXTransformer3DModel is given no text to follow here; use its pipeline",
    ),
    "attention arguments": (
        tiny_cogvideox_2b,
        {"prompts": ["a cat"], "call": VIDEO | {"attention_kwargs": {"scale": 0.5}}, "steps": 4},
        "in a way that the engine does not know; pass it no attention arguments",
    ),
}


@pytest.mark.parametrize(("make", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make: Callable[[], Any], options: dict[str, Any], message: str) -> None:
    pipe = make()
    if hasattr(pipe, "scheduler") and "Cog" not in type(pipe).__name__:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, clip_sample=False)
    with pytest.raises(InputError, match=message):
        calibrate(pipe, **options)


def test_a_scheduler_that_clips_is_refused() -> None:
    with pytest.raises(InputError, match="clip_sample=True of DDIMScheduler"):
        calibrate(tiny_pipeline(), labels=[1], steps=4)


@pytest.mark.parametrize(("make", "kind"), [(tiny_cogvideox_5b, COG_IMAGE), (tiny_cogvideox_2b, COG_VIDEO)])
def test_a_table_of_text_to_video_serves_the_other_two(make: Callable[[], Any], kind: Kind) -> None:
    """Bound to the model that it was made for: image-to-video has other channels in, and the same blocks."""
    often = algorithm1.Algorithm1(a=9.0, k=9.0, max_run=1)
    table = calibrate(make(), prompts=PROMPTS[:1], call=VIDEO, steps=STEPS, algorithm=often)
    assert table.model is not None
    pipe = kind.pipeline()
    expected = kind.draw(replaying(pipe, dict(zip(table.timesteps, table.step_types, strict=True))), steps=STEPS)
    assert relative_error(kind.draw(enable(pipe, table), steps=STEPS), expected) < 1e-5
    done = stats(pipe)
    assert not done.refreshed | done.originals
    assert done.steps == {"NO_CACHE": 4, "ATTN_MLP": 2}
