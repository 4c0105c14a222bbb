"""Copies, differences, chosen tokens and windows against loops in plain Python, and as parts of a captured graph."""

import math
from collections.abc import Callable

import pytest
import torch
from fake_graphs import FakeGraphs
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops import reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1, 1), (2, 7, 3, 5), (3, 16, 16, 8), (2, 37, 12, 4)]  # (R, T, k, D)
NAN, INF = math.nan, math.inf


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def selected(scores: Tensor, k: int) -> list[list[int]]:
    chosen = torch.full((len(scores), k), -1, dtype=torch.int32)
    reference.select_tokens(scores, k, chosen)
    return chosen.tolist()  # type: ignore[no-any-return]


def by_the_rule(scores: list[float], k: int) -> list[int]:
    """A NaN comes before any number, a larger number before a smaller, a lower index before a higher."""

    def comes_before(i: int, j: int) -> bool:
        one, other = scores[i], scores[j]
        if math.isnan(one) != math.isnan(other):
            return math.isnan(one)
        return one > other or (not one < other and i < j)

    ranks = [sum(comes_before(j, i) for j in range(len(scores)) if j != i) for i in range(len(scores))]
    return [i for i, rank in enumerate(ranks) if rank < k]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_scores_are_chosen(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, tokens, k, _ = shape
    scores = draw(rows, tokens, dtype=dtype)
    assert selected(scores, k) == [by_the_rule(row, k) for row in scores.tolist()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 4, 7, 13, 22, 31, 39, 40])
def test_ties_and_scores_that_are_no_numbers_have_their_place(k: int, dtype: torch.dtype) -> None:
    """Eight values in 40 places, so that a bound goes through the midst of equal ones, NaN among them."""
    values = torch.tensor([-INF, -1.5, -0.0, 0.0, 2.0, INF, NAN, -NAN], dtype=dtype)
    scores = values[torch.randint(8, (5, 40), generator=torch.Generator().manual_seed(k))]
    assert selected(scores, k) == [by_the_rule(row, k) for row in scores.tolist()]


def test_equal_scores_of_a_long_row_are_chosen_from_the_front() -> None:
    """Longer than any block that a library sorts by itself."""
    assert selected(torch.zeros(2, 40_000), 20_000) == [list(range(20_000))] * 2


def test_scores_may_be_a_view_and_stay_as_they_are() -> None:
    memory = draw(9, 4, 3)
    before, scores = memory.clone(), memory[:, 1].t()  # (3, 9)
    assert selected(scores, 4) == [by_the_rule(row, 4) for row in scores.tolist()]
    assert torch.equal(memory, before)


@pytest.mark.parametrize("k", [-1, 0, 8])
def test_more_tokens_than_there_are_or_none_are_refused(k: int) -> None:
    with pytest.raises(InputError, match=rf"^{k} tokens .* choose 1 to 7"):
        reference.select_tokens(draw(2, 7), k, torch.zeros(2, max(k, 0), dtype=torch.int32))


@pytest.mark.parametrize("shape", [(2, 4), (2, 1), (1, 3), (3,)])
def test_a_choice_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    chosen = torch.full(shape, 9, dtype=torch.int32)
    with pytest.raises(InputError, match="rows, tokens chosen"):
        reference.select_tokens(draw(2, 7), 3, chosen)
    assert (chosen == 9).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_gathered_and_scattered(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, tokens, k, width = shape
    stream, target = draw(rows, tokens, width, dtype=dtype), draw(rows, tokens, width, dtype=dtype, seed=1)
    before, expected = stream.clone(), target.clone()
    chosen = draw(rows, tokens, seed=2).argsort(dim=1)[:, :k].int()
    out = torch.full((rows, k, width), NAN, dtype=dtype)
    reference.gather_tokens(stream, chosen, out)
    reference.scatter_tokens(out, chosen, target)
    for r, row in enumerate(chosen.tolist()):
        for i, token in enumerate(row):
            assert torch.equal(out[r, i], stream[r, token])
            expected[r, token] = stream[r, token]
    assert torch.equal(target, expected)
    assert torch.equal(stream, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_and_differences(dtype: torch.dtype) -> None:
    one, other, out, kept = (draw(2, 3, 5, dtype=dtype, seed=seed) for seed in range(4))
    differences = [a - b for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)]
    expected = torch.tensor(differences, dtype=torch.float64).view(2, 3, 5).to(dtype)
    reference.subtract(one, other, out)
    reference.copy(out, kept)
    assert torch.equal(out, expected)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("into", [0, 1])
def test_a_difference_may_take_the_place_of_what_it_is_of(into: int) -> None:
    pair = [draw(2, 3, 5), draw(2, 3, 5, seed=1)]
    expected, address, other = pair[0] - pair[1], pair[into].data_ptr(), pair[1 - into].clone()
    reference.subtract(*pair, pair[into])
    assert torch.equal(pair[into], expected)
    assert pair[into].data_ptr() == address
    assert torch.equal(pair[1 - into], other)


def attended(q: Tensor, k: Tensor, v: Tensor, reach: int) -> Tensor:
    """One head (T, d), token by token, by the formula."""
    out = torch.zeros_like(q)
    for i in range(len(q)):
        near = [j for j in range(len(k)) if abs(i - j) <= reach]
        weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(q.shape[1])) for j in near]
        out[i] = sum(weight * v[j] for weight, j in zip(weights, near, strict=True)) / sum(weights)
    return out


