"""Tiny models for checkpoints, and what a refusal must be."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.modules import DiT

StateDict = dict[str, Tensor]


def build(seed: int = 0, **changes: Any) -> DiT:
    """A tiny DiT with random values everywhere."""
    sizes: dict[str, Any] = dict(input_size=4, in_channels=3, hidden_size=8, depth=2, num_heads=2, num_classes=5)
    model = DiT(**sizes | changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def state_of(model: nn.Module) -> StateDict:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(a: StateDict, b: StateDict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The message of the InputError that the call raises: one line, with a remedy."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert re.search(r"; (pass|rename|choose|correct|use) ", message)
    return message
