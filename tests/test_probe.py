"""Why a model can't be enabled: what its own forward said, or how far its parts are from it."""

import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from diffusers_kinds import COG_2B, SIGMA, Kind, table_of
from diffusers_oracle import replaying
from dropin import drive, fresh_model, latents, plan_of
from tiny import relative_error
from torch import Tensor, nn

from ebcache_fast import enable, stats
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT
from ebcache_fast.models.embeddings import TimestepEmbedder


class InFloat32(TimestepEmbedder):
    """Cosines and sines stay in float32, whatever the layers are in: as in the original's code."""

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float()[:, None] * torch.exp(torch.arange(128) * (-math.log(10_000) / 128))
        out: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        return out


class Louder(DiT):
    """Another function of the same parts."""

    factor = 1.5

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.factor * super().forward(x, t, y)


class Fewer(DiT):
    """Without the variance's channels."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)[:, :4]


class Guarded(DiT):
    """A forward that goes around a layer which is not whole."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.zeros(len(x), 8, *x.shape[2:], dtype=x.dtype)


class Counted(DiT):
    """As usual, and counted."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        Counted.calls += 1
        return super().forward(x, t, y)


def refusal(model: nn.Module) -> str:
    with pytest.raises(InputError) as refused:
        enable(model, plan_of())
    assert "\n" not in str(refused.value)
    assert "_cached_forward" not in vars(model)
    return str(refused.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_models_own_error_is_quoted(dtype: torch.dtype) -> None:
    model = fresh_model(dtype=torch.float32)
    model.t_embedder.__class__ = InFloat32
    enable(model, plan_of())
    half = fresh_model(dtype=torch.float32).to(dtype)
    half.t_embedder.__class__ = InFloat32
    said = refusal(half)
    assert f"DiT can't be tried on a batch of x (2, 4, 8, 8) in {dtype}: its own forward" in said
    assert "RuntimeError: mat1 and mat2 must have the same dtype" in said
    assert "convert it to a dtype that it runs in" in said


def test_an_error_that_says_nothing_is_named() -> None:
    model = fresh_model()
    model.register_forward_pre_hook(Mock(side_effect=NotImplementedError))
    assert "hooks included, raised NotImplementedError; call it so" in refusal(model)


def test_a_hooks_error_is_quoted() -> None:
    model = fresh_model()

    def hook(*_: Any) -> None:
        raise LookupError("no such\nlayer")

    model.blocks[1].attn.register_forward_hook(hook)
    assert "its own forward, hooks included, raised LookupError: no such; call" in refusal(model)


@pytest.mark.parametrize(("kind", "said"), [
    (Louder, "they differ by 3.3e-01 of the largest output, above 1e-09; pass"),
    (Fewer, "it returned (2, 4, 8, 8) in torch.float64, where its parts return (2, 8, 8, 8) in torch.float64; pass"),
])  # fmt: skip
def test_a_difference_is_said_with_its_size(kind: type[DiT], said: str) -> None:
    model = fresh_model()
    model.__class__ = kind
    assert said in refusal(model)


def test_parts_that_do_not_fit_together_are_said() -> None:
    model = fresh_model()
    model.__class__ = Guarded
    model.blocks[1].mlp.fc1 = nn.Linear(7, 64, dtype=torch.float64)
    assert "its parts, run one by one, raised RuntimeError: mat1 and mat2 shapes cannot be multiplied" in refusal(model)
    del model.blocks[1].norm1
    assert "'blocks.1.norm1' is a NoneType" in refusal(model)


def test_a_model_is_tried_when_it_is_enabled_and_not_again_at_its_first_call() -> None:
    model = fresh_model()
    model.__class__ = Counted
    enable(model, plan_of())
    tried = Counted.calls
    assert tried > 0
    drive(model, latents(model))
    assert Counted.calls == tried
    assert not stats(model).originals


def test_guesses_of_a_guided_method_raise_nothing() -> None:
    model = fresh_model()
    vars(model)["forward_with_cfg"] = lambda *_: 1 / 0
    enable(model, plan_of())
    assert "forward_with_cfg" not in vars(model)["_cached_forward"].signature.methods


@pytest.mark.parametrize(("kind", "tokens"), [(SIGMA, 16), (COG_2B, 54)], ids=str)
def test_a_model_that_takes_no_batch_so_small_is_tried_at_its_own_size(kind: Kind, tokens: int) -> None:
    """A feed-forward in chunks divides the tokens at the size that it is used at."""
    pipe = kind.pipeline()
    for block in pipe.transformer.transformer_blocks:
        if hasattr(block, "set_chunk_feed_forward"):
            block.set_chunk_feed_forward(tokens, 1)
        else:
            block.ff.register_forward_pre_hook(only_of(tokens))
    replayed = kind.draw(replaying(pipe))
    assert relative_error(kind.draw(enable(pipe, table_of(pipe))), replayed) < 1e-5
    assert not stats(pipe).originals
    pipe.transformer.proj_out.register_forward_pre_hook(only_of(tokens + 1))
    with pytest.raises(InputError, match=r"own forward, hooks included, raised ValueError: \d+ tokens"):
        enable(pipe, table_of(pipe))


def only_of(tokens: int) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[1] % tokens:
            raise ValueError(f"{args[0].shape[1]} tokens are not divisible by {tokens}")

    return hook


class InThirds(DiT):
    """A batch of as many perturbed rows as conditional and unconditional ones, as perturbed guidance has it."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        unconditional, conditional, perturbed = super().forward(x, t, y).chunk(3)
        return torch.cat([unconditional, conditional, perturbed])


def test_a_batch_that_is_cut_into_thirds_is_tried_in_sixes() -> None:
    model, plan = fresh_model(), plan_of(eps_scale=1.0)
    model.__class__ = InThirds
    x, t, y = torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.full((3,), plan.timesteps[0]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        own = model(x, t, y)
        assert relative_error(enable(model, plan)(x, t, y), own) < 1e-12
    assert not stats(model).originals
