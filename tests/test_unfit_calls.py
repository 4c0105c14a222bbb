"""Calls that the engine does not take: the model's own forward answers, counted; what it refuses too is our error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from constants import NO
from diffusers_kinds import DIT, SIGMA, TYPES, Kind, table_of, timesteps
from diffusers_oracle import bare, replaying, twin
from diffusers_tiny import tiny_transformer
from dropin import LABELS, TIMESTEPS, at, call, fresh_model, latents, naive_drive, plan_of
from tiny import relative_error
from torch import Tensor

from ebcache_fast import CacheTable, enable, stats
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT

pytest.importorskip("diffusers")

X = latents(fresh_model())[0]
T = at(930, 3)


@torch.no_grad()
def ask(model: Any, *args: Any, **named: Any) -> Any:
    """What it returns, or the kind of error that it raises."""
    try:
        out = model(*args, **named)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
        return error
    return getattr(out, "sample", out)


@torch.no_grad()
def latents_of(side: int, other: int, seed: int, rows: int = 2, channels: int = 4) -> Tensor:
    return torch.randn(rows, channels, side, other, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [4, 8, 12, 16, 20])
def test_other_squares_of_diffusers_dit_are_cached(side: int, dtype: torch.dtype) -> None:
    pipe = twin(bare(DIT)[0])
    pipe.transformer.to(dtype)
    ts, y = timesteps(pipe), torch.tensor([3, 7])
    oracle = replaying(pipe).transformer
    model = enable(pipe.transformer, table_of(pipe))
    for i, t in enumerate(ts):
        x = latents_of(side, side, i).to(dtype)
        named = dict(timestep=torch.full((2,), t), class_labels=y)
        ours, theirs = ask(model, x, **named), ask(oracle, x, **named)
        assert relative_error(ours, theirs) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert not stats(model).originals
    assert stats(model).hits


def test_sizes_take_turns() -> None:
    pipe = twin(bare(DIT)[0])
    ts, y = timesteps(pipe), torch.tensor([3, 7])
    oracles = {side: replaying(pipe).transformer for side in (8, 12)}
    model = enable(pipe.transformer, table_of(pipe))
    for t in ts:
        for side, oracle in oracles.items():
            named = dict(timestep=torch.full((2,), t), class_labels=y)
            x = latents_of(side, side, t)
            assert relative_error(ask(model, x, **named), ask(oracle, x, **named)) < 1e-5
    assert not stats(model).originals


ROWS = {"timestep": torch.full((2,), 749), "class_labels": torch.tensor([1, 2])}
CALLS: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "a wide picture": (latents_of(8, 16, 0), {}),
    "four tokens in a row": (latents_of(4, 16, 0), {}),
    "a side with a rest": (latents_of(10, 10, 0), {}),
    "smaller than a patch": (latents_of(3, 3, 0), {}),
    "nothing to see": (latents_of(0, 0, 0), {}),
    "other channels": (latents_of(8, 8, 0, channels=3), {}),
    "one picture without a batch": (latents_of(8, 8, 0)[0], {}),
    "no picture": (latents_of(8, 8, 0, rows=0), {name: one[:0] for name, one in ROWS.items()}),
    "another dtype": (latents_of(8, 8, 0).double(), {}),
    "one label for all": (latents_of(8, 8, 0), {"class_labels": torch.tensor([1])}),
    "one timestep for all": (latents_of(8, 8, 0), {"timestep": torch.tensor([749])}),
    "fractional labels": (latents_of(8, 8, 0), {"class_labels": torch.tensor([1.0, 2.0])}),
    "labels in two dimensions": (latents_of(8, 8, 0), {"class_labels": torch.tensor([[1, 2]])}),
    "a number for a label": (latents_of(8, 8, 0), {"class_labels": 1}),
    "a number for a timestep": (latents_of(8, 8, 0), {"timestep": 749}),
    "truths for timesteps": (latents_of(8, 8, 0), {"timestep": torch.tensor([True, True])}),
    "timesteps in two dimensions": (latents_of(8, 8, 0), {"timestep": torch.full((2, 1), 749)}),
    "three timesteps": (latents_of(8, 8, 0), {"timestep": torch.full((3,), 749)}),
    "an argument more": (latents_of(8, 8, 0), {"mask": None}),
    "a tuple": (latents_of(8, 8, 0), {"return_dict": False}),
    "attention's arguments": (latents_of(8, 8, 0), {"cross_attention_kwargs": {}}),
}  # fmt: skip


@pytest.mark.parametrize(("x", "others"), CALLS.values(), ids=CALLS)
def test_whatever_the_module_answers_is_answered(x: Tensor, others: dict[str, Any]) -> None:
    plain = tiny_transformer()
    named = ROWS | others
    theirs = ask(plain, x, **named)
    model = enable(tiny_transformer(), CacheTable([749, 249], [NO, TYPES[1]]))
    ours = ask(model, x, **named)
    if isinstance(theirs, Exception):
        assert isinstance(ours, InputError | type(theirs))
        assert not stats(model).originals
        return
    ours, theirs = (one[0] if isinstance(one, tuple) else one for one in (ours, theirs))
    assert ours.shape == theirs.shape
    done = stats(model)
    if done.originals:
        assert torch.equal(ours, theirs)
        assert not done.steps
    else:
        assert relative_error(ours, theirs) < 1e-5


@torch.no_grad()
def test_what_neither_takes_says_both() -> None:
    model = enable(tiny_transformer(), CacheTable([749, 249], [NO, TYPES[1]]))
    with pytest.raises(InputError, match=r"\(rows, 3, 8, 8\) does not fit; .*multiples of") as refused:
        model(latents_of(8, 8, 0, channels=3), **ROWS)
    assert "channels" in str(refused.value.__cause__)
    strict = enable(tiny_transformer(), CacheTable([749, 249], [NO, TYPES[1]]), strict=True)
    with pytest.raises(InputError, match="does not fit"):
        strict(latents_of(8, 16, 0), **ROWS)


@torch.no_grad()
def test_too_little_memory_for_its_own_answer_stays_what_it_is() -> None:
    model = tiny_transformer()

    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        if args[0].shape[-1] == 10:
            raise torch.OutOfMemoryError("none")

    model.pos_embed.register_forward_pre_hook(hook)
    enable(model, CacheTable([749, 249], [NO, TYPES[1]]))
    with pytest.raises(torch.OutOfMemoryError):
        model(latents_of(10, 10, 0), **ROWS)


ANSWERED: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "no latents": (X[:0], T[:0], LABELS[:0]),
    "complex timesteps": (X, T.to(torch.complex64), LABELS),
    "truths for timesteps": (X, T > 1, LABELS),
    "one label for all": (X, T, LABELS[:1]),
}


@pytest.mark.filterwarnings("ignore:Casting complex values")
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("arguments", ANSWERED.values(), ids=ANSWERED)
def test_of_the_original_layout(arguments: tuple[Tensor, ...], in_order: bool) -> None:
    plain, model = fresh_model(), enable(fresh_model(), plan_of(), in_order=in_order)
    for before in range(2):
        assert torch.equal(ask(model, *arguments), ask(plain, *arguments))
        assert [*stats(model).originals.values()] == [before + 1]
    assert relative_error(call(model, X, TIMESTEPS[0], LABELS), naive_drive(plain, [X])[0]) < 1e-12


class Masked(DiT):
    """It takes one thing more, as forks do."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        return factor * super().forward(x, t, y)


