"""Sampling into files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ebcache_fast.apps import pictures
from ebcache_fast.errors import JobError
from ebcache_fast.plan.files import make_folder, replacing
from ebcache_fast.sampling import sample

GRID_COLUMNS, GRID_SAMPLES = 13, 104
OVERFLOW = "lower the guidance scale, or compute in float32"


def sample_into(folder: Path, model: nn.Module, labels: Sequence[int], **arguments: Any) -> list[Path]:
    """Sample N labels into ``folder/samples.npz`` and, for three-channel models, ``folder/samples.png``.

    The npz holds ``arr_0``, (N, H, W, 3) uint8, as the ADM evaluator reads it, or for a latent model the latents,
    (N, C, H, W) float32, which its VAE decodes. ``arguments`` are those of `ebcache_fast.sample`. Returns the files.
    Raises JobError before any sampling if the folder can't be written, and as `sample` does; JobError too where samples
    are not finite, after the files are written if any is.
    """
    make_folder(folder)
    latents = sample(model, labels, **arguments)
    finite = latents.isfinite().flatten(1).all(dim=1)  # (N,)
    if not finite.any():
        raise JobError(f"all {len(latents)} samples are not finite; nothing is written: {OVERFLOW}")
    archive = folder / "samples.npz"
    pixels = latents.shape[1] == 3
    arr_0 = pictures.to_pixels(latents.cpu()) if pixels else latents.float().cpu()
    with replacing(archive) as partial, partial.open("wb") as file:
        np.savez(file, arr_0=arr_0.numpy())
    written = [archive]
    if pixels:
        written.append(folder / "samples.png")
        pictures.save_picture(pictures.grid(latents[:GRID_SAMPLES].cpu(), min(GRID_COLUMNS, len(latents))), written[1])
    if not finite.all():
        count, first = int((~finite).sum()), int(finite.int().argmin())
        raise JobError(f"{count} of {len(latents)} samples in {archive} are not finite, first {first}: {OVERFLOW}")
    return written
