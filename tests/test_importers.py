"""Importers, tried on tables like those that other projects released, and on what is none of them."""

from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from constants import ATTENTION, ATTN_MLP, MLP, NO
from hypothesis import given
from hypothesis import strategies as st

from ebcache_fast.errors import TableError
from ebcache_fast.plan import COMPUTE, REUSE
from ebcache_fast.plan.importers import (
    eps_scale_from_adm,
    eps_scale_from_eb_delta,
    eps_scale_of,
    from_eb_npy,
    from_smoothcache,
)

C, R = COMPUTE, REUSE
T50 = range(49, -1, -1)
T4 = (30, 20, 10, 0)

# EB-Cache's released table, as its array stands in the file.
RELEASED = [0, 2, 2, 0, 2, 2, 0, 2, 2, 2, *[0, 2] * 9, *[0] * 22]


def npy(path: Path, array: object) -> Path:
    np.save(path, np.asarray(array), allow_pickle=True)
    return path


# EB-Cache


def test_the_released_array_runs_its_first_entry_first(tmp_path: Path) -> None:
    table = from_eb_npy(npy(tmp_path / "t.npy", RELEASED), T50)
    assert table.step_types == tuple(RELEASED)
    assert table.timesteps == tuple(T50)
    assert Counter(table.step_types) == {NO: 34, ATTN_MLP: 16}
    assert max(table.timesteps[i] for i, t in enumerate(table.step_types) if t is ATTN_MLP) == 48
    # The hand rule that the array follows in this order, and in no other.
    rule = [i == 49 or i < 10 or (49 - i) % (3 if i > 40 else 2 if i > 20 else 1) == 0 for i in T50]
    assert [t is NO for t in table.step_types] == rule


def test_order_index_reproduces_the_release(tmp_path: Path) -> None:
    table = from_eb_npy(npy(tmp_path / "t.npy", RELEASED), T50, order="index")
    assert [table.step_type_at(i) for i in range(50)] == RELEASED
    assert all(i < 28 for i in T50 if table.step_type_at(i) is ATTN_MLP)
    assert table != from_eb_npy(tmp_path / "t.npy", T50)


def test_an_import_says_where_it_comes_from(tmp_path: Path) -> None:
    made = from_eb_npy(npy(tmp_path / "t.npy", [0, 1]), [1, 0], order="execution").made
    assert made is not None
    assert (made.source, made.options) == ("t.npy", {"order": "execution"})


