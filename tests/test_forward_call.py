"""What a call may be made with: any layout of memory, labels and latents that the model has, and nothing else."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dropin import LABELS, assert_close, at, call, drive, fresh_model, guided_rows, latents, naive_drive, plan_of
from torch import Tensor

from ebcache_fast import disable, enable, stats
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT

MODEL = fresh_model()
X = latents(MODEL)[0]
T = at(930, 3)


@pytest.fixture(params=[False, True], ids=["", "in_order"])
def model(request: pytest.FixtureRequest) -> Iterator[DiT]:
    """The model, enabled."""
    yield enable(MODEL, plan_of(), in_order=request.param)
    disable(MODEL)


def strided(x: Tensor) -> Tensor:
    """The same numbers, every second in memory."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": strided,
    "expanded": lambda x: x[:1].expand_as(x),
    "requires_grad": lambda x: x.clone().requires_grad_(),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_latents_in_any_layout(layout: Callable[[Tensor], Tensor], model: DiT) -> None:
    xs = [layout(x) for x in latents(model)]
    assert_close(drive(model, xs), naive_drive(model, xs))
    assert stats(model).originals == {}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integers(dtype: torch.dtype, model: DiT) -> None:
    y = torch.stack([LABELS.to(dtype)] * 2, dim=1)[:, 0]
    assert_close([call(model, X, 930, y)], naive_drive(model, [X]))


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "a label too high": ((X, T, torch.tensor([1, 6, 9])), r"label 6 in y is outside \[0, 5\]"),
    "a label too low": ((X, T, torch.tensor([1, -1, 9])), r"label -1 in y is outside \[0, 5\]"),
    "fractional labels": ((X, T, LABELS.double()), r"y of shape \(3,\) and torch.float64.*\(3,\) integers"),
    "truths for labels": ((X, T, LABELS > 1), r"y of shape \(3,\) and torch.bool"),
    "labels too many": ((X, T, torch.tensor([1, 2, 3, 4])), r"y of shape \(4,\).*\(3,\) integers"),
    "labels in two dimensions": ((X, T, LABELS[:, None]), r"y of shape \(3, 1\)"),
    "latents too small": ((X[..., :4], T, LABELS), r"x of shape \(rows, 4, 8, 4\).*\(rows, 4, 8, 8\)"),
    "latents of other channels": ((X[:, :3], T, LABELS), r"x of shape \(rows, 3, 8, 8\)"),
    "latents of one sample": ((X[0], T[:1], LABELS[:1]), r"x of shape \(rows, 8, 8\)"),
    "latents of another dtype": ((X.float(), T, LABELS), "x is torch.float32, but the model torch.float64; convert"),
    "complex latents": ((X.to(torch.complex128), T, LABELS), "x is torch.complex128"),
    "latents elsewhere": ((X.to("meta"), T, LABELS), "x is on meta, but the model on cpu; move"),
    "timesteps elsewhere": ((X, T.to("meta"), LABELS), "t is on meta"),
    "timesteps too many": ((X, at(930, 4), LABELS), r"t of shape \(4,\).*\(3,\) numbers"),
    "timesteps in two dimensions": ((X, T[:, None], LABELS), r"t of shape \(3, 1\)"),
    "no timestep": ((X, T * math.nan, LABELS), "t=nan is not finite"),
    "an endless timestep": ((X, T * math.inf, LABELS), "t=inf is not finite"),
    "latents not a number": ((X * math.nan, T, LABELS), "x holds a number that is not finite"),
    "latents without end": ((X.clone().index_fill(0, torch.tensor(1), -math.inf), T, LABELS), "x holds"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_what_is_refused(arguments: tuple[Any, ...], message: str, model: DiT) -> None:
    """Before anything ran: a call with what is right comes next."""
    with pytest.raises(InputError, match=message) as caught:
        model(*arguments)
    assert "\n" not in str(caught.value)
    assert not stats(model).steps
    assert_close(drive(model, [X, X]), naive_drive(model, [X, X]))


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
@torch.no_grad()
def test_a_refused_call_within_a_run_leaves_the_run_as_it_was(arguments: tuple[Any, ...], message: str) -> None:
    enable(MODEL, plan_of(), strict=True)
    drive(MODEL, [X])
    with pytest.raises(InputError, match=message):
        MODEL(*arguments)
    assert_close([call(MODEL, X, 700, LABELS)], naive_drive(MODEL, [X, X])[1:])
    disable(MODEL)


@torch.no_grad()
def test_an_odd_batch_can_not_be_guided(model: DiT) -> None:
    with pytest.raises(InputError, match=r"^3 rows can't be halved; [^\n]*$"):
        model.forward_with_cfg(X, T, LABELS, 2.0)
    x, y = torch.cat([X, X]), guided_rows(LABELS)
    assert len(model.forward_with_cfg(x, at(930, 6), y, 2.0)) == 6
