"""What pipelines can't be enabled with, or was done to them after: a typed error, the method, or their own answer."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_kinds import COG_2B, DIT, SIGMA, STEPS, THREE, TYPES, Kind, ask, drive, table_of, timesteps, uncached
from diffusers_oracle import bare, drive_replaying, fate, nothing, replaying
from tiny import relative_error
from torch import nn

from ebcache_fast import CacheTable, enable, stats
from ebcache_fast.errors import EBCacheError, InputError, TableError, TrajectoryError
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Branch, Plan, layered

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

Change = Callable[[Any], object]
both_models = pytest.mark.parametrize("kind", [SIGMA, COG_2B], ids=str)


# ------------------------------------------------------------------------------------------ diffusers' own caches


def caching(name: str, **options: Any) -> Change:
    """One of diffusers' caches, as its users apply it."""

    def apply(pipe: Any) -> None:
        config, model = getattr(diffusers.hooks, f"{name}Config")(**options), pipe.transformer
        if hasattr(model, "enable_cache"):
            model.enable_cache(config)
        else:
            ways = {"PyramidAttentionBroadcast": "pyramid_attention_broadcast", "MagCache": "mag_cache"}
            getattr(diffusers.hooks, f"apply_{ways.get(name, name)}")(model, config)

    return apply


BROADCAST = caching(
    "PyramidAttentionBroadcast",
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(0, 1000),
    current_timestep_callback=lambda: 500,
)
FASTER = caching(
    "FasterCache",
    spatial_attention_block_skip_range=2,
    spatial_attention_timestep_skip_range=(-1, 901),
    unconditional_batch_skip_range=2,
    current_timestep_callback=lambda: 500,
    attention_weight_callback=lambda _: 0.3,
    tensor_format="BFCHW",
)
MAG = caching("MagCache", num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS) * 0.99)


def cast_layerwise(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


CACHES: dict[str, tuple[Kind, Change]] = {
    "DiT, pyramid attention broadcast": (DIT, BROADCAST),
    "DiT, layerwise casting": (DIT, cast_layerwise),
    "PixArt, pyramid attention broadcast": (SIGMA, BROADCAST),
    "PixArt, MagCache": (SIGMA, MAG),
    "PixArt, layerwise casting": (SIGMA, cast_layerwise),
    "CogVideoX, pyramid attention broadcast": (COG_2B, BROADCAST),
    "CogVideoX, FasterCache": (COG_2B, FASTER),
    "CogVideoX, MagCache": (COG_2B, MAG),
    "CogVideoX, first block cache": (COG_2B, caching("FirstBlockCache", threshold=0.5)),
    "CogVideoX, SeaCache": (COG_2B, caching("SeaCache")),
    "CogVideoX, layerwise casting": (COG_2B, cast_layerwise),
}


@pytest.mark.parametrize(("kind", "apply"), CACHES.values(), ids=CACHES)
def test_another_cache_is_refused_and_later_left_to_it(kind: Kind, pipe: Any, apply: Change) -> None:
    assert fate(pipe, kind.draw, apply, nothing) == "refused"
    assert fate(pipe, kind.draw, nothing, apply) == "counted"
    apply(pipe)
    with pytest.raises(InputError, match=f"{type(pipe.transformer).__name__}.* has diffusers' hook '.*; remove"):
        enable(pipe, table_of(pipe))
    assert "_cached_forward" not in vars(pipe.transformer)


@pytest.mark.parametrize("kind", [COG_2B], ids=str)
def test_a_cache_that_is_gone_again_is_in_nobodys_way(kind: Kind, pipe: Any) -> None:
    replayed = kind.draw(replaying(pipe))
    enable(pipe, table_of(pipe))
    BROADCAST(pipe)
    kind.draw(pipe)
    pipe.transformer.disable_cache()
    assert relative_error(kind.draw(pipe), replayed) < 1e-5
    assert [*stats(pipe).originals.values()] == [STEPS]


# ------------------------------------------------------------------------------------------- other transformers


def sizes(**others: Any) -> dict[str, Any]:
    return dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, in_channels=4) | others


