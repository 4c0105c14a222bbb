"""The bundled model: a DiT trained on rendered capital letters, with what is needed to judge it.

Made by bench/default_model; nothing here touches the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ebcache_fast.apps.quality import Features, Judge, Reference, contrast
from ebcache_fast.apps.quality.letter_classifier import LetterClassifier
from ebcache_fast.apps.room import MORE_RUNS, OF_A_LABEL, check_room
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import InputError
from ebcache_fast.models import DIT_MODELS, DiT, as_denoiser, load_pretrained
from ebcache_fast.models.checkpoint import load_dit, open_checkpoint
from ebcache_fast.models.pretrained import load_scheduler, stored_dtype
from ebcache_fast.plan import ModelShape
from ebcache_fast.samplers import sampler_of

LETTERS = ascii_uppercase
BUNDLED, DIFFUSERS = "letters", "diffusers"
LATENT_SCALE = 8  # of the autoencoder that the released DiTs work with
LARGEST_IMAGE, MOST_CLASSES = 4096, 1_000_000  # beyond, a slip of the pen would fill the memory with sizes alone
_FOLDER = "assets/letters"


@dataclass(frozen=True)
class Preset:
    """A trained model with its judge. ``real`` are pictures of the data, (M, 3, 24, 24) in [-1, 1]."""

    model: nn.Module
    judge: "LetterJudge"
    reference: Reference
    real: Tensor


class LetterJudge:
    """Pictures (N, 3, 24, 24) in [-1, 1] -> their Features, by the bundled classifier, in batches."""

    def __init__(self, classifier: LetterClassifier) -> None:
        self._classifier = classifier

    @torch.no_grad()
    def __call__(self, images: Tensor, /) -> Features:
        parts = [self._classifier(batch.float()) for batch in torch.split(images.clamp(-1, 1), 256)]
        semantic, texture, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return Features(semantic=semantic, texture=texture, logits=logits, contrast=contrast(images.clamp(-1, 1)))


def default_device() -> torch.device:
    """Device that the commands run a model on: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(name: str | None) -> torch.device:
    """The device of this name, or `default_device`; InputError where it is not here, or holds no values."""
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # each backend raises what it likes
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"device {name!r} can't be used here ({first:.200}); choose {default_device()}") from None
    return device


def load_letters(device: torch.device | None = None) -> Preset:
    """The bundled model, on ``device``, its classifier, the real data's statistics and some real pictures.

    None means the CPU, where all but the model always are.
    """
    with as_file(files("ebcache_fast") / _FOLDER) as folder:
        classifier = LetterClassifier()
        classifier.load_state_dict(load_file(folder / "classifier.safetensors"))
        real = load_file(folder / "real.safetensors")["images"]  # (M, 3, 24, 24) uint8
        return Preset(
            model=load_dit(folder / "model.safetensors").eval().to(device or "cpu"),
            judge=LetterJudge(classifier.eval().requires_grad_(False)),
            reference=Reference.load(folder / "reference.safetensors"),
            real=real.float() / 127.5 - 1,
        )


def letters_judge() -> Judge:
    """The judge of the bundled model's samples."""
    preset = load_letters()
    return Judge(preset.judge, preset.reference)


def labels_of(text: str) -> list[int]:
    """The labels of a text's letters; InputError unless it is made of A to Z."""
    unknown = "".join(letter for letter in text.upper() if letter not in LETTERS)
    if unknown:
        raise InputError(f"text {text!r} must be letters A to Z alone; leave out {unknown!r}")
    if not text:
        raise InputError("text '' is empty; give at least one letter, A to Z")
    return [LETTERS.index(letter) for letter in text.upper()]


def labels_in_turn(count: int, classes: int, labels: Sequence[int] = ()) -> list[int]:
    """Repeat these labels, or every class, in turn, to ``count`` labels in all.

    InputError for none, for more than fit into memory, and for a class that there is not.
    """
    if count < 1:
        raise InputError(f"{count} samples were asked for; ask for at least one")
    check_room("samples", count, OF_A_LABEL, MORE_RUNS)
    for label in labels:
        if not 0 <= label < classes:
            raise InputError(f"label {label} is outside [0, {classes - 1}]; this model has {classes} classes")
    turn = labels or range(classes)
    return [turn[i % len(turn)] for i in range(count)]


