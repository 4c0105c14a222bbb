"""Sampling into files: what they hold, and that none is left where something fails."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_dit
from torch import Tensor

from ebcache_fast.apps import jobs as job
from ebcache_fast.apps import pictures
from ebcache_fast.apps.jobs import sample_into
from ebcache_fast.errors import InputError, JobError
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.sampling import sample

LABELS = [3, 0, 1]
TABLE = CacheTable([999, 500, 0], [0, 2, 0])
PIXELS = tiny_dit(dtype=torch.float32, in_channels=3)


def full_disk(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(archive: Path) -> np.ndarray:
    with np.load(archive, allow_pickle=False) as found:
        assert found.files == ["arr_0"]
        return found["arr_0"]


def test_pictures_become_an_archive_and_a_sheet(tmp_path: Path) -> None:
    written = sample_into(tmp_path / "new" / "out", PIXELS, LABELS, table=TABLE, seed=5, batch_size=2)
    folder = tmp_path / "new" / "out"
    assert written == [folder / "samples.npz", folder / "samples.png"]
    assert names(folder) == ["samples.npz", "samples.png"]
    images = sample(PIXELS, LABELS, table=TABLE, seed=5, batch_size=2)
    arr_0 = read(written[0])
    assert (arr_0.dtype, arr_0.shape) == (np.uint8, (3, 8, 8, 3))
    assert np.array_equal(arr_0, pictures.to_pixels(images).numpy())
    with Image.open(written[1]) as sheet:
        assert np.array_equal(np.asarray(sheet), np.asarray(pictures.grid(images, columns=3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_latents_become_an_archive_alone(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_dit(dtype=dtype)
    assert sample_into(tmp_path, model, LABELS, steps=2) == [tmp_path / "samples.npz"]
    assert names(tmp_path) == ["samples.npz"]
    arr_0 = read(tmp_path / "samples.npz")
    assert (arr_0.dtype, arr_0.shape) == (np.float32, (3, 4, 8, 8))
    assert np.array_equal(arr_0, sample(model, LABELS, steps=2).float().numpy())


def test_the_sheet_shows_the_first_104(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "sample", lambda model, labels: torch.zeros(len(labels), 3, 8, 8))
    archive, sheet = sample_into(tmp_path, PIXELS, [0] * 120)
    assert read(archive).shape[0] == 120
    with Image.open(sheet) as image:
        assert image.size == (13 * (16 + pictures.GAP) - pictures.GAP, 8 * (16 + pictures.GAP) - pictures.GAP)


def test_bad_arguments_leave_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="label 9 is outside"):
        sample_into(tmp_path, PIXELS, [0, 9], steps=2)
    assert names(tmp_path) == []


def test_an_unwritable_folder_is_found_before_any_sampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> NoReturn:
        raise AssertionError("sampled")

    monkeypatch.setattr(job, "sample", never)
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="file can't be made"):
        sample_into(tmp_path / "file", PIXELS, LABELS)


@pytest.mark.parametrize(
    ("writer", "name"), [("ebcache_fast.apps.jobs.np.savez", "samples.npz"), ("PIL.Image.Image.save", "samples.png")]
)
def test_a_full_disk_leaves_the_old_file(
    writer: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample_into(tmp_path, PIXELS, LABELS, steps=2)
    old = (tmp_path / name).read_bytes()
    monkeypatch.setattr(writer, full_disk)
    with pytest.raises(JobError, match=f"{name}: can't be written: No space left on device"):
        sample_into(tmp_path, PIXELS, LABELS, steps=2, seed=1)
    assert names(tmp_path) == ["samples.npz", "samples.png"]
    assert (tmp_path / name).read_bytes() == old


def test_samples_that_are_no_numbers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is good is kept; where nothing is, there is no file."""
    images = torch.zeros(3, 3, 8, 8)
    monkeypatch.setattr(job, "sample", lambda model, labels: images)
    images[1, 0, 3, 3] = float("inf")
    images[2, 0, 3, 3] = float("nan")
    with pytest.raises(
        JobError, match=r"^2 of 3 samples in .*samples\.npz are not finite, first 1: lower the guidance"
    ):
        sample_into(tmp_path, PIXELS, LABELS)
    assert names(tmp_path) == ["samples.npz", "samples.png"]
    images[0] = float("nan")
    with pytest.raises(JobError, match="all 3 samples are not finite; nothing is written"):
        sample_into(tmp_path / "new", PIXELS, LABELS)
    assert names(tmp_path / "new") == []


def test_progress_reaches_the_caller(tmp_path: Path) -> None:
    advanced: list[int] = []
    sample_into(tmp_path, PIXELS, LABELS, steps=2, batch_size=2, on_step=advanced.append)
    assert advanced == [2, 2, 1, 1]


def test_the_same_arguments_give_the_same_pictures(tmp_path: Path) -> None:
    def pixels(seed: int) -> Tensor:
        return torch.tensor(read(sample_into(tmp_path / str(seed), PIXELS, LABELS, steps=2, seed=seed)[0]))

    assert torch.equal(pixels(3), pixels(3))
    assert not torch.equal(pixels(3), pixels(4))
