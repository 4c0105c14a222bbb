"""What plain pytest runs of a test's cases, and what is left to `pytest -m slow`."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from typing import Any

import pytest

EVERY = 3  # of so many combinations one is quick


def deep(*values: Any, **options: Any) -> Any:
    """A case for `pytest.mark.parametrize` that is slow."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def crossed(names: str, *axes: Iterable[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize by all combinations of the axes' values, a third of them quick."""
    cases = [pytest.param(*values, id=name, marks=marks) for name, values, marks in combinations(*axes)]
    return pytest.mark.parametrize(names.split(", "), cases)


def combinations(*axes: Iterable[Any] | Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, ...], tuple[Any, ...]]]:
    """All combinations of the axes' values, each with its id and marks: a third of them is quick.

    Those form a Latin square: every value comes in one of them, and of three axes every pair of values. The keys of a
    mapping are its values' ids.
    """
    quick = [set[int]() for _ in axes]
    for combination in product(*map(_numbered, axes)):
        places, ids, values = zip(*combination, strict=True)
        is_quick = sum(places) % EVERY == 0
        for place, seen in zip(places, quick, strict=True):
            seen.update([place] * is_quick)
        yield "-".join(ids), values, () if is_quick else (pytest.mark.slow,)
    assert all(len(seen) == len([*axis]) for seen, axis in zip(quick, axes, strict=True)), "too few values for a square"


def _numbered(axis: Iterable[Any] | Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    named = axis.items() if isinstance(axis, Mapping) else ((str(value), value) for value in axis)
    return ((place, name, value) for place, (name, value) in enumerate(named))