@pytest.mark.parametrize(("window", "reach"), [(1, 0), (2, 1), (3, 1), (4, 2), (9, 4), (10, 5), (22, 11), (10**9, 11)])
def test_a_window_reaches_half_of_it_on_either_side(window: int, reach: int) -> None:
    q, k, v, out = (draw(2, 3, 11, 4, seed=seed) for seed in range(4))
    reference.window_attention(q, k, v, window, out)
    for n in range(2):
        for head in range(3):
            expected = attended(q[n, head], k[n, head], v[n, head], reach)
            torch.testing.assert_close(out[n, head], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_window_of_one_token_is_its_value(dtype: torch.dtype) -> None:
    q, k, v, out = (draw(2, 3, 11, 4, dtype=dtype, seed=seed) for seed in range(4))
    reference.window_attention(q, k, v, 1, out)
    assert torch.equal(out, v)


@pytest.mark.parametrize("window", [0, -3])
def test_an_empty_window_is_refused(window: int) -> None:
    x = draw(1, 1, 5, 4)
    with pytest.raises(InputError, match=f"^a window of {window} tokens"):
        reference.window_attention(x, x, x, window, torch.empty_like(x))


class Step:
    """All of them, one after another; some take what another has left."""

    def __init__(self) -> None:
        self.stream, self.kept, self.target, self.scores = draw(2, 9, 4), draw(2, 3, 4), draw(2, 9, 4), draw(2, 9)
        self.chosen, self.tokens, self.copied = torch.zeros(2, 3, dtype=torch.int32), draw(2, 3, 4), draw(2, 9, 4)
        self.out = draw(2, 3, 9, 4)
        self.static = list(vars(self).values())
        heads = self.stream.unsqueeze(1).expand(2, 3, 9, 4)
        self.attended = heads, heads, heads

    def run(self, operations: ops.Operations) -> None:
        operations.select_tokens(self.scores, 3, self.chosen)
        operations.gather_tokens(self.stream, self.chosen, self.tokens)
        operations.subtract(self.tokens, self.kept, self.tokens)
        operations.scatter_tokens(self.tokens, self.chosen, self.target)
        operations.window_attention(*self.attended, 4, self.out)
        operations.copy(self.target, self.copied)


@pytest.mark.parametrize("whole", [False, True])
def test_a_graph_chooses_anew_at_each_replay(whole: bool) -> None:
    """As single operations none of which waits for the device, and each as one launch."""
    eager, captured, graphs = Step(), Step(), FakeGraphs()
    recorded = graphs.wrap(ops.TORCH) if whole else ops.TORCH
    graph = graphs.capture(lambda: captured.run(recorded), captured.static)
    for seed in (5, 6):
        for step, run in ((eager, lambda: eager.run(ops.TORCH)), (captured, graph.replay)):
            step.scores.copy_(draw(2, 9, seed=seed))
            run()
        assert all(map(torch.equal, eager.static, captured.static))


OPERATIONS: tuple[Callable[[], ops.Operations], ...] = (lambda: ops.TORCH, ops.triton_operations)


@pytest.mark.parametrize("make", OPERATIONS)
def test_whole_tensors_and_choices_are_the_librarys_everywhere(make: Callable[[], ops.Operations]) -> None:
    operations = make()
    for name in ("copy", "subtract", "select_tokens"):
        assert getattr(operations, name) is getattr(reference, name)
