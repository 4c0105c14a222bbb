"""Counts launches: every Triton launch and every ATen operation that is not a view, on any device."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.graphs import no_graphs
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.kernels import embed, gated_residual, gated_sum, head, launch, linear_gelu, run, tokens
from ebcache_fast.models import as_denoiser
from ebcache_fast.ops import operations as ops
from ebcache_fast.plan import Plan, StepType
from ebcache_fast.samplers import make_sampler, trajectory_noise

KERNELS = (embed, gated_residual, gated_sum, head, linear_gelu, run, tokens)
FEW_PROGRAMS = {80: ((launch.ALL, launch.Launch(16, 128, 4)),)}  # the interpreter takes its time by the program


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
        with ExitStack() as patches:
            for module in KERNELS:
                for name, kernel in list(vars(module).items()):
                    if isinstance(kernel, KernelInterface) and name.endswith("_kernel"):
                        patches.enter_context(patch.object(module, name, _Counted(kernel, name, self)))
            patches.enter_context(self)
            yield

    def count_kernel(self, name: str, launch_it: Callable[[], object]) -> None:
        """Count one launch, and nothing that happens inside of it."""
        self.counts[name] += 1
        self._inside_a_kernel = True
        try:
            launch_it()
        finally:
            self._inside_a_kernel = False


class _Counted:
    """A kernel that says when it is launched."""

    def __init__(self, kernel: Any, name: str, launches: Launches) -> None:
        self._kernel, self._name, self._launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch_it(*args: Any, **kwargs: Any) -> None:
            self._launches.count_kernel(self._name, lambda: self._kernel[grid](*args, **kwargs))

        return launch_it


def operations(device: torch.device) -> ops.Operations:
    """What a CUDA device gets: the kernels, SDPA, and the fused first half of the MLP, on a CPU our own of it."""
    return replace(ops.own_matmul_operations(), attention=None) if device.type == "cpu" else ops.triton_operations()


@contextmanager
def few_programs() -> Iterator[None]:
    """The largest kernels in few programs, for an interpreter; they are as many launches."""
    with patch.object(launch, "TABLE", {**launch.TABLE, "gated_residual": FEW_PROGRAMS}):
        yield


def count_trajectory(
    model: nn.Module,
    types: Sequence[StepType],
    cfg_scale: float = 1.5,
    sampler: str = "ddpm",
    options: EngineOptions | None = None,
) -> dict[int, Counter[str]]:
    """What each dispatch of our own sampler's loop launched, by its first step; one sample, operation by operation."""
    denoiser = as_denoiser(model)
    device = denoiser.weight().device
    stepper = make_sampler(sampler, len(types))
    plan = Plan.from_types(types, stepper.timesteps, denoiser.shape.sites)
    noise = trajectory_noise(0, range(1), len(types) if stepper.draws_noise else 0, denoiser.latent_shape)
    engine = Engine(model, options, operations(device), no_graphs)
    labels, rows = torch.tensor([1], device=device), torch.tensor(stepper.rows)
    counts, done = {}, 0
    with engine.sampling(plan, labels, Guidance(cfg_scale), rows, noise) as trajectory:
        while done < len(types):
            launches = Launches()
            with launches.counting_kernels():
                count = trajectory.advance()
            counts[done] = launches.counts
            done += count
    return counts
