"""The diffusion transformer (DiT) with the original's parameter names, so that its checkpoints load.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), the adaLN-Zero
variant. This module is the model as a user knows it and as it is trained; ``models.facebook_dit`` is how the
engine sees it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebcache_fast.errors import InputError
from ebcache_fast.models.embeddings import LabelEmbedder, PatchEmbed, TimestepEmbedder, position_embedding

LAYER_NORM_EPS = 1e-6
GUIDED_CHANNELS = 3  # the original guides only the first three latent channels


def modulate(h: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``h * (1 + scale) + shift``; h (N, T, D), shift and scale (N, D)."""
    return torch.addcmul(shift.unsqueeze(1), h, 1 + scale.unsqueeze(1))  # (N, T, D)


class Attention(nn.Module):
    """Multi-head self-attention with packed queries, keys and values."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, u: Tensor) -> Tensor:
        n, tokens, width = u.shape
        packed = self.qkv(u).view(n, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4)  # each (N, heads, T, D / heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (N, T, heads, D / heads)
        return cast(Tensor, self.proj(mixed.reshape(n, tokens, width)))


class Mlp(nn.Module):
    """Two linear maps with a tanh-GELU between them."""

    def __init__(self, hidden_size: int, mlp_hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_hidden_size)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(mlp_hidden_size, hidden_size)

    def forward(self, u: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(self.act(self.fc1(u))))


class DiTBlock(nn.Module):
    """One layer: gated attention and gated MLP, each on a LayerNorm modulated by the condition."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        h = torch.addcmul(h, gate_a.unsqueeze(1), self.attn(modulate(self.norm1(h), shift_a, scale_a)))
        return torch.addcmul(h, gate_m.unsqueeze(1), self.mlp(modulate(self.norm2(h), shift_m, scale_m)))


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the linear map from tokens to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=LAYER_NORM_EPS)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return cast(Tensor, self.linear(modulate(self.norm_final(h), shift, scale)))


def unpatchify(tokens: Tensor, patch_size: int, channels: int) -> Tensor:
    """Tokens (N, T, patch * patch * channels), square grid, row by row -> (N, channels, H, W)."""
    side = math.isqrt(tokens.shape[1])
    grid = tokens.reshape(-1, side, side, patch_size, patch_size, channels)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, side * patch_size, side * patch_size)


class DiT(nn.Module):
    """A class-conditional diffusion transformer, constructed with the original's keywords.

    ``input_size`` is the side of the square latent in pixels. With ``learn_sigma`` the output has twice the
    input's channels: predicted noise, then the interpolation between the log-variance bounds (Nichol and
    Dhariwal, arXiv 2102.09672, eq. 15). InputError for sizes below 1, or that don't divide as they must.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
    ) -> None:
        super().__init__()
        _check_positive(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
        )
        _check_multiple("input_size", input_size, "patch_size", patch_size)
        _check_multiple("hidden_size", hidden_size, "num_heads", num_heads)
        _check_multiple("hidden_size", hidden_size, "sine and cosine of row and column", 4)
        self.learn_sigma = learn_sigma
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.patch_size = patch_size
        self.num_heads = num_heads
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = position_embedding(input_size // patch_size, hidden_size)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.x_embedder.proj
        nn.init.xavier_uniform_(patch.weight.view(patch.weight.shape[0], -1))
        nn.init.zeros_(cast(Tensor, patch.bias))
        embeddings = (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2])
        for embedding in embeddings:
            nn.init.normal_(cast(Tensor, embedding.weight), std=0.02)
        # adaLN-Zero: every block starts as the identity, and the model as zero.
        blocks = [cast(DiTBlock, block) for block in self.blocks]
        zeroed = [block.adaLN_modulation[1] for block in blocks]
        for linear in (*zeroed, self.final_layer.adaLN_modulation[1], self.final_layer.linear):
            nn.init.zeros_(cast(Tensor, linear.weight))
            nn.init.zeros_(cast(Tensor, linear.bias))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents x (N, C, H, W), timesteps t (N,), labels y (N,) int64 -> (N, out_channels, H, W)."""
        h = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            h = block(h, c)
        return unpatchify(self.final_layer(h, c), self.patch_size, self.out_channels)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Run ``forward`` on a batch whose first half is conditional and second unconditional, both guided.

        Only the first half's latents are used, and only the first three eps channels are guided, as in the
        original.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        guided_channels = min(GUIDED_CHANNELS, self.in_channels)
        eps, rest = out[:, :guided_channels], out[:, guided_channels:]
        cond, uncond = eps.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{name} {size} is below 1; choose 1 or more")


def _check_multiple(name: str, size: int, divisor_name: str, divisor: int) -> None:
    if size % divisor:
        raise InputError(f"{name} {size} is not a multiple of {divisor} ({divisor_name}); choose one that is")


# Depth, width and heads
_SIZES = {"XL": (28, 1152, 16), "L": (24, 1024, 16), "B": (12, 768, 12), "S": (12, 384, 6)}

DIT_MODELS: dict[str, Callable[..., DiT]] = {
    f"DiT-{size}/{patch}": partial(DiT, depth=depth, hidden_size=width, num_heads=heads, patch_size=patch)
    for size, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}
"""The original's factories by name, ``DiT-XL/2`` to ``DiT-S/8``; each takes the other keywords of ``DiT``."""
