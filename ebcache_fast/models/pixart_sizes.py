"""The sizes of PixArt and of its calls: latents of any extent, text, positions."""

import copy
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import Conditioning
from ebcache_fast.models.diffusers_denoiser import DiffusersDenoiser, Layout
from ebcache_fast.models.layout import check_plain

USUAL_TEXT = 300  # tokens of a prompt, as PixArt-Sigma's pipeline has them
_LAYOUT = Layout(
    name="PixArtTransformer2DModel",
    known_by=(
        "transformer_blocks.0.norm1.eps",
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.attn1.heads",
        "transformer_blocks.0.attn2.to_k.in_features",
        "transformer_blocks.0.norm2.eps",
        "transformer_blocks.0.ff.net.2.in_features",
        "transformer_blocks.0.scale_shift_table",
        "adaln_single.emb.timestep_embedder",
        "adaln_single.linear",
        "caption_projection",
        "pos_embed.proj.kernel_size",
        "pos_embed.pos_embed.shape",
        "norm_out.eps",
        "scale_shift_table",
        "proj_out.out_features",
    ),
    norms=("norm_out",),
    block_norms=("norm1", "norm2"),
    branches=("attn1", "attn2", "ff"),
    embed_head=("pos_embed", "proj_out"),
    passed_over=("adaln_single",),
)


class PixArtConditioning(NamedTuple):
    """What a call gives besides latents and timesteps."""

    text: Tensor  # (N, L, E), as the text encoder gives it
    mask: Tensor | None = None  # (N, L) of which 1 is kept, or (N, 1, L) to be added to scores
    resolution: Tensor | None = None  # (N, 2), and
    aspect_ratio: Tensor | None = None  # (N, 1), of models that were trained with sizes

    def rows(self, chosen: Tensor) -> "PixArtConditioning":
        """Of these rows (M,), in this order."""
        return PixArtConditioning(self.text[chosen], *(None if one is None else one[chosen] for one in self[1:]))


class PixArtSizes(DiffusersDenoiser):
    """What of a PixArtTransformer2DModel depends on the size of a call. Raises what `DiffusersDenoiser` does."""

    layout = _LAYOUT
    text_tokens = 0  # text stands beside the stream
    prediction_type = "epsilon"
    num_classes, has_null_label = 1, True  # rows differ by their text alone

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        check_plain(model, ("scale_shift_table", *self._of_blocks(("scale_shift_table",))))
        embed = self._model.pos_embed
        self.latent_shape: tuple[int, int, int]
        self.latent_shape = embed.proj.in_channels, embed.height * self.patch_size, embed.width * self.patch_size
        self.text = USUAL_TEXT

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> Self:
        self._check_there_is_text(context)
        given = cast(PixArtConditioning, context)
        channels, patch = self.latent_shape[0], self.patch_size
        if len(latents) != 3 or latents[0] != channels or any(not side or side % patch for side in latents[1:]):
            shape = ", ".join(map(str, latents))
            raise InputError(
                f"x of shape (rows, {shape}) does not fit; this model takes (rows, {channels}, height, width), both "
                f"multiples of {patch}"
            )
        if given.text.ndim != 3 or given.text.shape[2] != self.text_width or not given.text.shape[1]:
            raise InputError(
                f"text of shape {tuple(given.text.shape)} does not fit; this model takes (rows, tokens, "
                f"{self.text_width})"
            )
        if self.has_sizes and (given.resolution is None or given.aspect_ratio is None):
            raise InputError("resolution or aspect_ratio is missing, which this model takes; pass added_cond_kwargs")
        for_shape = copy.copy(self)
        vars(for_shape).pop("shape", None)
        for_shape.latent_shape, for_shape.text = cast(tuple[int, int, int], tuple(latents)), given.text.shape[1]
        return for_shape

    def probe_inputs(self, rows: int, *, small: bool = True) -> tuple[tuple[int, ...], Conditioning]:
        patch, weight = self.patch_size, self.weight()
        generator = torch.Generator("cpu").manual_seed(1)
        text = torch.randn(rows, 3, self.text_width, generator=generator, device="cpu").to(weight)
        mask = torch.ones(rows, 3, dtype=torch.int64, device=weight.device)
        mask[-1, -1] = 0
        resolution, aspect_ratio = (weight.new_tensor(size).expand(rows, -1) for size in ((512.0, 384.0), (0.75,)))
        context = (
            PixArtConditioning(text, mask, resolution, aspect_ratio)
            if self.has_sizes
            else PixArtConditioning(text, mask)
        )
        return (self.latent_shape[0], 2 * patch, 3 * patch) if small else self.latent_shape, context

    @property
    def tokens(self) -> int:
        rows, columns = (side // self.patch_size for side in self.latent_shape[1:])
        return rows * columns

    @property
    def width(self) -> int:
        return cast(int, self._model.pos_embed.pos_embed.shape[2])

    @property
    def text_width(self) -> int:
        projection = self._model.caption_projection
        return cast(int, (self._blocks[0].attn2.to_k if projection is None else projection.linear_1).in_features)

    @property
    def caption_width(self) -> int:
        """Of the text as layers attend to it."""
        return self.text_width if self._model.caption_projection is None else self.width

    @property
    def has_sizes(self) -> bool:
        return bool(self._model.adaln_single.emb.use_additional_conditions)

    @property
    def patch_size(self) -> int:
        return cast(int, self._model.pos_embed.proj.kernel_size[0])
