"""What every test runs under: one thread, reproducible examples, unwritten memory that shows."""

import gc
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any is imported

from hypothesis import HealthCheck, settings
from interpreter import call_helpers_quickly, repair_numbers
from torch import Tensor

torch.set_num_threads(1)

# No limit of time: a busy machine would break it.
settings.register_profile("ci", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_permuted"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu where there is no GPU; the reason shows in the summary."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Spare collections of garbage all that was imported: tests that ask for one would wait half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def honest_interpreter() -> Iterator[None]:
    """Triton's interpreter with bfloat16 and float8 as they should be, and quicker; see `interpreter`."""
    with pytest.MonkeyPatch.context() as patch:
        repair_numbers(patch)
        call_helpers_quickly(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def unwritten_memory_is_nan() -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that a value read before it was written shows.

    Torch's own switch for this comes with deterministic algorithms, which change the code under test.
    """
    with torch.device("cpu"):
        torch.empty(0)  # device contexts go by the allocators' identity, which they learn at first use: here
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, filled_with_nan(getattr(owner, name)))
        yield


@pytest.fixture
def pipe(kind: Any) -> Any:
    """The pipeline of a test's ``kind``, for whatever the test does to any part of it."""
    return kind.pipeline()


@pytest.fixture
def model() -> Any:
    """A tiny DiT of the original layout, in float64."""
    from dropin import fresh_model  # here, so that what a mutant breaks is a test

    return fresh_model()


def filled_with_nan(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `allocate` with NaN in each floating point or complex result; integers stay as they come."""

    @wraps(allocate)
    def allocate_and_fill(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() or tensor.is_complex():
            with torch.no_grad():  # a leaf that requires a gradient can't be written otherwise
                tensor.fill_(float("nan"))
        return tensor

    return allocate_and_fill
