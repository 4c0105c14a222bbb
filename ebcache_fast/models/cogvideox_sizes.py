"""The sizes of CogVideoX and of its calls: latents of any extent, text, positions, rotary embeddings."""

import copy
import math
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import Conditioning
from ebcache_fast.models.diffusers_denoiser import DiffusersDenoiser, Layout

_LAYOUT = Layout(
    name="CogVideoXTransformer3DModel",
    known_by=(
        "transformer_blocks.0.norm1.norm.eps",
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.attn1.to_q",
        "transformer_blocks.0.attn1.heads",
        "transformer_blocks.0.norm2.norm.eps",
        "transformer_blocks.0.ff.net.2.in_features",
        "patch_embed.proj.bias",
        "patch_embed.text_proj.in_features",
        "patch_embed.patch_size",
        "patch_embed.max_text_seq_length",
        "time_proj",
        "time_embedding",
        "ofs_embedding",
        "norm_final.eps",
        "norm_out.norm.eps",
        "norm_out.linear",
        "proj_out.out_features",
    ),
    norms=("norm_out.norm",),
    block_norms=("norm1.norm", "norm2.norm"),
    branches=("attn1", "ff"),
    embed_head=("patch_embed", "proj_out"),
    called=("norm_final",),
    passed_over=("embedding_dropout", "norm_out"),
    block_passed_over=("norm1", "norm2"),
)


class CogVideoXConditioning(NamedTuple):
    """What a call gives besides latents and timesteps."""

    text: Tensor  # (N, L, E), as the text encoder gives it
    cos: Tensor | None = None  # (T - L, D / heads), of rotary embeddings, and
    sin: Tensor | None = None
    ofs: Tensor | None = None  # (1,) or (), of models that take it

    def rows(self, chosen: Tensor) -> "CogVideoXConditioning":
        """Of these rows (M,), in this order."""
        return self._replace(text=self.text[chosen])


class CogVideoXSizes(DiffusersDenoiser):
    """What of a CogVideoXTransformer3DModel depends on the size of a call. Raises what `DiffusersDenoiser` does."""

    layout = _LAYOUT
    prediction_type = "v_prediction"
    num_classes, has_null_label = 1, True  # rows differ by their text alone

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.patch_embed = embed = self._model.patch_embed
        frames = (embed.sample_frames - 1) // embed.temporal_compression_ratio + 1
        self.latent_shape: tuple[int, ...] = (self.in_channels, frames, embed.sample_height, embed.sample_width)
        self.text_tokens: int = embed.max_text_seq_length
        self.rows, self.rotates = 1, False  # of the text, and whether the attention does

    def for_shape(self, latents: tuple[int, ...], context: Conditioning) -> Self:
        self._check_there_is_text(context)
        given = cast(CogVideoXConditioning, context)
        if len(latents) != 4 or latents[0] != self.in_channels or _leaves_a_rest(latents[1:], self.patch):
            raise InputError(
                f"latents of (channels, frames, height, width) {tuple(latents)} do not fit; this model takes "
                f"{self.in_channels} channels, and multiples of {self.patch} of the others"
            )
        text = given.text
        if text.ndim != 3 or text.shape[2] != self.patch_embed.text_proj.in_features or not text.shape[1]:
            raise InputError(
                f"text of shape {tuple(text.shape)} does not fit; this model takes (rows, tokens, "
                f"{self.patch_embed.text_proj.in_features})"
            )
        for_shape = copy.copy(self)
        vars(for_shape).pop("shape", None)
        for_shape.latent_shape, for_shape.rotates = tuple(latents), given.cos is not None
        for_shape.rows, for_shape.text_tokens = text.shape[:2]
        for_shape._check_positions(given)
        return for_shape

    def _check_positions(self, given: CogVideoXConditioning) -> None:
        embed, table = self.patch_embed, (self.video_tokens, self.head_width)
        if self.adds_positions and self.text_tokens != embed.max_text_seq_length:
            raise InputError(
                f"text of {self.text_tokens} tokens does not fit the model's positions; pad it to "
                f"{embed.max_text_seq_length}"
            )
        learned = embed.sample_height, embed.sample_width
        if embed.use_learned_positional_embeddings and self.latent_shape[2:] != learned:
            raise InputError(
                f"height and width {self.latent_shape[2:]} do not fit the model's learned positions; they must be "
                f"{learned}"
            )
        shapes = {None if one is None else tuple(one.shape) for one in (given.cos, given.sin)}
        if shapes not in ({None}, {table}):
            raise InputError(f"rotary embeddings of shape {shapes} do not fit; they are two of {table}, or None")
        if (given.ofs is None) != (self._model.ofs_embedding is None):
            raise InputError(f"ofs={given.ofs} does not fit; pass one number to a model that takes it, None to others")

    def probe_inputs(self, rows: int, *, small: bool = True) -> tuple[tuple[int, ...], Conditioning]:
        weight, embed = self.weight(), self.patch_embed
        depth, height, width = self.patch
        frames, sides = 2 * depth, (height, 2 * width)
        if embed.use_learned_positional_embeddings or not small:
            frames, *sides = self.latent_shape[1:]  # type: ignore[assignment]
        generator = torch.Generator("cpu").manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cpu").to(weight)

        text = draw(rows, embed.max_text_seq_length, embed.text_proj.in_features)
        ofs = None if self._model.ofs_embedding is None else weight.new_full((1,), 2.0)
        video = frames * sides[0] * sides[1] // (depth * height * width)
        context = CogVideoXConditioning(text, ofs=ofs)
        if not self.patch_embed.use_positional_embeddings:
            angles = draw(video, self.head_width).float()
            context = context._replace(cos=angles.cos(), sin=angles.sin())
        return (self.in_channels, frames, *sides), context

    def positions(self) -> Tensor:
        """Of all tokens (T, D), in whatever dtype; those that the attention rotates have none."""
        embed, (_, frames, *sides) = self.patch_embed, self.latent_shape
        if not self.adds_positions:
            return self.weight().new_zeros(self.text_tokens + self.video_tokens, self.width)
        video_frames = (frames - 1) * embed.temporal_compression_ratio + 1
        if (*sides, video_frames) == (embed.sample_height, embed.sample_width, embed.sample_frames):
            return cast(Tensor, embed.pos_embedding[0])
        positions = embed._get_positional_embeddings(*sides, video_frames, device=self.weight().device)
        return cast(Tensor, positions[0])

    @property
    def adds_positions(self) -> bool:
        return bool(self.patch_embed.use_positional_embeddings or self.patch_embed.use_learned_positional_embeddings)

    @property
    def video_tokens(self) -> int:
        return math.prod(self.latent_shape[1:]) // math.prod(self.patch)

    @property
    def width(self) -> int:
        return cast(int, self.patch_embed.text_proj.out_features)

    @property
    def head_width(self) -> int:
        return self.width // cast(int, self._blocks[0].attn1.heads)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a patch."""
        side = self.patch_embed.patch_size
        return self.patch_embed.patch_size_t or 1, side, side

    @property
    def in_channels(self) -> int:
        proj = self.patch_embed.proj  # a convolution, or of patches of several frames a linear map
        return cast(int, getattr(proj, "in_channels", None) or proj.in_features // math.prod(self.patch))


def _leaves_a_rest(sizes: tuple[int, ...], parts: tuple[int, ...]) -> bool:
    return any(not size or size % part for size, part in zip(sizes, parts, strict=True))
