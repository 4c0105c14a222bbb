"""What the engine asks of a model: the ``Denoiser`` protocol, and the modulation that drives it."""

from typing import NamedTuple, Protocol

from torch import Tensor

from ebcache_fast.operands import Linear, Patches
from ebcache_fast.ops import Operations
from ebcache_fast.plan import Branch, ModelShape


class Modulation(NamedTuple):
    """Every modulation vector of S steps and U distinct conditions, from one pass over the live parameters.

    The three of a branch are the shift and scale of its LayerNorm's output and the gate of its own output.
    """

    layers: Tensor  # (S, L, branches, 3, U, D)
    head: Tensor  # (S, 2, U, D): shift, scale


class Scratch(Protocol):
    """Working memory: the same buffer for the same name and shape, in the model's dtype."""

    def buffer(self, name: str, *shape: int) -> Tensor:
        """A buffer of this shape; what it holds means nothing between two branches."""
        ...


class Denoiser(Protocol):
    """A diffusion transformer as the engine sees it: its parts, not its forward.

    N counts rows of the batch (guidance counted), T tokens, D channels, L layers. Adapters read the module's live
    parameters on every call and keep no derived copy of a weight.
    """

    @property
    def shape(self) -> ModelShape:
        """The sizes that decide cost and memory, with the fingerprint that a table is bound to."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """One latent's (C, H, W)."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels are 0 to ``num_classes - 1``; ``num_classes`` itself is the null label, if there is one."""
        ...

    @property
    def has_null_label(self) -> bool:
        """Whether the model learned the null label, without which there is no guidance."""
        ...

    def weight(self) -> Tensor:
        """Any parameter, for the model's dtype and device."""
        ...

    def modulation(self, t: Tensor, y: Tensor, out: Modulation) -> None:
        """Write the modulation of every pair of timesteps t (S,) and labels y (U,) int64 into ``out``."""
        ...

    def passed_over_hooks(self) -> str | None:
        """A module that has hooks, or a forward of its own, and that the engine does not call; None without any."""
        ...

    def foreign_layer(self) -> str | None:
        """A layer that the engine calls and that is not torch's own: its Python may hold what a graph would keep."""
        ...

    @property
    def out_channels(self) -> int:
        """Channels of the output: C of eps, and as many of the variance interpolation if the model learned it."""
        ...

    @property
    def has_plain_ends(self) -> bool:
        """Whether embedding and head are bare layers, so that their weights say all; else their modules must run."""
        ...

    def patches(self) -> Patches:
        """The embedding's weights; only of plain ends."""
        ...

    def head_linear(self) -> Linear:
        """The last linear map's weights; only of plain ends."""
        ...

    @property
    def head_eps(self) -> float:
        """The epsilon of the last LayerNorm."""
        ...

    def embed(self, x: Tensor) -> Tensor:
        """Latents (N, C, H, W) -> tokens (N, T, D), through the model's own layers."""
        ...

    def head(self, u: Tensor) -> Tensor:
        """The head's modulated input (N, T, D) -> (N, C or 2C, H, W), through the model's own layers."""
        ...

    def norm_eps(self, layer: int, branch: Branch) -> float:
        """The epsilon of the LayerNorm before a branch."""
        ...

    def run_branch(
        self, layer: int, branch: Branch, u: Tensor, out: Tensor, operations: Operations, scratch: Scratch
    ) -> None:
        """Write a branch's ungated output for its modulated input u (N, T, D) into ``out``, of the same shape."""
        ...
