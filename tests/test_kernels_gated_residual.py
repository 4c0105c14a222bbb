"""The gated residual and its modulated LayerNorm against their references, under the rule of accuracy."""

import copy
from collections.abc import Callable

import pytest
import torch
from accuracy import DEVICE, DTYPES, Guarded, assert_accurate, draw, huge_zeros, in_float64, in_place
from depth import crossed
from interpreter import only_program
from step_operands import advancing, assert_advanced
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import launch
from ebcache_fast.kernels.gated_residual import gated_residual, gated_residual_norm_modulate
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Advance, Norm, StepIndex

SHAPES = [(1, 1, 1), (2, 5, 7), (3, 3, 96), (2, 7, 131), (5, 2, 144), (2, 3, 1152)]  # (R, T, D)
STEPS, CONDITIONS, VECTORS = 3, 2, 5
EPS = 1e-6


class Case:
    """Operands of one call: vectors are views of one table, of which only step 1 is right to read."""

    def __init__(self, shape: tuple[int, int, int], count: int, dtype: torch.dtype, offset: float = 0.0) -> None:
        rows, _, width = shape
        self.h = draw(*shape, dtype=dtype, seed=1, scale=2.0, offset=offset)
        self.branches = [draw(*shape, dtype=dtype, seed=10 + k) for k in range(count)]
        table = draw(STEPS, VECTORS, CONDITIONS, width, dtype=dtype, seed=2)  # (S, vectors, U, D)
        self.gates = [table[:, k] for k in range(count)]
        self.norm = Norm(table[:, 3], table[:, 4], EPS)
        row_of = torch.arange(rows, dtype=torch.int32, device=DEVICE) % CONDITIONS
        self.at = StepIndex(torch.tensor([1], dtype=torch.int32, device=DEVICE), row_of)

    def exact(self) -> "Case":
        twin = copy.copy(self)
        for name, value in vars(self).items():
            setattr(twin, name, in_float64(value))
        return twin


def run_reference(case: Case) -> tuple[Tensor, Tensor]:
    h, u = case.h.clone(), torch.empty_like(case.h)
    reference.gated_residual_norm_modulate(h, case.branches, case.gates, case.norm, case.at, u)
    return h, u


