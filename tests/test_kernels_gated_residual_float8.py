"""The next branch's input in float8, by the kernel and by its reference, each against float64."""

from collections.abc import Callable

import pytest
import torch
from accuracy import DEVICE, DTYPES, GUARD, Guarded, assert_accurate, in_float64, ulp
from depth import crossed
from float8 import LARGEST, half_a_step, needs_float8
from kernel_operations import Call, mapped
from stream_operands import RESIDUAL_NORM, STEP, STREAMS, residual
from torch import Tensor

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


def exact_input(call: Call) -> tuple[Tensor, float]:
    """The branch's input in float64, and by how much one that was computed in float32 may differ: the rule."""
    exact_call = in_float64(call)
    single_call = mapped(lambda _, tensor: tensor.float() if tensor.is_floating_point() else tensor, exact_call)
    exact, own = (RESIDUAL_NORM.expected(each | dict(u=torch.empty_like(each["h"])))["u"].double()
                  for each in (exact_call, single_call))  # fmt: skip
    return exact, 2 * float((own - exact).abs().max()) + 2 * ulp(exact, torch.float32)


def assert_quantised(u: Quantised, exact: Tensor, error: float) -> None:
    """That rows are the float8 numbers nearest to those of ``exact`` but for this error, by the finest scales."""
    values, scales = u.values.cpu().double(), u.scales.cpu().double().unsqueeze(-1)
    largest = exact.abs().amax(-1, keepdim=True)
    assert ((scales - largest / LARGEST).abs() <= error / LARGEST + 1e-6 * largest / LARGEST).all()
    assert (values.abs().amax(-1) == LARGEST).all()
    steps = half_a_step(exact.abs() / scales + error / scales)
    assert ((values * scales - exact).abs() <= steps * scales + 2 * error).all()


BOTH = pytest.mark.parametrize("function", [gated_residual_norm_quantise, reference.gated_residual_norm_quantise])


def alone(*shape: int) -> tuple[Call, GuardedFloat8]:
    """A float32 stream without branches, and memory for its norm in float8."""
    return residual(shape, 0, torch.float32), GuardedFloat8(shape)


def check(call: Call, function: Callable[..., None] = gated_residual_norm_quantise) -> None:
    """Hold a call against float64; the stream is as without float8."""
    before = call | dict(h=call["h"].clone(), u=torch.empty_like(call["h"]))
    own, exact = (RESIDUAL_NORM.expected(one)["h"] for one in (before, in_float64(before)))
    h, u = Guarded(call["h"].shape, call["h"].dtype, call["h"]), GuardedFloat8(call["h"].shape)
    function(**call | dict(h=h.tensor, u=u.rows))
    assert_quantised(u.written(), *exact_input(before))
    assert_accurate(h.written(), own, exact)


@crossed("shape, count, dtype", STREAMS, [0, 2], DTYPES)
def test_residual_and_float8(shape: tuple[int, int, int], count: int, dtype: torch.dtype) -> None:
    check(residual(shape, count, dtype))


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 2, 19), (7, 1, 96)], ids=str)
def test_a_last_tile_that_is_not_full(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    several = {80: ((launch.ALL, launch.Launch(rows=4, cols=0, warps=8)),)}
    monkeypatch.setattr(launch, "TABLE", {"gated_residual": several})
    check(residual(shape, 1, torch.float32))


@pytest.mark.parametrize("width", [16, 17, 19, 96])
def test_the_largest_counts_wherever_it_is(width: int) -> None:
    """The last channel's may be alone in what is left of a row beyond its largest power of two."""
    call = residual((1, 2, width), 1, torch.float32)
    call["norm"].shift[..., -1] = 100
    check(call)


def test_the_reference_by_the_same_measure() -> None:
    check(residual((3, 5, 1152), 2, torch.float32), reference.gated_residual_norm_quantise)


@BOTH
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1e4, 1e30])
def test_rows_of_any_size_use_all_of_the_format(function: Callable[..., None], size: float) -> None:
    call, u = alone(2, 3, 96)
    call["norm"].scale.fill_(-1)
    call["norm"].shift.mul_(size)  # is all that is left
    function(**call, u=u.rows)
    written = u.written()
    assert (written.values.float().abs().amax(-1) == LARGEST).all()
    vector = call["norm"].shift[STEP, int(call["at"].row_of[0])]
    torch.testing.assert_close(written.scales[0, 0], vector.abs().max() / LARGEST)


@BOTH
def test_a_row_of_zeros_is_no_division_by_zero(function: Callable[..., None]) -> None:
    call, u = alone(1, 2, 33)
    call["h"].fill_(3.0)
    call["norm"].shift.zero_()
    function(**call, u=u.rows)
    written = u.written()
    assert (written.values.float() == 0).all()
    assert (written.scales > 0).all()


@pytest.mark.parametrize("width", [19, 32, 33])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_kernel_and_reference_agree_on_what_is_no_number(value: float, width: int) -> None:
    """Of a row in which one is, and of one in which there is nothing else; none of them is lost in a product."""
    (call, ours), other = alone(1, 3, width), GuardedFloat8((1, 3, width))
    call["norm"].shift[..., 2] = value
    call["h"][0, 1, width - 1] = torch.nan
    gated_residual_norm_quantise(**call, u=ours.rows)
    reference.gated_residual_norm_quantise(**call, u=other.rows)
    (values, scales), (theirs, their_scales) = ((u.rows.values.float(), u.rows.scales) for u in (ours, other))
    torch.testing.assert_close(scales, their_scales, equal_nan=True, rtol=1e-6, atol=0)
    assert torch.equal(values.isnan(), theirs.isnan())
    assert values[0, 1].isnan().all()
    assert values[..., 2].isnan().all()
    product = (values * scales.unsqueeze(-1)) @ torch.ones(width, 1, device=DEVICE)
    assert not product.isfinite().any()


@BOTH
def test_what_is_no_number_stays_none(function: Callable[..., None]) -> None:
    call, u = alone(1, 2, 33)
    call["h"][0, 0, 7] = torch.nan
    function(**call, u=u.rows)
    assert u.rows.values[0, 0].float().isnan().all()
    assert not u.rows.values[0, 1].float().isnan().any()
