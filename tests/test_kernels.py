"""What holds for every kernel: the reference's numbers, nothing read or written beside, the step handed on.

Of all shapes and dtypes a Latin square is quick. What is particular to one kernel stands in its own file.
"""

import pytest
from accuracy import DTYPES
from depth import combinations
from float8 import needs_float8
from kernel_operations import Operation, advancing, assert_advanced, check
from step_operands import EMBED, EMBED_NORM, PREDICT, RUN, UPDATE
from stream_operands import (
    ATTENTION,
    GATHER,
    GELU,
    RESIDUAL,
    RESIDUAL_FLOAT8,
    RESIDUAL_NORM,
    SCATTER,
    SUM,
    WINDOW,
)

# inf and NaN are meant, and so is the 0 that is 1 / inf
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

EMBEDS, HEADS = (EMBED, EMBED_NORM), (PREDICT, UPDATE, RUN)
OPERATIONS = (*EMBEDS, RESIDUAL, RESIDUAL_NORM, SUM, *HEADS, GATHER, SCATTER, GELU, ATTENTION, WINDOW)
ADVANCING = [EMBED_NORM, RESIDUAL, RESIDUAL_NORM, SUM, *HEADS]


@pytest.mark.parametrize(
    ("operation", "values"),
    [
        pytest.param(operation, values, id=f"{operation}-{name}", marks=marks)
        for operation in OPERATIONS
        for name, values, marks in combinations(*operation.axes, DTYPES)
    ],
)
def test_a_call_of_any_size_and_dtype(operation: Operation, values: tuple[object, ...]) -> None:
    check(operation, operation.make(*values), values[-1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("operation", "name"),
    [pytest.param(each, name, id=f"{each}-{name}") for each in OPERATIONS for name in each.forms],
)
def test_a_call_of_another_form(operation: Operation, name: str) -> None:
    values, change, dtype = operation.forms[name]
    check(operation, change(operation.make(*values, dtype)), dtype)


@pytest.mark.parametrize("side", ["kernel", "reference"])
@pytest.mark.parametrize("operation", [*ADVANCING, pytest.param(RESIDUAL_FLOAT8, marks=needs_float8)], ids=str)
def test_the_step_advances(operation: Operation, side: str) -> None:
    call = operation.call()
    at = advancing(call["at"])
    getattr(operation, side)(**call | dict(at=at))
    assert_advanced(at)