@crossed("shape, count, dtype", SHAPES, [0, 1, 2], DTYPES)
def test_residual_and_norm(shape: tuple[int, int, int], count: int, dtype: torch.dtype) -> None:
    case = Case(shape, count, dtype)
    h, u = Guarded(shape, dtype, case.h), Guarded(shape, dtype)
    gated_residual_norm_modulate(h.tensor, case.branches, case.gates, case.norm, case.at, u.tensor)
    for ours, own, exact in zip((h, u), run_reference(case), run_reference(case.exact()), strict=True):
        assert_accurate(ours.written(), own, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vectors", [("weight", "bias"), ("weight",)], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 19), (7, 1, 96)], ids=str)
def test_a_norm_with_parameters(shape: tuple[int, int, int], vectors: tuple[str, ...], dtype: torch.dtype) -> None:
    case = Case(shape, 1, dtype)
    case.norm = case.norm._replace(**{name: draw(shape[2], dtype=dtype, seed=3) for name in vectors})
    h, u = Guarded(shape, dtype, case.h), Guarded(shape, dtype)
    gated_residual_norm_modulate(h.tensor, case.branches, case.gates, case.norm, case.at, u.tensor)
    assert_accurate(u.written(), run_reference(case)[1], run_reference(case.exact())[1])


@crossed("shape, count, dtype", [*SHAPES, (1, 2, 1031)], [1, 2], DTYPES)
def test_residual(shape: tuple[int, int, int], count: int, dtype: torch.dtype) -> None:
    case, h = Case(shape, count, dtype), Guarded(shape, dtype)
    h.tensor.copy_(case.h)
    gated_residual(h.tensor, case.branches, case.gates, case.at)
    own, exact = case.h.clone(), case.exact()
    reference.gated_residual(own, case.branches, case.gates, case.at)
    reference.gated_residual(exact.h, exact.branches, exact.gates, exact.at)
    assert_accurate(h.written(), own, exact.h)


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 2, 19), (7, 1, 96)], ids=str)
def test_a_last_tile_that_is_not_full(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From many rows on a program takes several, and the last one finds fewer."""
    several = {80: ((launch.ALL, launch.Launch(rows=4, cols=0, warps=8)),)}
    monkeypatch.setattr(launch, "TABLE", {"gated_residual": several})
    case = Case(shape, 1, torch.float32)
    h, u, alone = Guarded(shape, torch.float32, case.h), Guarded(shape, torch.float32), Guarded(shape, torch.float32)
    alone.tensor.copy_(case.h)
    gated_residual_norm_modulate(h.tensor, case.branches, case.gates, case.norm, case.at, u.tensor)
    gated_residual(alone.tensor, case.branches, case.gates, case.at)
    (own_h, own_u), (exact_h, exact_u) = run_reference(case), run_reference(case.exact())
    assert_accurate(h.written(), own_h, exact_h)
    assert_accurate(u.written(), own_u, exact_u)
    assert_accurate(alone.written(), own_h, exact_h)


def test_what_is_read_stays_as_it_was() -> None:
    case = Case((3, 5, 48), 2, torch.float32)
    operands = [*case.branches, *case.gates, case.norm.shift, case.norm.scale, case.at.step, case.at.row_of]
    before = [operand.clone() for operand in operands]
    gated_residual_norm_modulate(case.h, case.branches, case.gates, case.norm, case.at, torch.empty_like(case.h))
    assert all(map(torch.equal, operands, before))


@pytest.mark.parametrize("function", [gated_residual_norm_modulate, reference.gated_residual_norm_modulate])
def test_the_step_advances(function: Callable[..., None]) -> None:
    case = Case((3, 5, 48), 2, torch.float32)
    at = advancing(case.at)
    function(case.h, case.branches, case.gates, case.norm, at, torch.empty_like(case.h))
    assert_advanced(at)


@pytest.mark.parametrize("function", [gated_residual, reference.gated_residual])
def test_the_step_advances_without_a_norm(function: Callable[..., None]) -> None:
    case = Case((3, 5, 48), 2, torch.float32)
    at = advancing(case.at)
    function(case.h, case.branches, case.gates, at)
    assert_advanced(at)


def test_nothing_to_add_is_refused() -> None:
    case = Case((2, 3, 40), 0, torch.float32)
    with pytest.raises(InputError, match="no branch"):
        gated_residual(case.h, [], [], case.at)


def test_without_branches_the_stream_is_not_written() -> None:
    case = Case((2, 3, 40), 0, torch.float32)
    before = case.h.clone()
    gated_residual_norm_modulate(case.h, [], [], case.norm, case.at, torch.empty_like(case.h))
    assert torch.equal(case.h, before)


@pytest.mark.parametrize("offset", [1e3, -3e4])
def test_a_large_mean_costs_no_digits(offset: float) -> None:
    case = Case((2, 3, 1152), 0, torch.float32, offset=offset)
    u = torch.empty_like(case.h)
    gated_residual_norm_modulate(case.h, [], [], case.norm, case.at, u)
    assert_accurate(u, run_reference(case)[1], run_reference(case.exact())[1])


def test_a_constant_row_is_not_divided_by_zero() -> None:
    case = Case((1, 2, 33), 0, torch.float32)
    case.h.fill_(3.0)
    u = torch.empty_like(case.h)
    gated_residual_norm_modulate(case.h, [], [], case.norm, case.at, u)
    assert torch.equal(u[0], case.norm.shift[1, 0].expand(2, 33))


def test_the_epsilon_counts() -> None:
    case = Case((2, 2, 24), 0, torch.float32)
    case.h.mul_(1e-3)
    case.norm = case.norm._replace(eps=1e-2)
    u = torch.empty_like(case.h)
    gated_residual_norm_modulate(case.h, [], [], case.norm, case.at, u)
    assert_accurate(u, run_reference(case)[1], run_reference(case.exact())[1])


def test_offsets_beyond_two_to_the_31() -> None:
    width = 16
    rows = launch.parameters("gated_residual", 2**31 // width, DEVICE).rows
    tokens = 2**31 // width + rows
    case = Case((1, rows, width), 2, torch.float16)
    h, u, *branches = (huge_zeros(1, tokens, width) for _ in range(4))
    for huge, small in zip((h, *branches), (case.h, *case.branches), strict=True):
        huge[:, -rows:] = small
    with only_program(tokens // rows - 1):
        gated_residual_norm_modulate(h, branches, case.gates, case.norm, case.at, u)
    own_h, own_u = run_reference(case)
    exact_h, exact_u = run_reference(case.exact())
    assert_accurate(h[:, -rows:], own_h, exact_h)
    assert_accurate(u[:, -rows:], own_u, exact_u)
    h[:, -rows:] = case.h
    with only_program(tokens // rows - 1):
        gated_residual(h, branches, case.gates, case.at)
    assert_accurate(h[:, -rows:], own_h, exact_h)


@pytest.mark.parametrize(("where", "strides"), [((2, 0), (2**30, 16)), ((0, 4), (16, 2**29))], ids=str)
def test_tables_beyond_two_to_the_31(where: tuple[int, int], strides: tuple[int, int]) -> None:
    """A step's vectors lie there, or those of one of its conditions."""
    case = Case((1, 1, 16), 1, torch.float16)
    step, condition = where
    table = huge_zeros(2**31 + 16).as_strided((step + 1, condition + 1, 16), (*strides, 1))
    table[where] = case.gates[0][1, 0]
    at = StepIndex(*(torch.full((1,), index, dtype=torch.int32, device=DEVICE) for index in where))
    h = case.h.clone()
    gated_residual(h, case.branches, [table], at)
    own, exact = case.h.clone(), case.exact()
    reference.gated_residual(own, case.branches, case.gates, case.at)
    reference.gated_residual(exact.h, exact.branches, exact.gates, exact.at)
    assert_accurate(h, own, exact.h)


def case_with(**changes: object) -> Case:
    case = Case((2, 3, 16), 2, torch.float32)
    for name, value in changes.items():
        setattr(case, name, value)
    return case


WIDE = torch.zeros(2, 3, 32)
STEP = torch.ones(1, dtype=torch.int32)
WRONG = {
    "float64": (dict(h=torch.zeros(2, 3, 16, dtype=torch.float64)), "float64 is none of"),
    "strides": (dict(h=WIDE[:, :, ::2]), "not contiguous"),
    "shape of h": (dict(h=torch.zeros(6, 16)), "rows, tokens, channels"),
    "nothing": (dict(h=torch.zeros(0, 3, 16)), "one or more of each"),
    "shape of a branch": (dict(branches=[torch.zeros(2, 4, 16)] * 2), "must be"),
    "strides of a branch": (dict(branches=[WIDE[:, :, :16]] * 2), "not contiguous"),
    "dtype of a branch": (dict(branches=[torch.zeros(2, 3, 16, dtype=torch.float16)] * 2), "float16"),
    "three branches": (dict(branches=[WIDE] * 3, gates=[WIDE] * 3), "must be|at most 2"),
    "gates missing": (dict(gates=[]), "one gate a branch"),
    "shape of a gate": (dict(gates=[torch.zeros(3, 2, 15)] * 2), "modulation table"),
    "dtype of a gate": (dict(gates=[torch.zeros(3, 2, 16, dtype=torch.float16)] * 2), "modulation table"),
    "strides of the gates": (dict(gates=[torch.zeros(3, 2, 16), torch.zeros(3, 4, 16)[:, ::2]]), "views of one table"),
    "channels apart": (dict(gates=[torch.zeros(3, 2, 32)[:, :, ::2]] * 2), "side by side"),
    "int64 step": (dict(at=StepIndex(torch.tensor([1]), torch.zeros(2, dtype=torch.int32))), "step of shape"),
    "a float count": (dict(at=StepIndex(STEP, STEP.repeat(2), Advance(torch.zeros(1), 1))), "advance.to of shape"),
    "rows": (
        dict(at=StepIndex(torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))),
        "row_of of shape",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_operands_are_refused_before_launch(name: str) -> None:
    changes, message = WRONG[name]
    case = case_with(**{k: all_in_place(v) for k, v in changes.items()})
    u = torch.full_like(case.h, 5.0)
    before = case.h.clone()
    with pytest.raises(InputError, match=message):
        gated_residual_norm_modulate(case.h, case.branches, case.gates, case.norm, case.at, u)
    with pytest.raises(InputError, match=message):
        gated_residual(case.h, case.branches, case.gates, case.at)
    assert torch.equal(case.h, before)
    assert (u == 5.0).all()


def all_in_place(value: object) -> object:
    """A wrong operand, or several, on the device of the tests."""
    if isinstance(value, Tensor):
        return in_place(value)
    if isinstance(value, StepIndex):
        return StepIndex(value.step.to(DEVICE), value.row_of.to(DEVICE), value.advance)
    return [all_in_place(one) for one in value]  # type: ignore[attr-defined]
