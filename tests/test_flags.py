"""Torch's settings, which a graph keeps: a run under others has graphs of its own, and finds the first ones again."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from constants import ATTN_MLP, CPU, NO
from fake_graphs import FakeGraphs
from fake_runs import SMALLEST, Job, over, plan_of, sampling
from tiny import tiny_dit
from torch.nn.attention import SDPBackend, sdpa_kernel

from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.flags import Flags
from ebcache_fast.ops.operations import TORCH

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
WAYS = (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)
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


@contextmanager
def switched(on: Callable[[], object], off: Callable[[], object]) -> Iterator[None]:
    on()
    yield
    off()


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float32 by the old name": lambda: called(torch.set_float32_matmul_precision, "high", "highest"),
    "float32 by the new name": lambda: setting(MATMUL, "fp32_precision", "tf32"),
    "float16": lambda: setting(MATMUL, "allow_fp16_reduced_precision_reduction", False),
    "bfloat16": lambda: setting(MATMUL, "allow_bf16_reduced_precision_reduction", False),
    "float16, added up so": lambda: setting(MATMUL, "allow_fp16_accumulation", True),
    "float16 by split k": lambda: setting(MATMUL, "allow_fp16_reduced_precision_reduction", (False, False)),
    "bfloat16 by split k": lambda: setting(MATMUL, "allow_bf16_reduced_precision_reduction", (False, False)),
    "float32 everywhere": lambda: setting(torch.backends, "fp32_precision", "tf32"),
    "convolutions by the old name": lambda: setting(CUDNN, "allow_tf32", False),
    "convolutions by the new name": lambda: setting(CUDNN.conv, "fp32_precision", "ieee"),
    "products of a CPU": lambda: setting(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "no cuDNN": lambda: setting(CUDNN, "enabled", False),
    "cuDNN tries": lambda: setting(CUDNN, "benchmark", True),
    "cuDNN repeats": lambda: setting(CUDNN, "deterministic", True),
    "no oneDNN": lambda: setting(torch.backends.mkldnn, "enabled", False),
    "another default": lambda: called(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "unwritten memory": lambda: setting(torch.utils.deterministic, "fill_uninitialized_memory", False),
    "determinism": lambda: called(torch.use_deterministic_algorithms, True, False),
    "determinism, as a warning": lambda: switched(
        partial(torch.use_deterministic_algorithms, True, warn_only=True),
        partial(torch.use_deterministic_algorithms, False),
    ),
    "sums of plain attention": lambda: called(torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp, True, False),
    "another order": lambda: sdpa_kernel([*reversed(WAYS)], set_priority=True),
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
    assert Flags.now(CPU) == Flags.now(CPU)
    usual = Flags.now(CPU)
    for name, change in SETTINGS.items():
        with change():
            assert Flags.now(CPU) != usual, name
        assert Flags.now(CPU) == usual, name
    with torch.autocast("cpu", torch.bfloat16):
        assert Flags.now(CPU) != usual == Flags.now(torch.device("cuda"))


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


def test_the_attention_backend_of_diffusers_counts_where_diffusers_is_loaded() -> None:
    dispatch = pytest.importorskip("diffusers.models.attention_dispatch")
    usual = Flags.now(CPU)
    with dispatch.attention_backend("_native_math"):
        assert Flags.now(CPU) != usual
    assert Flags.now(CPU) == usual
    with setting(dispatch, "dispatch_attention_fn", None):
        assert Flags.now(CPU) != usual
