"""Kernels that can't be launched: torch's operations answer, which is said once, or it is an error."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, NO
from fake_graphs import FakeGraphs
from tiny import tiny_dit
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ebcache_fast.apps import console
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import CaptureError, InputError
from ebcache_fast.ops import fallback
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops.fallback import KERNELS, Fallback
from ebcache_fast.plan import Plan
from ebcache_fast.samplers import make_sampler, trajectory_noise

TYPES = [NO, ATTENTION, ATTN_MLP, ATTN_MLP, NO, ATTN_MLP]
LABELS = torch.tensor([1, 3])
FAILURES = {
    "no compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nLong story."),
    "no driver": RuntimeError("0 active drivers ([]). There should only be one."),
    "folder": PermissionError(13, "Permission denied", "/.triton/cache"),
    "assembler": OSError("Cannot find ptxas"),
}


@pytest.fixture(autouse=True)
def anew() -> None:
    ops.say_once.cache_clear()


def failing(error: Exception, names: tuple[str, ...] = KERNELS, *, after: int = 0) -> ops.Operations:
    """Triton's operations on a CPU: torch's, of which these raise at a call and ever after."""
    calls = 0

    def launcher(name: str) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            nonlocal calls
            calls += 1
            if name in names and calls > after:
                raise error
            getattr(ops.TORCH, name)(*args)

        return launch

    return replace(ops.TORCH, name="triton", **{name: launcher(name) for name in KERNELS})  # type: ignore[arg-type]


@torch.no_grad()
def sampled(
    operations: ops.Operations, patch: pytest.MonkeyPatch, options: EngineOptions | None = None, graphs: Any = None
) -> tuple[Tensor, Engine]:
    """Our own loop where these are selected."""
    patch.setattr(ops, "select", lambda *_, **__: operations)
    model, stepper = tiny_dit(5, torch.float32, depth=2), make_sampler("ddpm", len(TYPES))
    engine = Engine(model, options, make_graphs=lambda device: graphs)
    noise = trajectory_noise(7, range(2), len(TYPES), engine.denoiser.latent_shape)
    plan = Plan.from_types(TYPES, stepper.timesteps, engine.denoiser.shape.sites, 0.98)
    with engine.sampling(plan, LABELS, Guidance(1.5), torch.tensor(stepper.rows), noise) as run:
        while run.advance():
            pass
        return run.x.clone(), engine


@pytest.mark.parametrize("what", FAILURES)
def test_torch_answers_everything_where_nothing_can_be_launched(
    what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = sampled(ops.TORCH, monkeypatch)
    with caplog.at_level(logging.WARNING):
        x, engine = sampled(failing(FAILURES[what]), monkeypatch)
        again, _ = sampled(failing(FAILURES[what]), monkeypatch)
    assert torch.equal(x, expected)
    assert torch.equal(again, expected)
    (record,) = caplog.records
    first_line = str(FAILURES[what]).splitlines()[0]
    assert record.getMessage().endswith(first_line)
    said = engine.stats.operations
    assert {said[name] for name in KERNELS} == {f"torch: {type(FAILURES[what]).__name__}: {first_line}"}


@pytest.mark.parametrize("after", range(1, 12))
def test_a_step_that_fails_half_way_is_neither_done_twice_nor_left_out(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = sampled(ops.TORCH, monkeypatch)
    x, engine = sampled(failing(FAILURES["no driver"], after=after), monkeypatch)
    assert torch.equal(x, expected)
    assert set(engine.stats.steps) == {"NO_CACHE", "ATTENTION", "ATTN_MLP"}


@pytest.mark.parametrize("after", [0, 3])
def test_graphs_are_captured_of_what_answers(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = sampled(ops.TORCH, monkeypatch)
    x, engine = sampled(failing(FAILURES["folder"], after=after), monkeypatch, graphs=FakeGraphs())
    assert torch.equal(x, expected)
    assert engine.stats.replays > 0
    assert not engine.stats.eager


def test_what_is_too_large_for_the_card_is_the_only_operation_that_torch_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = sampled(ops.TORCH, monkeypatch)
    error = OutOfResources(131_072, 101_376, "shared memory")
    with caplog.at_level(logging.WARNING):
        x, engine = sampled(failing(error, ("gated_sum",)), monkeypatch)
    assert torch.equal(x, expected)
    (record,) = caplog.records
    assert "gated_sum is too large for the card" in record.getMessage()
    assert "Required: 131072, Hardware limit: 101376" in record.getMessage()
    said = engine.stats.operations
    assert [name for name in KERNELS if said[name] != "triton"] == ["gated_sum"]


@pytest.mark.parametrize("error", [FAILURES["no compiler"], OutOfResources(2, 1, "shared memory")], ids=["all", "one"])
@pytest.mark.parametrize("graphs", [False, True])
def test_strict_names_the_reason_and_the_remedy(
    error: Exception, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations = failing(error, ("gated_sum",))
    with pytest.raises(CaptureError, match=r"kernel could not be launched \(.*(C compiler|Required: 2).*strict=False"):
        sampled(operations, monkeypatch, EngineOptions(strict=True), FakeGraphs() if graphs else None)


@pytest.mark.parametrize("error", [InputError("not contiguous"), torch.OutOfMemoryError("no memory")])
def test_errors_that_are_not_of_the_launch_are_not_torchs_to_answer(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error), match=str(error)):
        sampled(failing(error), monkeypatch)


def test_torchs_operations_are_as_they_were() -> None:
    assert Fallback(ops.TORCH).operations == ops.TORCH


def test_a_triton_that_does_not_load_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libtriton.so: undefined symbol")

    monkeypatch.setattr(ops, "import_module", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert "undefined symbol" in str(ops.why_torch(torch.device("cuda"), torch.float32))
    assert ops.select(torch.device("cuda"), torch.float32) is ops.TORCH


def test_info_tries_a_launch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fallback.ops, "select", lambda *_: failing(FAILURES["no compiler"]))
    console.print_info()
    printed = capsys.readouterr().out
    assert "  gated_sum: torch: RuntimeError: Failed to find C compiler." in printed