ADALN_SINGLE = dict(norm_type="ada_norm_single", cross_attention_dim=16, caption_channels=16, sample_size=8)
OTHERS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": sizes(sample_size=8, joint_attention_dim=16, caption_projection_dim=16,
                                   pooled_projection_dim=16, pos_embed_max_size=8, out_channels=4),
    "FluxTransformer2DModel": sizes(num_single_layers=1, joint_attention_dim=16, pooled_projection_dim=16,
                                    axes_dims_rope=(2, 2, 4)),
    "LatteTransformer3DModel": sizes(**ADALN_SINGLE, patch_size=2, num_embeds_ada_norm=1000, video_length=2,
                                     norm_elementwise_affine=False),
    "ConsisIDTransformer3DModel": sizes(text_embed_dim=16, time_embed_dim=8, sample_width=8, sample_height=8,
                                        sample_frames=5, cross_attn_dim_head=8, cross_attn_num_heads=2,
                                        is_train_face=False),
    "HunyuanDiT2DModel": sizes(sample_size=8, hidden_size=16, cross_attention_dim=16, cross_attention_dim_t5=16,
                               pooled_projection_dim=16, learn_sigma=True, patch_size=2,
                               activation_fn="gelu-approximate"),
    "LTXVideoTransformer3DModel": sizes(cross_attention_dim=16, caption_channels=16),
    "SanaTransformer2DModel": sizes(sample_size=8, cross_attention_dim=16, caption_channels=16,
                                    num_cross_attention_heads=2, cross_attention_head_dim=8),
    "PriorTransformer": sizes(embedding_dim=16, num_embeddings=4) | dict(in_channels=None),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_an_unsupported_transformer_is_named(name: str) -> None:
    options = {key: value for key, value in OTHERS[name].items() if value is not None}
    model = getattr(diffusers, name)(**options).eval()

    class Pipeline:
        transformer = model

    table = CacheTable(range(800, -1, -200), TYPES)
    for target in (model, Pipeline()):
        with pytest.raises(InputError, match=rf"{name}.*;") as refused:
            enable(target, table)
        assert "\n" not in str(refused.value)
        assert "_cached_forward" not in vars(model)


@both_models
def test_a_subclass_with_a_forward_of_its_own(kind: Kind) -> None:
    """As control networks for these models come: the layout is the same, and the answer is not."""
    own = type(kind.pipeline().transformer)

    class Controlled(own):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **named: Any) -> Any:
            return (1.1 * super().forward(*args, **named)[0],)

    def become(changed: Any) -> None:
        changed.transformer.__class__ = Controlled

    assert fate(*bare(kind), become, nothing) in {"refused", "counted"}
    assert fate(*bare(kind), nothing, become) == "counted"


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (SIGMA, "transformer_blocks.0.norm1"),
        (SIGMA, "norm_out"),
        (COG_2B, "transformer_blocks.1.norm2.norm"),
        (COG_2B, "norm_out.norm"),
    ],
)
def test_a_norm_of_another_kind_is_named(kind: Kind, path: str) -> None:
    model = copy.deepcopy(bare(kind)[0].transformer)
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.RMSNorm(16))
    with pytest.raises(InputError, match=f"'{path}' is a RMSNorm"):
        as_denoiser(model)


# ------------------------------------------------------------------------------------------------- refused at once


def test_what_is_neither_a_module_nor_a_pipeline() -> None:
    for refused in (object(), "facebook/DiT-XL-2-256"):
        with pytest.raises(InputError, match="is no module and has no transformer; pass a model or its pipeline"):
            enable(refused, CacheTable(range(800, -1, -200), TYPES))


@pytest.mark.parametrize("kind", THREE, ids=str)
def test_it_has_no_float8_products(kind: Kind, pipe: Any) -> None:
    name = type(as_denoiser(pipe.transformer)).__name__
    with pytest.raises(InputError, match=rf"fp8=True needs a DiT of the original layout.* {name} sees"):
        enable(pipe, table_of(pipe), fp8=True)
    assert "forward" not in vars(pipe.transformer)


