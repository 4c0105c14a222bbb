"""EB-Cache in plain torch, as its paper describes it (arXiv 2503.07120): kept outputs, a forward that reads them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from bench.rivals.case import Case
from bench.rivals.loop import Run, sample
from bench.rivals.rival import Trajectory
from ebcache_fast.models.modules import modulate, unpatchify
from ebcache_fast.plan import Branch, StepType


class Kept(Protocol):
    """The ungated outputs of each layer's attention (0) and MLP (1) that were computed last."""

    def put(self, layer: int, branch: int, output: Tensor) -> Tensor: ...
    def get(self, layer: int, branch: int) -> Tensor: ...


class KeptOutputs:
    """The outputs themselves, wherever they were allocated."""

    def __init__(self) -> None:
        self._outputs: dict[tuple[int, int], Tensor] = {}

    def put(self, layer: int, branch: int, output: Tensor) -> Tensor:
        self._outputs[layer, branch] = output
        return output

    def get(self, layer: int, branch: int) -> Tensor:
        return self._outputs[layer, branch]


def forward(model: Any, x: Tensor, t: Tensor, y: Tensor, step_type: StepType, kept: Kept) -> Tensor:
    """A model of the original layout under a step type: x (R, C, H, W), t and y (R,) -> (R, Cout, H, W)."""
    h = model.x_embedder(x) + model.pos_embed  # (R, T, D)
    c = model.t_embedder(t) + model.y_embedder(y)  # (R, D)
    for layer, block in enumerate(model.blocks):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)
        if Branch.SELF_ATTN in step_type.reuses:
            attended = kept.get(layer, 0)
        else:
            attended = kept.put(layer, 0, block.attn(modulate(block.norm1(h), shift_a, scale_a)))
        h = h + gate_a.unsqueeze(1) * attended
        if Branch.MLP in step_type.reuses:
            mapped = kept.get(layer, 1)
        else:
            mapped = kept.put(layer, 1, block.mlp(modulate(block.norm2(h), shift_m, scale_m)))
        h = h + gate_m.unsqueeze(1) * mapped
    return unpatchify(model.final_layer(h, c), model.patch_size, model.out_channels)


def timesteps_of(case: Case) -> Tensor:
    """(S, 2N): each step's, for every row."""
    return torch.tensor(case.plan.timesteps, device=case.device).unsqueeze(1).expand(-1, 2 * case.samples).contiguous()


def eager(case: Case) -> Trajectory:
    """The forward above, operation by operation."""
    t = timesteps_of(case)

    def run() -> Run:
        kept = KeptOutputs()
        return sample(case, lambda x, i: forward(case.model, x, t[i], case.row_labels, case.types[i], kept))

    return run


def module(case: Case, call: Callable[..., Tensor]) -> Trajectory:
    """A model's own forward, or what somebody made of it, at every step."""
    t = timesteps_of(case)
    return lambda: sample(case, lambda x, i: call(x, t[i], case.row_labels))


def original(case: Case) -> Trajectory:
    """The model itself in float32, products in TF32, as the original's sampling script sets it."""
    full = deepcopy(case.model).float()
    inner = module(replace(case, model=full), full)

    def run() -> Run:
        with float32_products("tf32"):
            return inner()

    return run


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """While this lasts, a GPU multiplies and convolves float32 in "tf32" or "ieee"; by default it convolves in TF32."""
    backends: Any = torch.backends
    settings = backends.cuda.matmul, backends.cudnn.conv
    before = [each.fp32_precision for each in settings]
    try:
        for each in settings:
            each.fp32_precision = precision
        yield
    finally:
        for each, was in zip(settings, before, strict=True):
            each.fp32_precision = was
