"""Which prompt a call has: known again by its tensors, or by what they hold."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ebcache_fast.dropin.prompt_ids import PromptIds
from ebcache_fast.models import Conditioning


def text(seed: int = 0) -> Tensor:
    return torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ids() -> PromptIds:
    return PromptIds(2)


@pytest.fixture
def unseeing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """After a call of it, nothing may look at what tensors hold: on a GPU that waits."""

    def refuse(*_: Tensor) -> bool:
        raise AssertionError

    return lambda: monkeypatch.setattr(torch, "equal", refuse)


def test_a_model_without_prompts(ids: PromptIds) -> None:
    assert [ids.id_of(()) for _ in range(2)] == [0, 0]


def test_the_same_tensors_are_known_without_a_look_at_them(ids: PromptIds, unseeing: Callable[[], None]) -> None:
    one, mask = text(), torch.ones(2, 6)
    number = ids.id_of((one, mask, None))
    unseeing()
    assert ids.id_of((one, mask, None)) == number
    assert ids.id_of((one[:], mask.view(2, 6), None)) == number  # as whoever slices anew at each step


def test_equal_ones_have_one_id(ids: PromptIds, unseeing: Callable[[], None]) -> None:
    """Known by any of the tensors that they came in, as long as those live, and kept alive by none of this."""
    both = text(), text()
    number = ids.id_of((both[0], None))
    assert [ids.id_of((one, None)) for one in (both[1], text(), both[0])] == [number] * 3
    alive = weakref.ref(text_of_another := text())
    assert ids.id_of((text_of_another, None)) == number
    del text_of_another
    assert alive() is None
    unseeing()
    assert [ids.id_of((one, None)) for one in both] == [number] * 2


OTHERS: dict[str, Callable[[Tensor], Conditioning]] = {
    "other numbers": lambda one: (text(1), one),
    "another mask": lambda one: (one, -one),
    "no mask": lambda one: (one, None),
    "another type": lambda one: (one, one.double()),
    "another shape": lambda one: (one, one.flatten()),
    "the same memory, turned": lambda one: (one.view(2, 4, 6), one.view(2, 4, 6)),
    "the same memory in other steps": lambda one: (one, one.as_strided(one.shape, (24, 1, 6))),
    "the same memory, of another type": lambda one: (one, one.view(torch.int32)),
    "less": lambda one: (one,),
    "more": lambda one: (one, one, None),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("turned", [False, True])
def test_others_have_another_id(ids: PromptIds, other: Callable[[Tensor], Conditioning], turned: bool) -> None:
    given = text()
    first, second = ((given, given), other(given))[:: -1 if turned else 1]
    number = ids.id_of(first)
    assert len({0, number, ids.id_of(second)}) == 3
    assert ids.id_of(first) == number


def test_one_that_was_overwritten_is_what_it_holds_by_now(ids: PromptIds) -> None:
    one = text()
    number = ids.id_of((one,))
    one.copy_(text(1))
    other = ids.id_of((one,))
    assert other != number
    assert ids.id_of((text(),)) == number
    one.copy_(text())
    assert ids.id_of((one,)) == number


def test_whose_writes_torch_does_not_count_is_looked_at(ids: PromptIds) -> None:
    with torch.inference_mode():
        one = text()
        number = ids.id_of((one,))
        assert ids.id_of((one,)) == number
        one.neg_()
        assert ids.id_of((one,)) != number


def test_those_used_last_are_kept(ids: PromptIds) -> None:
    kept: list[Conditioning] = [(text(seed),) for seed in range(4)]
    first, second = map(ids.id_of, kept[:2])
    assert ids.id_of(kept[0]) == first
    third = ids.id_of(kept[2])
    assert [ids.id_of(kept[k]) for k in (0, 2)] == [first, third]
    assert ids.id_of(kept[1]) not in (first, second, third)


def test_those_in_use_are_kept_beyond_the_limit(ids: PromptIds) -> None:
    kept: list[Conditioning] = [(text(seed),) for seed in range(5)]
    numbers = [ids.id_of(one, lambda: {1, 2, 3}) for one in kept]
    assert [ids.id_of(one, lambda: {1, 2, 3}) for one in kept[:3]] == numbers[:3]
    assert ids.id_of(kept[3], lambda: {1, 2, 3}) not in numbers
