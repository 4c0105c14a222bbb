"""The small convolutional classifier that judges the bundled letters: its features carry both Frechet distances."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LetterFeatures(NamedTuple):
    """Features of N images, at two depths, and their logits."""

    semantic: Tensor  # (N, 128): the last layer's input, which letter it is
    texture: Tensor  # (N, 64): mean and deviation of each early channel, what it is made of
    logits: Tensor  # (N, 26)


class LetterClassifier(nn.Module):
    """Images (N, 3, 24, 24) in [-1, 1] -> the letter, and features of two depths. 143,354 parameters."""

    def __init__(self, classes: int = 26) -> None:
        super().__init__()
        self.early = nn.Conv2d(3, 32, kernel_size=3, padding=1)
        widths = (32, 32, 64, 64, 128)
        strides = (2, 1, 2, 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=3, stride=stride, padding=1)
            for a, b, stride in zip(widths, widths[1:], strides, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.last = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> LetterFeatures:
        early = F.relu(self.early(images))  # (N, 32, 24, 24)
        texture = torch.cat([early.mean(dim=(2, 3)), early.flatten(2).std(dim=2)], dim=1)
        h = early
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            h = F.relu(norm(convolution(h)))
        semantic = h.mean(dim=(2, 3))  # (N, 128)
        return LetterFeatures(semantic, texture, self.last(semantic))
