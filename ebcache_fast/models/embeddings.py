"""Embeddings of a DiT, with the original's parameter names: patches, positions, timesteps and labels."""

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ebcache_fast.models.layers import weight_of

FREQUENCY_SIZE = 256
MAX_PERIOD = 10_000.0


def timestep_embedding(t: Tensor, size: int = FREQUENCY_SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    """Cosines, then sines, of ``t`` at ``size / 2`` geometric frequencies; t (N,) -> (N, size).

    Computed in float32, or in float64 for a float64 model: bfloat16 can't hold a timestep.
    """
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    half = size // 2
    exponent = torch.arange(half, dtype=precise, device=t.device) * (-math.log(MAX_PERIOD) / half)
    angle = t.to(precise).unsqueeze(1) * exponent.exp()  # (N, size / 2)
    return torch.cat([angle.cos(), angle.sin()], dim=1).to(dtype)  # (N, size)


def position_embedding(side: int, width: int) -> Tensor:
    """Sine-cosine embedding of a square grid of ``side * side`` tokens, row by row -> (1, T, D) float32.

    The first half of the channels encodes the column, the second the row, each as sines then cosines.
    """
    quarter = width // 4
    omega = MAX_PERIOD ** (-np.arange(quarter) / quarter)
    row, column = np.divmod(np.arange(side * side), side)
    angles = [np.outer(axis, omega) for axis in (column, row)]  # each (T, D / 4)
    table = np.concatenate([wave(angle) for angle in angles for wave in (np.sin, np.cos)], axis=1)
    return torch.tensor(table, dtype=torch.float32).unsqueeze(0)  # (1, T, D)


class PatchEmbed(nn.Module):
    """Images (N, C, H, W) to tokens (N, T, D), one linear map of each patch."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.proj(x)).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    """Timesteps (N,) to vectors (N, D)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return cast(Tensor, self.mlp(timestep_embedding(t, dtype=weight_of(self.mlp[0]).dtype)))


class LabelEmbedder(nn.Module):
    """Labels (N,) to vectors (N, D); in training some labels become the null label, for guidance.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (arXiv 2207.12598).
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
            y = torch.where(drop, self.num_classes, y)
        return cast(Tensor, self.embedding_table(y))
