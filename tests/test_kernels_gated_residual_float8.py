"""The next branch's input in float8, by the kernel and by its reference, each against float64."""

from collections.abc import Callable

import pytest
import torch
from accuracy import DEVICE, DTYPES, GUARD, Guarded, assert_accurate, in_float64, ulp
from depth import crossed
from float8 import LARGEST, half_a_step, needs_float8
from step_operands import advancing, assert_advanced
from test_kernels_gated_residual import SHAPES, Case
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import launch
from ebcache_fast.kernels.gated_residual import gated_residual_norm_quantise
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Quantised

pytestmark = needs_float8

NAN = 0x7F  # of e4m3
SENTINEL = 0x55


class GuardedFloat8:
    """Rows of NaN between two guards, and their scales likewise."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        size = torch.Size(shape).numel()
        self._memory = torch.full((size + 2 * GUARD,), SENTINEL, dtype=torch.uint8, device=DEVICE)
        self._memory[GUARD:-GUARD] = NAN
        self._scales = Guarded(shape[:2], torch.float32)
        values = self._memory[GUARD:-GUARD].view(torch.float8_e4m3fn).view(shape)
        self.rows = Quantised(values, self._scales.tensor)

    def written(self) -> Quantised:
        """What was written, once the guards are whole and nothing is NaN."""
        assert (self._memory[:GUARD] == SENTINEL).all()
        assert (self._memory[-GUARD:] == SENTINEL).all()
        assert (self._memory[GUARD:-GUARD] & NAN != NAN).all()
        return Quantised(self.rows.values, self._scales.written())


def exact_input(case: Case) -> tuple[Tensor, float]:
    """The branch's input in float64, and by how much one that was computed in float32 may differ: the rule."""
    found = []
    for change in (in_float64, lambda value: _in_float32(in_float64(value))):
        h, branches, gates, norm, at = map(change, (case.h, case.branches, case.gates, case.norm, case.at))
        u = torch.empty_like(h)
        reference.gated_residual_norm_modulate(h, branches, gates, norm, at, u)
        found.append(u.double())
    exact, own = found
    return exact, 2 * float((own - exact).abs().max()) + 2 * ulp(exact, torch.float32)


def _in_float32(value: object) -> object:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_in_float32, value))
    return [_in_float32(one) for one in value] if isinstance(value, list) else value


def assert_quantised(u: Quantised, exact: Tensor, error: float) -> None:
    """That rows are the float8 numbers nearest to those of ``exact`` but for this error, by the finest scales."""
    values, scales = u.values.cpu().double(), u.scales.cpu().double().unsqueeze(-1)
    largest = exact.abs().amax(-1, keepdim=True)
    assert ((scales - largest / LARGEST).abs() <= error / LARGEST + 1e-6 * largest / LARGEST).all()
    assert (values.abs().amax(-1) == LARGEST).all()
    steps = half_a_step(exact.abs() / scales + error / scales)
    assert ((values * scales - exact).abs() <= steps * scales + 2 * error).all()


@crossed("shape, count, dtype", SHAPES, [0, 2], DTYPES)
def test_residual_and_float8(shape: tuple[int, int, int], count: int, dtype: torch.dtype) -> None:
    case = Case(shape, count, dtype)
    h, u, exact = Guarded(shape, dtype, case.h), GuardedFloat8(shape), case.exact()
    gated_residual_norm_quantise(h.tensor, case.branches, case.gates, case.norm, case.at, u.rows)
    assert_quantised(u.written(), *exact_input(case))
    reference.add_gated(own := case.h.clone(), case.branches, case.gates, case.at)
    reference.add_gated(exact.h, exact.branches, exact.gates, exact.at)
    assert_accurate(h.written(), own, exact.h)


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 2, 19), (7, 1, 96)], ids=str)
def test_a_last_tile_that_is_not_full(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    several = {80: ((launch.ALL, launch.Launch(rows=4, cols=0, warps=8)),)}
    monkeypatch.setattr(launch, "TABLE", {"gated_residual": several})
    case, u = Case(shape, 1, torch.float32), GuardedFloat8(shape)
    exact = exact_input(case)
    gated_residual_norm_quantise(case.h, case.branches, case.gates, case.norm, case.at, u.rows)
    assert_quantised(u.written(), *exact)


@pytest.mark.parametrize("width", [16, 17, 19, 96])
def test_the_largest_counts_wherever_it_is(width: int) -> None:
    """The last channel's may be alone in what is left of a row beyond its largest power of two."""
    case, u = Case((1, 2, width), 1, torch.float32), GuardedFloat8((1, 2, width))
    case.norm.shift[..., -1] = 100
    exact = exact_input(case)
    gated_residual_norm_quantise(case.h, case.branches, case.gates, case.norm, case.at, u.rows)
    assert_quantised(u.written(), *exact)


def test_the_reference_by_the_same_measure() -> None:
    case, u = Case((3, 5, 1152), 2, torch.float32), GuardedFloat8((3, 5, 1152))
    exact = exact_input(case)
    reference.gated_residual_norm_quantise(case.h, case.branches, case.gates, case.norm, case.at, u.rows)
    assert_quantised(u.written(), *exact)


BOTH = pytest.mark.parametrize("function", [gated_residual_norm_quantise, reference.gated_residual_norm_quantise])


@BOTH
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e4, 1e30])
def test_rows_of_any_size_use_all_of_the_format(function: Callable[..., None], size: float) -> None:
    case, u = Case((2, 3, 96), 0, torch.float32), GuardedFloat8((2, 3, 96))
    case.norm.scale.fill_(-1)
    case.norm.shift.mul_(size)  # is all that is left
    function(case.h, [], [], case.norm, case.at, u.rows)
    written = u.written()
    assert (written.values.float().abs().amax(-1) == LARGEST).all()
    torch.testing.assert_close(written.scales[0, 0], case.norm.shift[1, 0].abs().max() / LARGEST)