@pytest.mark.parametrize("dtype", ["int64", "uint8", ">i4"])
def test_all_codes_and_integer_types(dtype: str, tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", np.array([0, 1, 2, 3], dtype))
    assert from_eb_npy(path, T4).step_types == (NO, ATTENTION, ATTN_MLP, MLP)


@pytest.mark.parametrize(
    ("array", "problem"),
    [
        ([0.0, 2.0, 0.0, 0.0], "expected a 1-D array of integers 0 to 3, got float64"),
        ([False, True, True, True], "expected a 1-D array of integers 0 to 3, got bool"),
        ([[0, 2], [0, 2]], r"expected a 1-D .* of shape \(2, 2\)"),
        (np.array(0), r"expected a 1-D .* of shape \(\)"),
        (["0", "2"], "expected a 1-D array of integers"),
        ([0, 7, 0, 0], r"step_types\[1\]: expected an integer from 0 to 3, got 7"),
        ([0, -1, 0, 0], r"step_types\[1\]: .* got -1"),
        ([0, 2, 0], "step_types: expected 4, one per timestep, got 3"),
        ([0, 2, 0, 0, 0], "step_types: expected 4, one per timestep, got 5"),
        ([2, 2, 0, 0], r"step_types\[0\]: expected NO_CACHE"),
        (np.array([0, None, 2], dtype=object), "expected a .npy array, saved without pickle: "),
    ],
)
def test_a_wrong_array_is_refused(array: object, problem: str, tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", array)
    with pytest.raises(TableError, match=rf"^{path}: {problem}"):
        from_eb_npy(path, T4)


def test_an_order_that_starts_with_a_cached_step_is_refused(tmp_path: Path) -> None:
    path = npy(tmp_path / "t.npy", [0, 0, 0, 2])
    assert from_eb_npy(path, T4).step_types[-1] is ATTN_MLP
    with pytest.raises(TableError, match=r"step_types\[0\]: expected NO_CACHE, got ATTN_MLP"):
        from_eb_npy(path, T4, order="index")
    with pytest.raises(TableError, match="order: expected one of execution, index, got 'reversed'"):
        from_eb_npy(path, T4, order="reversed")


def archive() -> bytes:
    buffer = BytesIO()
    np.savez(buffer, np.zeros(4, int))
    return buffer.getvalue()


def with_header(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


EIGHT_EXBIBYTES = with_header("{'descr': '<i8', 'fortran_order': False, 'shape': (1152921504606846976,)}\n")
LONG_HEADER = with_header(" " * 20_000)  # numpy's message on it has two lines


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", archive(), EIGHT_EXBIBYTES, LONG_HEADER, b"0, 2, 2", b"\x80\x04."]
)
def test_a_file_that_is_no_array_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(TableError, match=r"t\.npy: expected a \.npy array, saved without pickle: .") as caught:
        from_eb_npy(tmp_path / "t.npy", T4)
    assert "\n" not in str(caught.value)


@given(start=st.integers(0, 160), length=st.integers(0, 4), instead=st.binary(max_size=4))
def test_a_damaged_array_is_refused_or_read_as_numpy_reads_it(
    start: int, length: int, instead: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    buffer = BytesIO()
    np.save(buffer, np.array([0, 2, 1, 3]))
    whole = buffer.getvalue()
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    path.write_bytes(whole[:start] + instead + whole[start + length :])
    try:
        table = from_eb_npy(path, T4)
    except TableError as error:
        problem = str(error)
    else:
        problem = ""
        assert table.step_types == tuple(np.load(path))
    assert "\n" not in problem


# Noise scaling


def test_scales_that_divide_become_ones_that_multiply() -> None:
    assert eps_scale_from_adm(1.005) == 1 / 1.005
    assert eps_scale_from_eb_delta(0.965) == pytest.approx(1.0362694)
    assert eps_scale_from_adm(1) == 1.0


@pytest.mark.parametrize("convert", [eps_scale_from_adm, eps_scale_from_eb_delta])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), 5e-324])
def test_scales_that_can_not_divide_are_refused(convert: Callable[[float], float], value: float) -> None:
    with pytest.raises(TableError, match=r"^(lam|delta): expected a finite number above 0, got "):
        convert(value)


def test_one_of_three_conventions_gives_b() -> None:
    assert eps_scale_of(None) == 1.0
    assert eps_scale_of(0.955) == 0.955
    assert eps_scale_of(None, adm_lambda=1.25) == eps_scale_of(None, eb_delta=1.25) == 0.8
    for several in ((0.9, 1.1, None), (0.9, None, 0.965), (None, 1.1, 0.965), (1.0, 1.0, 1.0)):
        with pytest.raises(TableError, match=r"^eps_scale, adm_lambda and eb_delta all mean b; give one"):
            eps_scale_of(*several)


def test_the_released_amplification_needs_the_flag(tmp_path: Path) -> None:
    b = eps_scale_from_eb_delta(0.965)
    path = npy(tmp_path / "t.npy", [0, 2])
    with pytest.raises(TableError, match=r"eps_scale: .* with allow_amplify"):
        from_eb_npy(path, [1, 0], eps_scale=b)
    assert from_eb_npy(path, [1, 0], eps_scale=b, allow_amplify=True).eps_scale == b
    schedule = tmp_path / "s.json"
    schedule.write_text('{"attn": [1, 0]}')
    with pytest.raises(TableError, match=r"eps_scale: .* with allow_amplify"):
        from_smoothcache(schedule, [1, 0], eps_scale=b)
    assert from_smoothcache(schedule, [1, 0], eps_scale=b, allow_amplify=True).eps_scale == b