@pytest.mark.parametrize("form", [lambda one: one(X, T, LABELS, 2.0), lambda one: one(X, T, LABELS, factor=2.0)])
@torch.no_grad()
def test_an_argument_more_is_the_models_own(form: Callable[[Any], Tensor]) -> None:
    model = fresh_model()
    model.__class__ = Masked
    plain = form(model)
    enable(model, plan_of())
    assert torch.equal(form(model), plain)
    assert stats(model).originals == {"arguments that the engine does not know": 1}


@pytest.mark.parametrize("kind", [SIGMA], ids=str)
def test_text_of_a_subclass_with_an_argument_more(kind: Kind) -> None:
    pipe = kind.pipeline()
    own = type(pipe.transformer)

    class More(own):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, factor: float = 1.0, **named: Any) -> Any:
            return (factor * super().forward(*args, **named | dict(return_dict=False))[0],)

    asked = kind.call(pipe)
    pipe.transformer.__class__ = More
    with torch.no_grad():
        plain = pipe.transformer(**asked, factor=2.0)[0]
        vars(pipe.transformer).pop("forward", None)
        pipe.transformer.__class__ = own
        enable(pipe, table_of(pipe))
        pipe.transformer.__class__ = More
        assert torch.equal(pipe.transformer(**asked, factor=2.0)[0], plain)
