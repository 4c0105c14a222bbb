"""Torch's settings, which a graph keeps: a run under others has graphs of its own, and finds the first ones again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from fake_graphs import FakeGraphs
from fake_runs import ATTN_MLP, NO, SMALLEST, Job, over, plan_of, sampling
from tiny import tiny_dit
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.numerics import Numerics
from ebcache_fast.ops import TORCH

CPU = torch.device("cpu")
MATMUL = torch.backends.cuda.matmul
JOB = Job(plan_of((NO, ATTN_MLP)), labels=(2,))


@contextmanager
def setting(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


@contextmanager
def called(switch: Callable[[Any], object], value: object, before: object) -> Iterator[None]:
    switch(value)
    yield
    switch(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float32 by the old name": lambda: called(torch.set_float32_matmul_precision, "high", "highest"),
    "float32 by the new name": lambda: setting(MATMUL, "fp32_precision", "tf32"),
    "float16": lambda: setting(MATMUL, "allow_fp16_reduced_precision_reduction", False),
    "bfloat16": lambda: setting(MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "determinism": lambda: called(torch.use_deterministic_algorithms, True, False),
    "flash attention": lambda: sdpa_kernel([SDPBackend.FLASH_ATTENTION]),
    "no flash attention": lambda: called(torch.backends.cuda.enable_flash_sdp, False, True),
    "no efficient attention": lambda: called(torch.backends.cuda.enable_mem_efficient_sdp, False, True),
    "no plain attention": lambda: called(torch.backends.cuda.enable_math_sdp, False, True),
    "no attention of cuDNN": lambda: called(torch.backends.cuda.enable_cudnn_sdp, False, True),
}


@pytest.fixture(autouse=True)
def said_in_full() -> None:
    """As it is by default, which torch then calls by another name."""
    torch.set_float32_matmul_precision("highest")


def test_every_setting_counts() -> None:
    assert Numerics.now(CPU) == Numerics.now(CPU)
    found = [Numerics.now(CPU)]
    for change in SETTINGS.values():
        with change():
            found.append(Numerics.now(CPU))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(Numerics.now(CPU))
        assert Numerics.now(torch.device("cuda")) == found[0]
    assert len({*found}) == len(found) - 1  # two names of one setting
    assert Numerics.now(CPU) == found[0]


@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_graphs_of_other_settings_are_others(change: Callable[[], AbstractContextManager[Any]]) -> None:
    graphs = FakeGraphs()
    engine = Engine(tiny_dit(0, torch.float32, **SMALLEST), operations=graphs.wrap(TORCH), make_graphs=over(graphs))

    def captures_of_a_run() -> int:
        before = graphs.captures
        with sampling(engine, JOB) as trajectory:
            while trajectory.advance():
                pass
        return graphs.captures - before

    assert captures_of_a_run() == 2
    with change():
        assert [captures_of_a_run(), captures_of_a_run()] == [2, 0]
    assert captures_of_a_run() == 0