def shape_of(name: str, image_size: int, num_classes: int) -> ModelShape:
    """The sizes of a model as `open_model` names it, without its weights."""
    if name == BUNDLED:
        return as_denoiser(load_letters().model).shape
    with torch.device("meta"):
        return as_denoiser(_factory(name, image_size, num_classes)()).shape


def open_model(
    name: str,
    checkpoint: Path | None,
    image_size: int,
    num_classes: int,
    dtype: str | None = None,
    device: str | None = None,
) -> nn.Module:
    """The bundled model by its name, "letters", or an original DiT by its, with the weights of ``checkpoint``.

    Or "diffusers", whose ``checkpoint`` is a folder of a DiTTransformer2DModel or its pipeline. It lies on ``device``,
    by default the GPU if there is one, in ``dtype``, by default that of the weights. ``image_size`` is that of the
    decoded pictures: latents are an eighth of it. InputError for an unknown name or device, a missing checkpoint or one
    that does not fit.
    """
    place, kind = device_of(device), None if dtype is None else getattr(torch, dtype)
    if name == BUNDLED:
        if checkpoint is not None:
            raise InputError(f"model {name!r} has its own weights; leave out --ckpt, or say which --model it is of")
        return load_letters(place).model.to(kind)
    if name == DIFFUSERS:
        if checkpoint is None:
            raise InputError(f"model {name!r} needs its weights; pass --ckpt FOLDER, as save_pretrained writes it")
        return load_pretrained(checkpoint, torch_dtype=kind or stored_dtype(checkpoint)).to(place)
    factory = _factory(name, image_size, num_classes)
    if checkpoint is None:
        raise InputError(f"model {name!r} needs its weights; pass --ckpt FILE.pt or FILE.safetensors")
    return open_checkpoint(factory, checkpoint, place, kind)


def engine_options(model: nn.Module, *, fp8: bool) -> EngineOptions:
    """Options of the engine that runs a model for a command; InputError for fp8 that gains nothing or can't be."""
    denoiser = as_denoiser(model)
    if fp8 and denoiser.weight().device.type == "cpu":
        raise InputError("fp8=True on a CPU gains nothing; leave out --fp8, or choose --device cuda where a GPU is")
    options = EngineOptions(fp8=fp8)
    options.check(denoiser)
    return options


def folder_run(name: str, checkpoint: Path | None, model: nn.Module, steps: int) -> dict[str, Any]:
    """Arguments of `sample` that a folder of diffusers decides: ``sampler`` and ``guided_channels``; none without one.

    InputError, with the way out, for a scheduler that no sampler follows.
    """
    scheduler = load_scheduler(checkpoint) if name == DIFFUSERS and checkpoint is not None else None
    if scheduler is None:
        return {}
    try:
        followed = sampler_of(scheduler, steps)
    except InputError as error:
        raise InputError(
            f"the scheduler of {checkpoint}: {error}; save the folder with it, or pass --sampler ddim to leave it aside"
        ) from None
    return {"sampler": followed, "guided_channels": as_denoiser(model).latent_shape[0]}


def _factory(name: str, image_size: int, num_classes: int) -> Callable[[], DiT]:
    """The constructor of an original DiT, all arguments checked and bound."""
    if name == DIFFUSERS:
        raise InputError(f"model {name!r} has its sizes in its folder alone; name the original DiT of the same sizes")
    if name not in DIT_MODELS:
        raise InputError(f"model {name!r} is unknown; choose {BUNDLED}, {DIFFUSERS}, {', '.join(DIT_MODELS)}")
    if not 1 <= image_size <= LARGEST_IMAGE or image_size % LATENT_SCALE:
        raise InputError(
            f"image_size={image_size} is no multiple of {LATENT_SCALE} up to {LARGEST_IMAGE}; 256 and 512 are released"
        )
    if not 1 <= num_classes <= MOST_CLASSES:
        raise InputError(f"num_classes={num_classes} is outside [1, {MOST_CLASSES}]; ImageNet has 1000")
    return partial(DIT_MODELS[name], input_size=image_size // LATENT_SCALE, num_classes=num_classes)
