"""The path search: the shortest path against all plans there are, and a forecast's error against its definition."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebcache_fast.calibration.path_search import Measurement, best_path
from ebcache_fast.errors import InputError


def measurement(steps: int, window: int, seed: int) -> tuple[Measurement, np.ndarray]:
    """A measurement of vectors drawn at random, and the vectors: (S, S, 7) changes at step k by what step i had."""
    rng = np.random.default_rng(seed)
    changes = rng.standard_normal((steps, steps, 7)) * np.arange(1, steps + 1)[:, None, None]
    gram = np.zeros((steps, window, window))
    for k in range(steps):
        ages = range(1, min(window, k) + 1)
        for a in ages:
            for b in ages:
                gram[k, a - 1, b - 1] = np.mean(changes[k, k - a] * changes[k, k - b])
    return Measurement(gram, rng.standard_normal(steps), rng.uniform(0.1, 3, steps)), changes


def polynomial(points: list[int], now: int) -> list[float]:
    """Factors of the values at these points in the polynomial through them: by a linear system, for a few points."""
    powers = np.vander(np.array(points, float), len(points), increasing=True)
    return list(np.linalg.solve(powers.T, float(now) ** np.arange(len(points))))


def cost_by_hand(
    measured: Measurement, changes: np.ndarray, plan: tuple[int, ...], order: int, exponent: float
) -> float:
    """The cost of one plan, from the vectors themselves; infinite where a forecast looks back beyond the window."""
    total, run = 0.0, 0.0
    for k in range(measured.steps):
        if k in plan:
            total, run = total + run**2, 0.0
            continue
        kept = [i for i in plan if i < k][::-1][: order + 1]
        if k - kept[-1] > measured.window:
            return np.inf
        error = sum(f * changes[k, i] for f, i in zip(polynomial(kept, k), kept, strict=True))
        run += abs(measured.on_eps[k]) * measured.growth[k] ** exponent * np.sqrt(np.mean(error**2))
    return total + run**2


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 8),
    window=st.integers(1, 7),
    order=st.integers(0, 2),
    exponent=st.sampled_from([1.0, 0.5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_path_is_the_best_of_all_plans(steps: int, window: int, order: int, exponent: float, seed: int) -> None:
    measured, changes = measurement(steps, window, seed)
    for computed in range(measured.fewest, steps + 1):
        costs = {
            (0, *rest): cost_by_hand(measured, changes, (0, *rest), order, exponent)
            for rest in combinations(range(1, steps), computed - 1)
        }
        least, path = min(costs.values()), best_path(measured, computed, order, exponent)
        if not np.isfinite(least):  # the window is too short for so few steps at this order
            assert order > 0
            assert path is None
            continue
        assert path is not None
        assert path.cost**2 == pytest.approx(least, rel=1e-6, abs=1e-12)
        assert costs[path.computed] == pytest.approx(least, rel=1e-6, abs=1e-12)


@given(seed=st.integers(0, 2**32 - 1), kept=st.lists(st.integers(0, 6), min_size=1, max_size=3, unique=True))
def test_an_error_is_that_of_the_polynomial(seed: int, kept: list[int]) -> None:
    measured, changes = measurement(8, 7, seed)
    recent = sorted(kept, reverse=True)
    error = sum(f * changes[7, i] for f, i in zip(polynomial(recent, 7), recent, strict=True))
    assert measured.error(recent, 7) == pytest.approx(float(np.sqrt(np.mean(error**2))), rel=1e-6)


@pytest.mark.parametrize("computed", [0, 2, 9])
def test_a_count_out_of_reach(computed: int) -> None:
    measured, _ = measurement(8, 2, 0)
    with pytest.raises(InputError, match=rf"^computed={computed} is outside \[3, 8\]: a forecast .* back 2 at most$"):
        best_path(measured, computed, 1, 1.0)