@BOTH
def test_a_row_of_zeros_is_no_division_by_zero(function: Callable[..., None]) -> None:
    case, u = Case((1, 2, 33), 0, torch.float32), GuardedFloat8((1, 2, 33))
    case.h.fill_(3.0)
    case.norm.shift.zero_()
    function(case.h, [], [], case.norm, case.at, u.rows)
    written = u.written()
    assert (written.values.float() == 0).all()
    assert (written.scales > 0).all()


@pytest.mark.parametrize("width", [19, 32, 33])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_kernel_and_reference_agree_on_what_is_no_number(value: float, width: int) -> None:
    """Of a row in which one is, and of one in which there is nothing else; none of them is lost in a product."""
    case, us = Case((1, 3, width), 0, torch.float32), [GuardedFloat8((1, 3, width)) for _ in range(2)]
    case.norm.shift[..., 2] = value
    case.h[0, 1, width - 1] = torch.nan
    for function, u in zip((gated_residual_norm_quantise, reference.gated_residual_norm_quantise), us, strict=True):
        function(case.h, [], [], case.norm, case.at, u.rows)
    (values, scales), (theirs, their_scales) = ((u.rows.values.float(), u.rows.scales) for u in us)
    torch.testing.assert_close(scales, their_scales, equal_nan=True, rtol=1e-6, atol=0)
    assert torch.equal(values.isnan(), theirs.isnan())
    assert values[0, 1].isnan().all()
    assert values[..., 2].isnan().all()
    product = (values * scales.unsqueeze(-1)) @ torch.ones(width, 1, device=DEVICE)
    assert not product.isfinite().any()


@BOTH
def test_what_is_no_number_stays_none(function: Callable[..., None]) -> None:
    case, u = Case((1, 2, 33), 0, torch.float32), GuardedFloat8((1, 2, 33))
    case.h[0, 0, 7] = torch.nan
    function(case.h, [], [], case.norm, case.at, u.rows)
    assert u.rows.values[0, 0].float().isnan().all()
    assert not u.rows.values[0, 1].float().isnan().any()


@BOTH
def test_the_step_advances(function: Callable[..., None]) -> None:
    case = Case((3, 5, 48), 2, torch.float32)
    at = advancing(case.at)
    function(case.h, case.branches, case.gates, case.norm, at, GuardedFloat8((3, 5, 48)).rows)
    assert_advanced(at)


WRONG = {
    "values in bfloat16": (lambda u: u._replace(values=u.values.bfloat16()), "must be .*float8_e4m3fn"),
    "another float8": (lambda u: u._replace(values=u.values.view(torch.float8_e5m2)), "must be .*float8_e4m3fn"),
    "shape of values": (lambda u: u._replace(values=u.values[:, :2].contiguous()), "must be"),
    "strides of values": (lambda u: u._replace(values=u.values.mT.contiguous().mT), "contiguous"),
    "scales of rows": (lambda u: u._replace(scales=u.scales[:, 0]), "must be"),
    "scales in float64": (lambda u: u._replace(scales=u.scales.double()), "must be .*float32"),
    "strides of scales": (lambda u: u._replace(scales=u.scales.mT.contiguous().mT), "contiguous"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_operands_are_refused_before_launch(name: str) -> None:
    change, message = WRONG[name]
    case = Case((2, 3, 16), 1, torch.float32)
    before = case.h.clone()
    with pytest.raises(InputError, match=message):
        gated_residual_norm_quantise(
            case.h, case.branches, case.gates, case.norm, case.at, change(GuardedFloat8((2, 3, 16)).rows)
        )
    assert torch.equal(case.h, before)
