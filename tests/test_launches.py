"""How many launches a step costs on the engine path of our own sampler.

Counted are every Triton launch and every ATen operation that is not a view; 28 layers, as DiT-XL/2 has.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from accuracy import DEVICE
from tiny import tiny_dit
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from ebcache_fast import ops
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.kernels import embed, gated_residual, gated_sum, head, launch, linear_gelu, run
from ebcache_fast.models import DiT
from ebcache_fast.plan import Branch, Plan, StepType
from ebcache_fast.samplers import make_sampler, trajectory_noise

FEW_PROGRAMS = {80: ((launch.ALL, launch.Launch(16, 128, 4)),)}  # the interpreter takes its time by the program
BRANCHES = (Branch.SELF_ATTN, Branch.MLP)
NO, ATTENTION, ATTN_MLP = StepType.NO_CACHE, StepType.ATTENTION, StepType.ATTN_MLP
KERNELS = (embed, gated_residual, gated_sum, head, linear_gelu, run)


class Launches(TorchDispatchMode):
    """Counts what runs inside: ATen operations by name, Triton kernels by that of their function."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._inside_a_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside_a_kernel and not func.is_view:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def counting_kernels(self) -> Iterator[None]:
        """Count the launches of every kernel; what the interpreter does with torch on the way is none of ours."""
        with pytest.MonkeyPatch.context() as patch:
            for module in KERNELS:
                for name, kernel in list(vars(module).items()):
                    if isinstance(kernel, KernelInterface) and name.endswith("_kernel"):
                        patch.setattr(module, name, Counted(kernel, name, self))
            with self:
                yield


class Counted:
    """A kernel that says when it is launched."""

    def __init__(self, kernel: Any, name: str, launches: Launches) -> None:
        self._kernel, self._name, self._launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self._launches.counts[self._name] += 1
            self._launches._inside_a_kernel = True
            try:
                self._kernel[grid](*args, **kwargs)
            finally:
                self._launches._inside_a_kernel = False

        return launch


def operations() -> ops.Operations:
    """What a CUDA device gets: the kernels, SDPA, and the fused first half of the MLP, here our own of it."""
    return replace(ops.own_matmul_operations(), attention=None) if DEVICE.type == "cpu" else ops.triton_operations()


def launches(model: DiT, types: list[StepType], cfg_scale: float, sampler: str) -> dict[int, Counter[str]]:
    """What each call of a trajectory launched in our own sampler's loop, by its first step."""
    labels = torch.tensor([1], device=DEVICE)
    stepper = make_sampler(sampler, len(types))
    plan = Plan.from_types(types, stepper.timesteps, len(model.blocks), BRANCHES)
    noise = trajectory_noise(0, range(1), len(types) if stepper.draws_noise else 0, (4, 8, 8))
    engine, counts, done = Engine(model, operations=operations(), make_graphs=lambda _: None), {}, 0
    with engine.sampling(plan, labels, Guidance(cfg_scale), torch.tensor(stepper.rows), noise) as trajectory:
        while done < len(types):
            counter = Launches()
            with counter.counting_kernels():
                count = trajectory.advance()
            counts[done] = counter.counts
            done += count
    return counts


def test_launches_of_every_step_type_of_28_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TABLE", {**launch.TABLE, "gated_residual": FEW_PROGRAMS})
    model = tiny_dit(depth=28, dtype=torch.float32).to(DEVICE)
    # The first step of a kind allocates its buffers; the second is what counts.
    counts = launches(model, [NO, ATTENTION, ATTN_MLP, NO, ATTENTION, *[ATTN_MLP] * 4], 1.5, "ddpm")
    totals = {i: count.total() for i, count in counts.items()}
    assert list(totals) == [0, 1, 2, 3, 4, 5, 8]  # the fifth stands for a run of three
    assert totals[3] <= 200, counts[3]
    assert totals[4] <= 88, counts[4]
    assert totals[5] == totals[8] == 2, counts[5]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("cfg_scale", "sampler"), [(1.0, "ddpm"), (1.5, "ddim")])
def test_launches_are_what_the_formula_says(cfg_scale: float, sampler: str, depth: int) -> None:
    model = tiny_dit(depth=depth, dtype=torch.float32).to(DEVICE)
    counts = launches(model, [NO, ATTENTION, ATTN_MLP, NO, ATTENTION, ATTN_MLP, ATTN_MLP], cfg_scale, sampler)
    assert {i: counts[i].total() for i in (3, 4, 5)} == {3: 7 * depth + 1, 4: 3 * depth + 2, 5: 2}, counts