@both_models
def test_training_mode_and_weights_elsewhere(kind: Kind, pipe: Any) -> None:
    pipe.transformer.train()
    with pytest.raises(InputError, match=r"training mode.*model\.eval\(\)"):
        enable(pipe, table_of(pipe))
    pipe.transformer.eval().to("meta")
    with pytest.raises(InputError, match="meta device"):
        enable(pipe, table_of(pipe))


@pytest.mark.parametrize("kind", THREE, ids=str)
def test_a_table_of_another_model(kind: Kind, pipe: Any) -> None:
    own = dict(as_denoiser(pipe.transformer).shape.sizes)
    ts = timesteps(pipe)
    strangers = [own | {name: size + 1} for name, size in own.items() if name != "in_channels"]  # before the blocks
    strangers += [dict(as_denoiser(other.pipeline().transformer).shape.sizes)
                  for other in (DIT, SIGMA, COG_2B) if other is not kind]  # fmt: skip
    for model in strangers:
        with pytest.raises(TableError, match=r"^model: the table is for .*; use a table made for this model"):
            enable(pipe, CacheTable(ts, TYPES, model=model))
    deeper = (2 + 1, (Branch.SELF_ATTN, Branch.CROSS_ATTN, Branch.MLP))
    others = (2, (Branch.MLP,))
    for depth, branches in (deeper, others):
        with pytest.raises(TableError):
            enable(pipe, Plan.from_types(TYPES, ts, layered(depth, branches)))
    assert "_cached_forward" not in vars(pipe.transformer)
    replayed = kind.draw(replaying(pipe))
    enable(pipe, CacheTable(ts, TYPES, model=own))
    assert relative_error(kind.draw(pipe), replayed) < 1e-5


def test_the_text_has_a_branch_of_its_own() -> None:
    pipe = SIGMA.pipeline()
    without = Plan.from_types(TYPES, timesteps(pipe), layered(2, (Branch.SELF_ATTN, Branch.MLP)))
    with pytest.raises(TableError, match=r"SELF_ATTN [+] CROSS_ATTN [+] MLP"):
        enable(pipe, without)


@both_models
def test_inputs_that_no_model_can_take(kind: Kind, pipe: Any) -> None:
    """An error, ours or the model's; then the next run is right."""
    ts, call, model = timesteps(pipe), kind.call(pipe), pipe.transformer
    replayed = drive_replaying(pipe, call, ts)
    x, text = call["hidden_states"], call["encoder_hidden_states"]
    enable(model, table_of(pipe))
    drive(model, call, ts[:2])
    for wrong in (
        dict(hidden_states=x[:, :, :3] if x.ndim == 5 else x[:, :3]),
        dict(hidden_states=x[0]),
        dict(encoder_hidden_states=text[:1].expand(3, -1, -1)),
        dict(encoder_hidden_states=text[..., :5]),
        dict(hidden_states=x.double()),
        dict(hidden_states=x.to("meta")),
    ):
        with pytest.raises((EBCacheError, RuntimeError, ValueError, IndexError)):
            ask(model, call | wrong, ts[2])
    call = {name: one.clone() if isinstance(one, torch.Tensor) else one for name, one in call.items()}
    for ours, theirs in zip(drive(model, call, ts), replayed, strict=True):
        assert relative_error(ours, theirs) < 1e-5


@both_models
@torch.no_grad()
def test_latents_that_are_no_numbers_leave_nothing_behind(kind: Kind, pipe: Any) -> None:
    ts, call, model = timesteps(pipe), kind.call(pipe), pipe.transformer
    replayed = drive_replaying(pipe, call, ts)
    enable(model, uncached(pipe))
    bad = call | dict(hidden_states=torch.full_like(call["hidden_states"], torch.nan))
    enable(model, table_of(pipe))
    try:
        out = model(**(bad | dict(timestep=torch.full((2,), ts[0]))))[0]
    except (InputError, TrajectoryError):
        pass
    else:
        assert out.isnan().any()
    for ours, theirs in zip(drive(model, call, ts), replayed, strict=True):
        assert relative_error(ours, theirs) < 1e-5
