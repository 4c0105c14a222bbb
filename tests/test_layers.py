"""When embedding and head may be computed from their weights alone, by the fused operations."""

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import pytest
import torch
from diffusers_tiny import tiny_cogvideox, tiny_pixart, tiny_transformer
from tiny import tiny_dit
from torch import nn

from ebcache_fast.models import as_denoiser

pytest.importorskip("diffusers")

# Each model, and where it has its embedding and its head.
MODELS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "DiT": (tiny_dit, "x_embedder", "final_layer.linear"),
    "DiTTransformer2DModel": (tiny_transformer, "pos_embed", "proj_out_2"),
    "PixArt": (tiny_pixart, "pos_embed", "proj_out"),
    "CogVideoX": (tiny_cogvideox, "patch_embed", "proj_out"),
}
Change = Callable[[Any, Any], object]  # of the embedding and the head

CHANGES: dict[str, Change] = {
    "a norm after the patches": lambda embed, head: setattr(embed, "norm", nn.LayerNorm(16)),
    "positions cut out of larger ones": lambda embed, head: setattr(embed, "pos_embed_max_size", 8),
    "patches that stay a picture": lambda embed, head: setattr(embed, "flatten", False),
    "patches that overlap": lambda embed, head: setattr(embed.proj, "padding", (1, 1)),
    "patches in another dtype": lambda embed, head: embed.proj.to(torch.bfloat16),
    "a head in another dtype": lambda embed, head: head.to(torch.bfloat16),
    "a hook on the embedding": lambda embed, head: embed.register_forward_hook(lambda *_: None),
    "a hook on the head": lambda embed, head: head.register_forward_hook(lambda *_: None),
    "a head without a bias": lambda embed, head: setattr(head, "bias", None),
}


@pytest.fixture(params=MODELS)
def parts(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """A model, its embedding and its head."""
    make, embed, head = MODELS[request.param]
    return (model := make()), attrgetter(embed)(model), attrgetter(head)(model)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_ends_are_plain_until_they_do_more_than_their_weights_say(parts: tuple[Any, Any, Any], change: Change) -> None:
    model, embed, head = parts
    assert as_denoiser(model).has_plain_embed_head
    change(embed, head)
    assert not as_denoiser(model).has_plain_embed_head


@pytest.mark.parametrize(("make", "owner", "name", "plain"), [
    (tiny_dit, "", "pos_embed", False),
    (tiny_transformer, "pos_embed", "pos_embed", False),
    (tiny_pixart, "pos_embed", "pos_embed", True),  # copied in the model's dtype
    (tiny_cogvideox, "patch_embed", "pos_embedding", True),
])  # fmt: skip
def test_positions_that_are_read_as_they_are_have_the_dtype_of_the_weights(
    make: Callable[[], Any], owner: str, name: str, plain: bool
) -> None:
    model = make()
    positions = getattr(model.get_submodule(owner), name)
    positions.data = positions.data.to(torch.bfloat16)
    assert as_denoiser(model).has_plain_embed_head is plain
