"""diffusers' own DiT, with the weights of a model of the original layout."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from bench.rivals.case import Case
from bench.rivals.loop import Call


def transformer(case: Case) -> Any:
    """A DiTTransformer2DModel that computes what the case's model does.

    diffusers spaces the frequencies of timesteps otherwise, and has another epsilon in one norm; both are set to the
    original's, without which the same weights mean another model.
    """
    from diffusers import DiTTransformer2DModel

    sizes = dict(case.denoiser.shape.sizes)
    heads = case.model.num_heads
    with case.device:  # it fills all weights with random numbers, which takes a CPU many seconds
        made: Any = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=case.denoiser.shape.width // heads,
            in_channels=sizes["in_channels"],
            out_channels=sizes["out_channels"],
            num_layers=case.denoiser.shape.depth,
            sample_size=case.denoiser.latent_shape[1],
            patch_size=sizes["patch_size"],
            num_embeds_ada_norm=case.denoiser.num_classes,
            norm_eps=1e-6,
        )
    made.load_state_dict(state_dict_of(case.model))
    made.pos_embed.pos_embed = case.model.pos_embed.detach().clone()
    for block in made.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return made.to(case.device, case.dtype).eval().requires_grad_(False)


def state_dict_of(model: Any) -> dict[str, Tensor]:
    """The weights under diffusers' names: each block has embedders of its own, and queries, keys and values apart."""
    renamed = {"pos_embed.proj": model.x_embedder.proj, "proj_out_1": model.final_layer.adaLN_modulation[1]}
    renamed["proj_out_2"] = model.final_layer.linear
    found: dict[str, Tensor] = {}
    for i, block in enumerate(model.blocks):
        prefix = f"transformer_blocks.{i}."
        emb = f"{prefix}norm1.emb."
        renamed |= {
            f"{emb}timestep_embedder.linear_1": model.t_embedder.mlp[0],
            f"{emb}timestep_embedder.linear_2": model.t_embedder.mlp[2],
            f"{emb}class_embedder.embedding_table": model.y_embedder.embedding_table,
            f"{prefix}norm1.linear": block.adaLN_modulation[1],
            f"{prefix}attn1.to_out.0": block.attn.proj,
            f"{prefix}ff.net.0.proj": block.mlp.fc1,
            f"{prefix}ff.net.2": block.mlp.fc2,
        }
        for name in ("weight", "bias"):
            parts = getattr(block.attn.qkv, name).chunk(3)
            found |= {f"{prefix}attn1.to_{part}.{name}": value for part, value in zip("qkv", parts, strict=True)}
    return found | {
        f"{key}.{name}": value for key, layer in renamed.items() for name, value in layer.state_dict().items()
    }


def call(case: Case, model: Callable[..., Any]) -> Call:
    """The transformer as DiTPipeline calls it."""

    def once(x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = model(x, timestep=t, class_labels=case.row_labels, return_dict=False)[0]
        return out

    return once
