"""A DiT's branches with their first product in float8: QKV of attention and fc1 of the MLP."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models.base import BranchResources, BufferPool, Denoiser
from ebcache_fast.models.facebook_dit import DiTDenoiser, attend
from ebcache_fast.models.layers import has_plain_weights, is_plain, linear_into
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Quantised
from ebcache_fast.plan import Branch, Site, layered

FLOAT8 = torch.float8_e4m3fn
ALIGNMENT = 16  # of a product's sizes on a GPU


def check_float8(denoiser: Denoiser) -> None:
    """Raise InputError, with the remedy, where the model or its device has no float8 products."""
    weight, sizes = denoiser.weight(), dict(denoiser.shape.sizes)
    if not isinstance(denoiser, DiTDenoiser):
        why: str | None = f"{type(denoiser).__name__} sees another layout"
    elif not all(map(has_plain_weights, denoiser.first_layers())):
        why = "weights are quantised or sharded already"
    elif weight.is_cuda and (denoiser.shape.width % ALIGNMENT or sizes["mlp_hidden_size"] % ALIGNMENT):
        why = f"widths {denoiser.shape.width} and {sizes['mlp_hidden_size']} are not both multiples of {ALIGNMENT}"
    else:
        why = ops.why_not_float8(weight.device, weight.dtype)
    if why is not None:
        raise InputError(
            "fp8=True needs a DiT of the original layout, and on a GPU bfloat16, compute capability 8.9 or above and "
            f"Triton, and here {why}; leave it out"
        )


def ready_sites(model: nn.Module) -> tuple[Site, ...]:
    """The branches of a DiT of the original layout whose first layer is plain now."""
    blocks = cast(Any, model).blocks
    every = layered(len(blocks), (Branch.SELF_ATTN, Branch.MLP))
    return tuple(site for site in every if _is_ready(_first_layer(blocks[site.layer], site.branch)))


class Float8Branches:
    """Runs the branches of a DiT of the original layout whose first layer is plain, over one trajectory's memory.

    A branch's input comes with a scale a token, its first weight has one an output channel. The weights are made anew
    of the live parameters for each trajectory, at fixed addresses: 7 * D^2 bytes a layer of the usual DiT, by about a
    dozen small launches. A layer with an adapter or a hook is left alone: its branch runs as ever.

    What no library's epilogue does has a pass of its own: the GELU after fc1 reads and writes (N, T, F). Of DiT-XL/2
    at 256 px, guided, B=64, that is 0.14 ms a layer at 4.3 TB/s, a third of what twice the rate of products would save.
    All of this is calculated; it was measured on no GPU yet.
    """

    def __init__(self, model: nn.Module, per_run: BufferPool) -> None:
        self._model, self._per_run = cast(Any, model), per_run
        self._weights: dict[Site, Quantised] = {}

    def prepare(self) -> None:
        """Make the weights of what is plain now; at the start of each trajectory."""
        self._weights = {site: self._quantised(site) for site in ready_sites(self._model)}

    @property
    def sites(self) -> frozenset[int]:
        """The sites, counted through the model, of which the weights were made."""
        every = layered(len(self._model.blocks), (Branch.SELF_ATTN, Branch.MLP))
        return frozenset(i for i, site in enumerate(every) if site in self._weights)

    def takes(self, site: Site) -> bool:
        """True if `run` is for this branch: its weight was made, and its layer is as plain as it was."""
        return site in self._weights and _is_ready(self._first_layer(site))

    def run(self, site: Site, u: Quantised, out: Tensor, res: BranchResources) -> None:
        """Write a branch's ungated output for its input u (N, T, D) into ``out``, of the same shape."""
        (layer, branch), first, (rows, tokens, _) = site, self._first_layer(site), u.values.shape
        block, flat = self._model.blocks[layer], Quantised(u.values.flatten(0, 1), u.scales.flatten())
        hidden = res.scratch.buffer("of float8", rows, tokens, first.out_features)
        res.operations.scaled_linear(flat, self._weights[site], first.bias, hidden.flatten(0, 1))
        if branch is Branch.SELF_ATTN:
            linear_into(block.attn.proj, attend(block.attn, hidden, res), out)
        else:
            linear_into(block.mlp.fc2, block.mlp.act(hidden), out)

    def _first_layer(self, site: Site) -> Any:
        return _first_layer(self._model.blocks[site.layer], site.branch)

    def _quantised(self, site: Site) -> Quantised:
        weight, name = self._first_layer(site).weight, f"float8 {site}"
        matrix = Quantised(
            self._per_run.buffer(name, *weight.shape, dtype=FLOAT8),
            self._per_run.buffer(name, len(weight), dtype=torch.float32),
        )
        reference.quantise(weight, matrix)
        return matrix


def _first_layer(block: Any, branch: Branch) -> Any:
    return block.attn.qkv if branch is Branch.SELF_ATTN else block.mlp.fc1


def _is_ready(layer: Any) -> bool:
    return is_plain(layer) and layer.weight.dtype == layer.bias.dtype
