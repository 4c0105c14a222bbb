"""diffusers' DiT as the engine sees it: its parts against its forward, with whatever users do to its layers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_tiny import tiny_transformer
from tiny import relative_error, tiny_dit
from torch import Tensor, nn

from bench.rivals.case import Case
from bench.rivals.diffusers_dit import transformer
from ebcache_fast import sample
from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Batch, Engine
from ebcache_fast.engine.graphs import no_graphs
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiffusersDiTDenoiser, DiTDenoiser, as_denoiser
from ebcache_fast.models.layers import linear_into
from ebcache_fast.ops import operations as ops
from ebcache_fast.plan import Branch, Plan, StepType, layered

pytest.importorskip("diffusers")

BRANCHES = Branch.SELF_ATTN, Branch.MLP
Change = Callable[[Any], object]


def tiny(dtype: torch.dtype = torch.float64, **sizes: Any) -> Any:
    return tiny_transformer(**(dict(num_embeds_ada_norm=5) | sizes)).requires_grad_(False).to(dtype)


def inputs(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = as_denoiser(model).latent_shape
    return torch.randn(3, *shape, generator=generator).to(model.dtype), torch.tensor([930] * 3), torch.tensor([0, 5, 2])


@torch.no_grad()
def run(model: Any, operations: ops.Operations | None = None) -> Tensor:
    """One uncached step of the engine, without guidance."""
    x, t, y = inputs(model)
    engine = Engine(model, operations=operations, make_graphs=no_graphs)
    plan = Plan.uncached([int(t[0])], engine.denoiser.shape.sites)
    return engine.forward_run(plan, Batch(y, len(y), 0, tuple(x.shape[1:])), Tail()).predict(0, x)


@torch.no_grad()
def own(model: Any) -> Tensor:
    x, t, y = inputs(model)
    out: Tensor = model(x, timestep=t, class_labels=y).sample
    return out


class Doubled(nn.Module):
    """An adapter around a layer, of the layer's sizes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        sizes = "in_features", "out_features", "in_channels", "kernel_size"
        vars(self).update({name: getattr(inner, name) for name in sizes if hasattr(inner, name)})

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return 2 * self.inner(x, *others)


class Reversed:
    """A processor of attention of another meaning: it attends to tokens from behind, by position."""

    def __call__(self, attn: Any, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        return attn.to_out[0](attn.to_v(hidden_states).flip(1))


def doubled(output_of: str) -> Change:
    """A hook that doubles what a module returns."""
    return lambda model: model.get_submodule(output_of).register_forward_hook(lambda module, args, out: 2 * out)


def wrap(path: str) -> Change:
    def change(model: Any) -> None:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, Doubled(model.get_submodule(path)))

    return change


FIRST = "transformer_blocks.0"
CHANGES: dict[str, Change] = {
    "as it is": lambda model: None,
    "the original's frequencies": lambda model: [
        setattr(block.norm1.emb.time_proj, "downscale_freq_shift", 0) for block in model.transformer_blocks
    ],
    "other epsilons": lambda model: setattr(model.transformer_blocks[1].norm3, "eps", 0.1),
    "a head of another epsilon": lambda model: setattr(model.norm_out, "eps", 0.1),
    "a processor": lambda model: model.transformer_blocks[1].attn1.set_processor(Reversed()),
    "fused projections": lambda model: model.transformer_blocks[1].attn1.fuse_projections(),
    "a factor on attention": lambda model: setattr(model.transformer_blocks[0].attn1, "rescale_output_factor", 2.0),
    "a residual in attention": lambda model: setattr(model.transformer_blocks[0].attn1, "residual_connection", True),
    "an adapter around norm1.linear": wrap(f"{FIRST}.norm1.linear"),
    "an adapter around attn1.to_q": wrap(f"{FIRST}.attn1.to_q"),
    "an adapter around ff.net.0.proj": wrap(f"{FIRST}.ff.net.0.proj"),
    "an adapter around the head": wrap("proj_out_2"),
    "an adapter around the patches": wrap("pos_embed.proj"),
    **{
        f"a hook on {path}": doubled(f"{FIRST}.{path}")
        for path in ("attn1", "attn1.to_k", "attn1.to_out.0", "attn1.to_out.1", "norm1.emb", "norm1.silu")
    },
    **{f"a hook on {path}": doubled(f"{FIRST}.{path}") for path in ("ff", "ff.net.0", "ff.net.1", "ff.net.2")},
    "a hook on the embedding": doubled("pos_embed"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parts_equal_forward(change: Change) -> None:
    model = tiny()
    change(model)
    assert as_denoiser(model).passed_over_hooks() is None
    assert relative_error(run(model), own(model)) < 1e-12


@pytest.mark.parametrize("sizes", [dict(activation_fn="geglu"), dict(out_channels=4), dict(num_layers=3, patch_size=2)])
def test_parts_equal_forward_at_other_sizes(sizes: dict[str, Any]) -> None:
    model = tiny(**sizes)
    assert relative_error(run(model), own(model)) < 1e-12


@pytest.mark.parametrize("path", [FIRST, f"{FIRST}.norm1", f"{FIRST}.norm1.norm", f"{FIRST}.norm3", "norm_out"])
def test_hooks_that_the_engine_would_pass_over_are_named(path: str) -> None:
    model = tiny()
    model.get_submodule(path).register_forward_hook(lambda *_: None)
    assert as_denoiser(model).passed_over_hooks() == path


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("as it is", None),
        ("fused projections", None),
        ("a processor", "transformer_blocks.1.attn1"),
        ("an adapter around attn1.to_q", f"{FIRST}.attn1.to_q"),
        ("an adapter around the head", "proj_out_2"),
    ],
)
def test_layers_of_somebody_elses_are_named(change: str, name: str | None) -> None:
    model = tiny()
    CHANGES[change](model)
    assert as_denoiser(model).foreign_layer() == name


