"""What a command would hold is held against what there is, before any of it is taken."""

import os
from pathlib import Path

import pytest
import torch
from tiny import tiny_dit

from ebcache_fast.apps import room
from ebcache_fast.apps.room import available_bytes, check_room, check_run, check_votes
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan, StepType

DENOISER = as_denoiser(tiny_dit(dtype=torch.float32))
LATENT = 4 * 4 * 8 * 8  # bytes of one: float32, four channels
CACHED = Plan.from_types([StepType.NO_CACHE, StepType.ATTN_MLP], (9, 0), DENOISER.shape.sites)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What the system says: a million bytes, more or less."""
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:  24683652 kB\nMemFree:  5 kB\nMemAvailable:   1000 kB\nHugePages_Total:       0\n")
    monkeypatch.setattr(room, "MEMINFO", path)
    return path


@pytest.mark.usefixtures("free")
def test_the_number_the_limit_and_the_remedy_are_named() -> None:
    check_room("samples", 1024, 1000, "do less")
    problem = r"^samples=1025 would hold 0\.0 GiB, and cpu has 0\.0 GiB free; ask for at most 1024: do less$"
    with pytest.raises(InputError, match=problem):
        check_room("samples", 1025, 1000, "do less")


@pytest.mark.usefixtures("free")
def test_samples_are_held_twice_by_each_method() -> None:
    for methods in (1, 3):
        most = 1_024_000 // (2 * methods * LATENT + room.OF_A_LABEL)
        check_run(DENOISER, most, 1, [CACHED] * methods, draws_noise=False, cfg_scale=1)
        with pytest.raises(InputError, match=f"samples={most + 1} would hold .* at most {most}: further runs"):
            check_run(DENOISER, most + 1, 1, [CACHED] * methods, draws_noise=False, cfg_scale=1)
    with pytest.raises(InputError, match="samples=1000000000000 would hold "):
        check_run(DENOISER, 10**12, 64, [CACHED], draws_noise=True, cfg_scale=4)


@pytest.mark.parametrize(
    ("draws", "cfg_scale", "rows", "noises"), [(True, 4.0, 2, 3), (True, 1.0, 1, 3), (False, 4.0, 2, 1)]
)
def test_a_batch_holds_its_caches_and_its_noise(
    draws: bool, cfg_scale: float, rows: int, noises: int, free: Path
) -> None:
    each = CACHED.cache_bytes(DENOISER.shape, rows, 4) + noises * LATENT
    free.write_text(f"MemAvailable: {-(-10 * each // 1024)} kB\n")
    check_run(DENOISER, 10, 10, [CACHED], draws_noise=draws, cfg_scale=cfg_scale)
    check_run(DENOISER, 10, 10**30, [CACHED], draws_noise=draws, cfg_scale=cfg_scale)  # no more run than there are
    with pytest.raises(InputError, match=r"batch size=12 would hold .*; ask for at most 10: batches run one by one"):
        check_run(DENOISER, 13, 12, [CACHED], draws_noise=draws, cfg_scale=cfg_scale)


@pytest.mark.usefixtures("free")
def test_a_calibration_holds_labels_and_three_caches() -> None:
    check_votes(DENOISER, 64, 64, 4, 4.0)
    for samples, batch, problem in (
        (10**12, 1, "samples=1000000000000 would hold"),
        (10**4, 10**4, "batch size=10000 would hold"),
    ):
        with pytest.raises(InputError, match=problem):
            check_votes(DENOISER, samples, batch, 4, 4.0)


def test_what_a_system_does_not_say_is_not_held_against_anybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = available_bytes(torch.device("cpu"))
    assert here is not None
    assert 2**20 < here < 2**50
    monkeypatch.setattr(room, "MEMINFO", tmp_path / "none")
    whole = available_bytes(torch.device("cpu"))
    assert whole is not None
    assert whole >= here // 2
    monkeypatch.delattr(os, "sysconf")
    assert available_bytes(torch.device("cpu")) is None
    check_room("samples", 10**30, 10**30, "do less")
