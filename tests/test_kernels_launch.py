"""How kernels are launched: what a card lacks is found before, and every launch says how to round."""

from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import GridExecutor

from bench.kernel_cases import CALLS
from bench.kernel_operands import LETTERS, PATCH_8, WIDE, XL_256, KernelOperands, ModelSizes
from ebcache_fast.kernels import launch
from ebcache_fast.kernels.launch import Launch

META = torch.device("meta")
KERNELS = {
    "_attention_kernel", "_embed_kernel", "_embed_norm_kernel", "_move_kernel", "_norm_kernel", "_predict_kernel",
    "_residual_kernel", "_run_kernel", "_sum_kernel", "_tma_kernel", "_update_kernel",
}  # fmt: skip
BYTES = {80: 166_912, 86: 101_376, 87: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376, 121: 101_376}
UNKNOWN = (88, 110, 130)  # archs that came after the table was made, or were left out of it


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """The name and the options of each launch; nothing is run."""
    seen: list[tuple[str, dict[str, Any]]] = []
    note = lambda self, *_, **options: seen.append((self.fn.__name__, options))  # noqa: E731
    monkeypatch.setattr(GridExecutor, "__call__", note)
    return seen


def call(name: str, model: ModelSizes = LETTERS, samples: int = 1, dtype: torch.dtype = torch.float32) -> None:
    CALLS[name](KernelOperands(model, samples, dtype, META))


def on_arch(arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "arch_of", lambda device: arch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")
def test_every_launch_rounds_a_product_and_its_sum_once(
    launched: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CALLS:
        call(name)
    on_arch(80, monkeypatch)
    call("linear, GELU")
    assert {name for name, _ in launched} == KERNELS | {"_pointer_kernel"}
    assert all(options["enable_fp_fusion"] is True for _, options in launched)


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is interpreted where there is a GPU")
@pytest.mark.parametrize("arch", [80, 86, 90, 100, 120, *UNKNOWN])
def test_whatever_is_launched_fits_the_card(
    arch: int, launched: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or is refused before, which torch's operations then answer."""
    bounds, fit = [], launch.fit

    def fit_and_note(chosen: Launch, device: torch.device, shared: Any) -> Launch:
        fitting = fit(chosen, device, shared)
        bounds.append(shared(fitting))
        return fitting

    monkeypatch.setattr(launch, "fit", fit_and_note)
    on_arch(arch, monkeypatch)
    refused = set()
    for model, samples in ((XL_256, 1), (XL_256, 32), (LETTERS, 1), (PATCH_8, 1), (WIDE, 32)):
        for dtype in (torch.float32, torch.bfloat16):
            for name in CALLS:
                try:
                    call(name, model, samples, dtype)
                except OutOfResources:
                    refused.add((name.partition(",")[0].partition(" of")[0], model.name, dtype))
    assert len(bounds) == len(launched)
    assert max(bounds) <= BYTES.get(arch, 101_376)
    assert all(options["num_warps"] <= 8 for _, options in launched)  # each thread can have 255 registers
    assert refused == {(name, PATCH_8.name, torch.float32) for name in ("embed", "run")}


@pytest.mark.parametrize(("arch", "stages"), [(80, 5), (86, 4), (89, 4), (90, 5), (100, 5), (120, 4), (999, 4)])
def test_three_sums_in_float32_have_as_many_stages_as_the_card_holds(
    arch: int, stages: int, launched: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_arch(arch, monkeypatch)
    call("sum for 3 steps", XL_256)
    call("sum for 3 steps", XL_256, dtype=torch.bfloat16)
    assert [options["STAGES"] for _, options in launched] == [stages, 5]


@pytest.mark.parametrize(("arch", "like"), [(80, 80), (86, 80), (89, 80), (90, 90), (103, 100), (120, 80), (200, 80)])
def test_a_card_takes_the_entries_of_its_own_kind(arch: int, like: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {kind: Launch(rows=kind, cols=16, warps=4) for kind in (80, 90, 100)}
    monkeypatch.setattr(launch, "TABLE", {"any": {kind: ((launch.ALL, one),) for kind, one in entries.items()}})
    on_arch(arch, monkeypatch)
    assert launch.parameters("any", 5, META) == entries[like]


def test_what_fits_in_no_way_says_what_it_needs() -> None:
    with pytest.raises(OutOfResources, match=r"shared memory, Required: 400000, Hardware limit: 232448"):
        launch.fit(Launch(16, 128, 4, 3), META, lambda chosen: 400_000)
    assert launch.fit(Launch(16, 128, 4, 3), META, lambda chosen: chosen.stages * 100_000).stages == 2


@pytest.mark.parametrize(
    ("width", "rows", "warps"), [(1152, 4, 8), (4096, 4, 8), (4097, 2, 8), (8192, 2, 8), (16384, 1, 8)]
)
def test_whole_rows_stay_in_registers(width: int, rows: int, warps: int) -> None:
    chosen = launch.fit_rows(Launch(rows=4, cols=0, warps=8), width, META)
    assert (chosen.rows, chosen.warps) == (rows, warps)


def test_one_wide_row_has_more_warps_or_is_too_wide() -> None:
    assert launch.fit_rows(Launch(rows=1, cols=0, warps=4), 8192, META).warps == 4
    assert launch.fit_rows(Launch(rows=1, cols=0, warps=4), 8193, META).warps == 8
    with pytest.raises(OutOfResources, match="Required: 16385, Hardware limit: 16384"):
        launch.fit_rows(Launch(rows=1, cols=0, warps=4), 16385, META)