def test_the_kernels_take_attention_in_one_piece() -> None:
    model = tiny(torch.float32)
    triton = run(model, ops.own_matmul_operations())
    assert relative_error(triton, run(model)) < 1e-5
    assert not torch.equal(triton, run(model))


@pytest.mark.parametrize("part", range(3))
def test_a_product_lands_in_its_part_of_the_columns(part: int) -> None:
    model = tiny()
    linear, u = model.transformer_blocks[0].attn1.to_q, torch.randn(2, 4, 16, dtype=torch.float64)
    packed = torch.full((2, 4, 48), 7.0, dtype=torch.float64)
    linear_into(linear, u, packed.chunk(3, dim=2)[part])
    for i, each in enumerate(packed.chunk(3, dim=2)):
        torch.testing.assert_close(each, linear(u) if i == part else torch.full_like(each, 7.0))


def test_with_the_originals_weights_it_is_the_original() -> None:
    original = tiny_dit().requires_grad_(False)
    types = [StepType.NO_CACHE, StepType.ATTN_MLP, StepType.ATTENTION, StepType.NO_CACHE]
    plan = Plan.from_types(types, (900, 600, 300, 0), layered(2, BRANCHES), 0.9)
    model = transformer(Case(original, plan, 1))
    ours, theirs = (sample(one, [1, 3], table=plan, engine=Engine(one)) for one in (model, original))
    assert relative_error(ours, theirs) < 1e-5  # diffusers computes frequencies in float32
    assert as_denoiser(model).shape.branches == as_denoiser(original).shape.branches


def test_layouts_are_told_apart_and_what_is_missing_is_named() -> None:
    assert type(as_denoiser(tiny())) is DiffusersDiTDenoiser
    assert type(as_denoiser(tiny_dit())) is DiTDenoiser
    model = tiny()
    del model.proj_out_1
    with pytest.raises(InputError, match="of the nearest, diffusers' DiTTransformer2DModel, it lacks 'proj_out_1'"):
        as_denoiser(model)
    model = tiny()
    model.transformer_blocks[0].ff.net[2] = nn.Identity()
    with pytest.raises(InputError, match=r"it lacks 'transformer_blocks.0.ff.net.2.in_features'"):
        as_denoiser(model)
    model = tiny()
    model.pos_embed.pos_embed = None
    with pytest.raises(InputError, match=r"it lacks 'pos_embed.pos_embed.shape'"):
        as_denoiser(model)
    model = tiny()
    model.transformer_blocks[1].norm3 = nn.RMSNorm(16)
    with pytest.raises(InputError, match=r"'transformer_blocks.1.norm3' is a RMSNorm"):
        as_denoiser(model)


def test_sizes() -> None:
    denoiser = as_denoiser(tiny())
    assert denoiser.latent_shape == (4, 8, 8)
    assert (denoiser.num_classes, denoiser.has_null_label, denoiser.out_channels) == (5, True, 8)
    assert dict(denoiser.shape.sizes)["mlp_hidden_size"] == 64
