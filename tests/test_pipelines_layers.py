"""What users do to a pipeline's layers, before it is enabled or after: the method, or the model's own answer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_kinds import COG_2B, DIT, SIGMA, THREE, Kind, table_of
from diffusers_oracle import bare, fate, nothing
from torch import Tensor, nn

from ebcache_fast import disable, enable, stats

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

Change = Callable[[Any], object]
HONEST = {"refused", "cached", "counted"}
both_models = pytest.mark.parametrize("kind", [SIGMA, COG_2B], ids=str)


class Reversed:
    """A processor of attention of another meaning: it attends to tokens from behind, by position."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return attn.to_out[0](attn.to_v(hidden_states).flip(1))


SameName = type("AttnProcessor2_0", (Reversed,), {})


class BothReversed:
    """The same of film and text."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        *_: Any,
        image_rotary_emb: Any = None,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        film, text = (Reversed()(attn, one) for one in (hidden_states, encoder_hidden_states))
        return film, text


def reverse(pipe: Any) -> None:
    is_film = hasattr(pipe.transformer, "enable_cache")
    pipe.transformer.transformer_blocks[1].attn1.set_processor(BothReversed() if is_film else Reversed())


class Doubled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **named: Any) -> Any:
        out = self.inner(*args, **named)
        return tuple(2 * one for one in out) if isinstance(out, tuple) else 2 * out


def twice(path: str) -> Change:
    """A hook that doubles what a module returns."""

    def hook(_: Any, args: Any, out: Any) -> Any:
        return tuple(2 * one for one in out) if isinstance(out, tuple) else 2 * out

    return lambda pipe: pipe.transformer.get_submodule(path).register_forward_hook(hook)


def replaced(path: str) -> Change:
    def change(pipe: Any) -> None:
        owner, _, name = path.rpartition(".")
        pipe.transformer.get_submodule(owner)._modules[name] = Doubled(pipe.transformer.get_submodule(path))

    return change


def of_another_class(pipe: Any) -> None:
    """As token merging does it."""
    block = pipe.transformer.transformer_blocks[0]

    class Twice(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **named: Any) -> Tensor:
            return 2 * super().forward(*args, **named)

    block.__class__ = Twice


def without_projections(pipe: Any) -> None:
    class Flipped(nn.Module):
        def forward(self, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
            return hidden_states.flip(1)

    pipe.transformer.transformer_blocks[0].attn1 = Flipped()


def having(path: str, **attributes: Any) -> Change:
    return lambda pipe: vars(pipe.transformer.get_submodule(path)).update(attributes)


def with_a_layer_twice(pipe: Any) -> None:
    pipe.transformer.transformer_blocks.append(pipe.transformer.transformer_blocks[0])


def with_layers_reversed(pipe: Any) -> None:
    pipe.transformer.transformer_blocks = nn.ModuleList(reversed(pipe.transformer.transformer_blocks))


BLOCK = "transformer_blocks.0"
CHANGES: dict[str, Change] = {
    "a processor": reverse,
    "fused projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "gradient checkpointing": lambda pipe: pipe.transformer.enable_gradient_checkpointing(),
    "a layer twice": with_a_layer_twice,
    "layers reversed": with_layers_reversed,
    **{f"a hook on {path or 'the whole'}": twice(path) for path in ("", BLOCK, f"{BLOCK}.attn1", f"{BLOCK}.norm1")},
    **{f"another {path}": replaced(path) for path in (BLOCK, f"{BLOCK}.attn1", f"{BLOCK}.norm2", "norm_out")},
}  # fmt: skip
OF_ONE: dict[str, tuple[Kind, Change]] = {
    **{
        f"{kind}, {change.__name__}": (kind, change)
        for kind in (DIT, SIGMA)
        for change in (of_another_class, without_projections)
    },
    "DiT, a layer twice": (DIT, with_a_layer_twice),
    "PixArt, the default processor": (SIGMA, lambda pipe: pipe.transformer.set_default_attn_processor()),
    "PixArt, a processor of the text": (
        SIGMA, lambda pipe: pipe.transformer.transformer_blocks[0].attn2.set_processor(Reversed())
    ),
    **{
        f"PixArt, a hook on {path}": (SIGMA, twice(path))
        for path in ("pos_embed", "adaln_single", "adaln_single.linear", "caption_projection", f"{BLOCK}.attn2",
                     f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff", "proj_out", f"{BLOCK}.attn1.to_out.1", f"{BLOCK}.ff.net.0",
                     f"{BLOCK}.ff.net.1")
    },
    "PixArt, perturbed attention": (SIGMA, lambda pipe: pipe.transformer.transformer_blocks[0].attn1.set_processor(
        diffusers.models.attention_processor.PAGIdentitySelfAttnProcessor2_0()
    )),
    "PixArt, a processor of a known name": (SIGMA, having(f"{BLOCK}.attn1", processor=SameName())),
    "PixArt, a residual around attention": (SIGMA, having(f"{BLOCK}.attn1", residual_connection=True)),
    "PixArt, attention in another scale": (SIGMA, having(f"{BLOCK}.attn1", rescale_output_factor=2.0)),
    "PixArt, an exact GELU": (SIGMA, having(f"{BLOCK}.ff.net.0", approximate="none")),
    "PixArt, another dropout": (SIGMA, replaced(f"{BLOCK}.ff.net.1")),
    "CogVideoX, another dropout at the end": (COG_2B, replaced(f"{BLOCK}.ff.net.3")),
    **{
        f"CogVideoX, a hook on {path}": (COG_2B, twice(path))
        for path in ("patch_embed", "time_proj", "norm_final", "norm_out.linear", "embedding_dropout",
                     f"{BLOCK}.norm1.linear", f"{BLOCK}.attn1.norm_q", f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff")
    },
}  # fmt: skip


NOT_OF_DIT = {"fused projections", f"another {BLOCK}", f"another {BLOCK}.norm2"}  # which it does not have, or reads


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        pytest.param(kind, change, id=f"{kind}, {name}")
        for kind in THREE
        for name, change in CHANGES.items()
        if kind is not DIT or name not in NOT_OF_DIT
    ],
)
def test_whatever_was_done_to_it_the_answer_is_the_methods_or_its_own(kind: Kind, change: Change) -> None:
    assert fate(*bare(kind), change, nothing) in HONEST
    assert fate(*bare(kind), nothing, change) in {"cached", "counted"}


@pytest.mark.parametrize(("kind", "change"), OF_ONE.values(), ids=OF_ONE)
def test_whatever_was_done_to_layers_of_its_own(kind: Kind, change: Change) -> None:
    assert fate(*bare(kind), nothing, change) in {"cached", "counted"}


@pytest.mark.parametrize("kind", THREE, ids=str)
def test_the_default_way_is_cached(kind: Kind) -> None:
    assert fate(*bare(kind), nothing, nothing) == "cached"


@both_models
def test_checkpointing_with_gradients_is_the_models_own(kind: Kind, pipe: Any) -> None:
    model, call = pipe.transformer, kind.call(pipe)
    model.enable_gradient_checkpointing()
    enable(model, table_of(pipe))
    model(**call)[0].sum().backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert stats(model).originals == {"gradients are recorded": 1}
    disable(model).zero_grad()
    model(**call)[0].sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (ours[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, ours[name])
