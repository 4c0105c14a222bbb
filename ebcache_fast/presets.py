"""The bundled model: a DiT trained on rendered capital letters, with what is needed to judge it.

Made by bench/default_model; nothing here touches the network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from string import ascii_uppercase

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models import DIT_MODELS, DiT, as_denoiser, load_pretrained
from ebcache_fast.models.checkpoint import load_checkpoint, load_dit
from ebcache_fast.models.letter_classifier import LetterClassifier
from ebcache_fast.plan import ModelShape
from ebcache_fast.quality import Features, Judge, Reference, contrast

LETTERS = ascii_uppercase
BUNDLED, DIFFUSERS = "letters", "diffusers"
LATENT_SCALE = 8  # of the autoencoder that the released DiTs work with
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
    """Where the commands run a model: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    """Who judges the bundled model's samples."""
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


def labels_in_turn(count: int, classes: int, chosen: Sequence[int] = ()) -> list[int]:
    """The chosen classes, or every class, in turn, over and over, ``count`` labels in all; InputError for none."""
    if count < 1:
        raise InputError(f"{count} samples were asked for; ask for at least one")
    turn = chosen or range(classes)
    return [turn[i % len(turn)] for i in range(count)]


def shape_of(name: str, image_size: int, num_classes: int) -> ModelShape:
    """The sizes of a model as `open_model` names it, without its weights."""
    if name == BUNDLED:
        return as_denoiser(load_letters().model).shape
    with torch.device("meta"):
        return as_denoiser(_factory(name, image_size, num_classes)()).shape


def open_model(name: str, checkpoint: Path | None, image_size: int, num_classes: int) -> nn.Module:
    """The bundled model by its name, "letters", or an original DiT by its, with the weights of ``checkpoint``.

    Or "diffusers", whose ``checkpoint`` is a folder of a DiTTransformer2DModel or its pipeline. It lies on
    `default_device`. ``image_size`` is that of the decoded pictures: latents are an eighth of it.
    InputError for an unknown name, a missing checkpoint or one that does not fit.
    """
    if name == BUNDLED:
        if checkpoint is not None:
            raise InputError(f"model {name!r} has its own weights; leave out --ckpt, or say which --model it is of")
        return load_letters(default_device()).model
    if name == DIFFUSERS:
        if checkpoint is None:
            raise InputError(f"model {name!r} needs its weights; pass --ckpt FOLDER, as save_pretrained writes it")
        return load_pretrained(checkpoint).to(default_device())
    factory = _factory(name, image_size, num_classes)
    if checkpoint is None:
        raise InputError(f"model {name!r} needs its weights; pass --ckpt FILE.pt or FILE.safetensors")
    with torch.device("meta"):  # no time is spent on values that the file will replace
        model = factory()
    model.to_empty(device=default_device())
    load_checkpoint(model, checkpoint)
    return model.eval()


def _factory(name: str, image_size: int, num_classes: int) -> Callable[[], DiT]:
    """The constructor of an original DiT, all arguments checked and bound."""
    if name == DIFFUSERS:
        raise InputError(f"model {name!r} has its sizes in its folder alone; name the original DiT of the same sizes")
    if name not in DIT_MODELS:
        raise InputError(f"model {name!r} is unknown; choose {BUNDLED}, {DIFFUSERS}, {', '.join(DIT_MODELS)}")
    if image_size < 1 or image_size % LATENT_SCALE:
        raise InputError(f"image_size={image_size} is no multiple of {LATENT_SCALE}; the released ones are 256 and 512")
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes} is below 1; ImageNet has 1000")
    return partial(DIT_MODELS[name], input_size=image_size // LATENT_SCALE, num_classes=num_classes)
