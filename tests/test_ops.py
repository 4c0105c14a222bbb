"""Which operations run where, and that it is said."""

import inspect
import logging
from dataclasses import fields
from functools import partial

import pytest
import torch

from ebcache_fast.errors import InputError
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops import reference

CUDA = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU as far as the choice can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    ops.say_once.cache_clear()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_triton_runs_on_a_gpu(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    assert ops.select(CUDA, dtype).name == "triton"
    assert not caplog.records


def test_torch_runs_on_a_cpu_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert ops.select(torch.device("cpu"), torch.float32) is ops.TORCH
    assert not caplog.records


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", ["float64", "no Triton", "Turing"])
def test_a_gpu_that_falls_back_says_so_once(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dtype, message = torch.bfloat16, {"float64": "float64", "no Triton": "not installed", "Turing": "7.5"}[case]
    if case == "float64":
        dtype = torch.float64
    elif case == "no Triton":
        monkeypatch.setattr(ops, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with caplog.at_level(logging.WARNING):
        assert [ops.select(CUDA, dtype) for _ in range(3)] == [ops.TORCH] * 3
    (record,) = caplog.records
    assert message in record.getMessage()


@pytest.mark.parametrize("make", [ops.triton_operations, ops.own_matmul_operations])
def test_every_operation_has_its_references_signature(make: object) -> None:
    operations = make()  # type: ignore[operator]
    for field in fields(operations):
        function = getattr(operations, field.name)
        if field.name == "name" or function is None:
            continue
        ours, theirs = (inspect.signature(f) for f in (function, getattr(reference, field.name)))
        own = [parameter for name, parameter in ours.parameters.items() if name != "pdl"]
        assert str(ours.replace(parameters=own)) == str(theirs), field.name


@pytest.mark.usefixtures("hopper")
def test_dependent_launches_reach_every_kernel() -> None:
    operations = ops.select(CUDA, torch.bfloat16, pdl=True)
    fused = [value for value in vars(operations).values() if isinstance(value, partial)]
    assert [one.keywords for one in fused] == [{"pdl": True}] * 11
    assert ops.select(CUDA, torch.bfloat16).embed.keywords == {"pdl": False}


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("device", "capability"), [("cpu", (9, 0)), ("cuda", (8, 9))])
def test_dependent_launches_are_refused_where_there_are_none(
    device: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    with pytest.raises(InputError, match=rf"capability 9.0 or above, and here is .*{device}"):
        ops.select(torch.device(device), torch.bfloat16, pdl=True)


def test_what_runs_is_said_by_operation() -> None:
    said = ops.TORCH.implementations()
    assert said["gated_sum"] == "torch"
    assert said["attention"] == "torch's libraries"
    assert set(said) == {field.name for field in fields(ops.Operations)} - {"name"}


@pytest.mark.gpu
def test_the_librarys_gelu_is_the_tanh_one() -> None:
    u, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((64, 32), (48, 32), (48,)))
    out, exact = torch.empty(64, 48, device="cuda"), torch.empty(64, 48, device="cuda", dtype=torch.float64)
    linear = ops.Linear(weight, bias)
    ops.triton_operations().linear_gelu(u, linear, out)
    reference.linear_gelu(u.double(), ops.Linear(weight.double(), bias.double()), exact)
    assert (out - exact).abs().max() < 1e-4
