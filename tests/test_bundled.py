"""The bundled model and its judge, and models by name. How good the model is, bench/default_model measures."""

from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from tiny import CLASSES, SIZES, tiny_dit

from ebcache_fast.apps import bundled as presets
from ebcache_fast.apps.bundled import labels_in_turn, labels_of, load_letters, open_model, shape_of
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT, as_denoiser, save_weights

TINY = "DiT-tiny"
MODELS: Mapping[str, partial[DiT]] = {TINY: partial(DiT, **SIZES)}


@pytest.fixture(scope="module")
def letters() -> presets.Preset:
    return load_letters()


@pytest.fixture
def tiny_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "DIT_MODELS", MODELS)


# ------------------------------------------------------------------------------------------------ the bundle


def test_the_bundled_model_draws_capitals_in_colour(letters: presets.Preset) -> None:
    denoiser = as_denoiser(letters.model)
    assert denoiser.num_classes == len(presets.LETTERS) == 26
    assert denoiser.has_null_label  # for guidance
    assert denoiser.latent_shape == (3, 24, 24)
    assert not letters.model.training
    assert {p.dtype for p in letters.model.parameters()} == {torch.float32}


def test_real_pictures_come_with_it(letters: presets.Preset) -> None:
    assert letters.real.shape[1:] == (3, 24, 24)
    assert len(letters.real) >= 100
    assert -1 <= letters.real.min() < -0.5
    assert 0.5 < letters.real.max() <= 1


def test_the_judge_fits_the_reference(letters: presets.Preset) -> None:
    features = letters.judge(letters.real[:9])
    assert features.semantic.shape == (9, len(letters.reference.semantic.mean))
    assert features.texture.shape == (9, len(letters.reference.texture.mean))
    assert features.logits.shape == (9, 26)
    assert not features.logits.requires_grad


def test_the_judge_works_in_batches(letters: presets.Preset) -> None:
    """300 pictures are two batches; the last picture's features are those it has by itself."""
    images = letters.real[:1].repeat(300, 1, 1, 1)
    images[-1] = letters.real[1]
    many, alone = letters.judge(images), letters.judge(images[-1:])
    for name in ("semantic", "texture", "logits", "contrast"):
        assert len(getattr(many, name)) == 300
        torch.testing.assert_close(getattr(many, name)[-1:], getattr(alone, name), rtol=1e-4, atol=1e-4)


def test_the_judge_sees_what_a_picture_file_holds(letters: presets.Preset) -> None:
    """Overshoot beyond [-1, 1] is clipped before it is judged, and other dtypes are taken."""
    images = letters.real[:4] * 1.7
    judged, clipped = letters.judge(images.double()), letters.judge(images.clamp(-1, 1))
    for name in ("semantic", "texture", "logits"):
        assert torch.equal(getattr(judged, name), getattr(clipped, name))
    torch.testing.assert_close(judged.contrast, clipped.contrast)


def test_the_bundle_is_small() -> None:
    folder = Path(str(files("ebcache_fast") / "assets" / "letters"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6


# ---------------------------------------------------------------------------------------------------- labels


def test_labels_of_a_text() -> None:
    assert labels_of("HELLO") == [7, 4, 11, 11, 14]
    assert labels_of("az") == [0, 25]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("A1B2", "text 'A1B2' must be letters A to Z alone; leave out '12'"),
        ("HELLO WORLD", "leave out ' '"),
        ("É", "leave out 'É'"),
        ("", "text '' is empty; give at least one letter, A to Z"),
    ],
)
def test_other_texts_are_refused(text: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        labels_of(text)


def test_labels_in_turn() -> None:
    assert labels_in_turn(7, 3) == [0, 1, 2, 0, 1, 2, 0]
    for count in (0, -1):
        with pytest.raises(InputError, match=f"{count} samples were asked for; ask for at least one"):
            labels_in_turn(count, 3)


# -------------------------------------------------------------------------------------------- models by name


def test_the_bundled_model_by_name(letters: presets.Preset) -> None:
    model = open_model("letters", None, 256, 1000)
    ours, theirs = model.state_dict(), letters.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert shape_of("letters", 256, 1000) == as_denoiser(letters.model).shape


@pytest.mark.usefixtures("tiny_by_name")
def test_an_original_by_name_with_its_weights(tmp_path: Path) -> None:
    trained = tiny_dit(3, torch.float32)
    save_weights(trained, tmp_path / "tiny.safetensors")
    model = open_model(TINY, tmp_path / "tiny.safetensors", 64, CLASSES)
    assert isinstance(model, DiT)
    assert not model.training
    assert as_denoiser(model).latent_shape == (4, 8, 8)  # an eighth of the picture
    ours, theirs = model.state_dict(), trained.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert shape_of(TINY, 64, CLASSES) == as_denoiser(model).shape


@pytest.mark.usefixtures("tiny_by_name")
@pytest.mark.parametrize(
    ("name", "checkpoint", "image_size", "num_classes", "problem"),
    [
        ("nope", None, 64, CLASSES, f"model 'nope' is unknown; choose letters, diffusers, {TINY}"),
        (TINY, None, 64, CLASSES, f"model '{TINY}' needs its weights; pass --ckpt"),
        (TINY, "a.pt", 100, CLASSES, "image_size=100 is no multiple of 8"),
        (TINY, "a.pt", 0, CLASSES, "image_size=0 is no multiple of 8"),
        (TINY, "a.pt", 8, CLASSES, "input_size 1 is not a multiple of 4"),
        (TINY, "a.pt", 64, 0, "num_classes=0 is outside"),
        (TINY, "missing.pt", 64, CLASSES, "missing.pt can't be read"),
        ("letters", "a.pt", 64, CLASSES, "model 'letters' has its own weights; leave out --ckpt"),
    ],
)
def test_what_can_t_be_opened(
    name: str, checkpoint: str | None, image_size: int, num_classes: int, problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        open_model(name, None if checkpoint is None else Path(checkpoint), image_size, num_classes)


@pytest.mark.usefixtures("tiny_by_name")
def test_sizes_of_an_unknown_model() -> None:
    with pytest.raises(InputError, match="model 'nope' is unknown"):
        shape_of("nope", 64, CLASSES)


def test_the_names_are_those_of_the_originals() -> None:
    with pytest.raises(InputError, match=r"choose letters, diffusers, DiT-XL/2, .*DiT-S/8"):
        open_model("DiT-XL", None, 256, 1000)
