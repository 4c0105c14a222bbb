"""What no graph can hold, on the CPU as on a GPU: refused at capture, whatever the body makes of it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from fake_graphs import FakeGraphs
from torch import Tensor
from torch.nn import functional as F

from ebcache_fast.errors import CaptureError

GRAD_MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bits(tensors: Sequence[Tensor]) -> list[bytes]:
    return [tensor.detach().numpy().tobytes() for tensor in tensors]


def attend(x: Tensor, dropout_p: float = 0.0) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, dropout_p=dropout_p)


def refused(operation: Callable[[Tensor], Any], x: Tensor) -> str:
    """Why a capture of the operation on static x was refused; x must be as it was."""
    before = bits([x])
    with pytest.raises(CaptureError) as error:
        FakeGraphs().capture(lambda: operation(x), [x])
    assert bits([x]) == before
    return str(error.value)


def void(_: object) -> None:
    """Nothing, which is what a body returns."""


SYNCHRONISING: dict[str, Callable[[Tensor], Any]] = {
    "aten._local_scalar_dense": lambda x: x[0].item(),
    "aten._local_scalar_dense.default": lambda x: float(x[0]),
    "aten._local_scalar_dense.": lambda x: bool(x[0]),
    "aten._local_scalar": lambda x: range(3)[x[0].long()],
    "aten._local": lambda x: torch.is_nonzero(x[0]),
    "aten._loc": lambda x: x[0] in [1.0],
    "aten.nonzero": lambda x: x.nonzero(),
    "aten.nonzero.default": lambda x: torch.where(x > 0),
    "aten.masked_select": lambda x: x.masked_select(x > 0),
    "aten.index.Tensor": lambda x: x[x > 0],
    "aten.index_put_": lambda x: x.__setitem__(x > 0, x[0]),
    "aten.index_put": lambda x: x.index_put((x > 0,), x[0]),
    "aten._unique2": lambda x: x.unique(),
    "aten.unique_consecutive": lambda x: x.unique_consecutive(),
    "aten.equal": lambda x: torch.equal(x, x),
    "aten.allclose": lambda x: torch.allclose(x, x),
    "aten.bincount": lambda x: x.long().bincount(),
    "aten.repeat_interleave": lambda x: x.repeat_interleave(x.long().abs()),
    "torch.Tensor.tolist": lambda x: x.tolist(),
    "torch.Tensor.numpy": lambda x: x.numpy(),
    "torch.Tensor.__array__": lambda x: np.asarray(x),
    "torch.Tensor.cpu": lambda x: x.cpu(),
    "torch.Tensor.to": lambda x: x.to("cpu"),
    "torch.Tensor.to ": lambda x: x.to(device="cpu"),
    "torch.Tensor.__repr__": lambda x: repr(x),
}


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize("name", SYNCHRONISING)
def test_what_waits_for_the_device_is_refused(name: str, mode: Callable[[], AbstractContextManager[None]]) -> None:
    with mode():
        message = refused(SYNCHRONISING[name], draw(4))
    assert message.startswith(name)
    assert "makes the host wait" in message


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x * torch.tensor([1.0], device=x.device),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.as_tensor(np.ones(4)) + x,
        lambda x: torch.from_numpy(np.ones(4)) + x,
        lambda x: torch.asarray([1.0]) + x,
        lambda x: torch.Tensor([1.0]) + x,
        lambda x: x.__setitem__(0, 1.0),
    ],
)
def test_a_constant_from_the_host_is_refused(make: Callable[[Tensor], Any]) -> None:
    assert refused(make, draw(4)).startswith("aten.lift_fresh.default copies a constant from the host")


@pytest.mark.parametrize("name", ["zeros", "empty", "ones", "arange"])
def test_a_tensor_made_without_saying_where_is_refused(name: str) -> None:
    assert refused(lambda x: getattr(torch, name)(3), draw(4)).startswith(f"torch.{name} makes a tensor on the host")


@pytest.mark.parametrize("mode", GRAD_MODES)
@pytest.mark.parametrize(
    "operation",
    [
        lambda x: torch.randn(3, device=x.device),
        lambda x: torch.randn(3, device=x.device, generator=torch.Generator()),
        lambda x: torch.rand_like(x),
        lambda x: x.normal_(),
        lambda x: x.uniform_(),
        lambda x: torch.randint(3, (2,), device=x.device),
        lambda x: torch.randperm(3, device=x.device),
        lambda x: F.dropout(x, 0.5),
        lambda x: x.abs().clamp(max=1).bernoulli(),
        lambda x: attend(x.view(1, 1, 2, 2), dropout_p=0.5),
        lambda x: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*[x.view(1, 1, 2, 2)] * 3, 0.5),
    ],
)
def test_random_numbers_are_refused_before_any_is_drawn(
    operation: Callable[[Tensor], Any], mode: Callable[[], AbstractContextManager[None]]
) -> None:
    state = torch.random.get_rng_state()
    with mode():
        assert "draws random numbers" in refused(operation, draw(4))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.to(torch.device("meta")),
        lambda x: x + torch.empty(4, device="meta"),
        lambda x: torch.zeros_like(x, device="meta"),
    ],
)
def test_copies_between_devices_are_refused(operation: Callable[[Tensor], Any]) -> None:
    assert "copies between devices" in refused(operation, draw(4))


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("aten.add.Tensor", lambda x, other: x + other),
        ("aten.copy_.default", lambda x, other: other.copy_(x)),
        ("aten.mul.out", lambda x, other: torch.mul(x, 2, out=other)),
        ("aten.select.int", lambda x, other: other[0]),
        ("aten.cat.default", lambda x, other: torch.cat([x, other])),
        ("aten.addmm.default", lambda x, other: F.linear(x[None], x.new_zeros(4, 4), other)),
    ],
)
def test_memory_that_is_neither_static_nor_made_here_is_refused(
    name: str, operation: Callable[[Tensor, Tensor], Any]
) -> None:
    other = draw(4, seed=1)
    before = bits([other])
    assert refused(lambda x: operation(x, other), draw(4)).startswith(f"{name} uses memory ((4,) torch.float64)")
    assert bits([other]) == before


def test_temporaries_of_another_capture_are_refused() -> None:
    x, graphs, kept = draw(3), FakeGraphs(), []
    held = graphs.capture(lambda: kept.append(x + 1), [x])
    with pytest.raises(CaptureError, match="neither static nor made"):
        graphs.capture(lambda: void(x.copy_(kept[0])), [x])
    assert set(graphs.alive) == {held}


def test_captures_and_replays_do_not_nest() -> None:
    x, graphs = draw(3), FakeGraphs()
    graph = graphs.capture(lambda: void(x.add_(1)), [x])
    before = bits([x])

    def swallowing() -> None:
        with suppress(CaptureError):
            graphs.capture(lambda: None, [])

    with pytest.raises(CaptureError, match="a capture inside a capture"):
        graphs.capture(lambda: void(FakeGraphs().capture(lambda: None, [])), [x])
    with pytest.raises(CaptureError, match="a capture inside a capture"):
        graphs.capture(swallowing, [x])
    with pytest.raises(CaptureError, match="a replay"):
        graphs.capture(graph.replay, [x])
    assert bits([x]) == before
    assert (graphs.captures, graphs.replays) == (1, 0)


def test_a_swallowed_refusal_still_ends_the_capture() -> None:
    def body(x: Tensor) -> None:
        with suppress(CaptureError):
            x[0].item()
        x.add_(1)

    assert refused(body, draw(3)).startswith("aten._local_scalar_dense.default")


def test_another_thread_may_do_as_it_likes_meanwhile() -> None:
    x, y = draw(3), draw(3)
    thread = Thread(target=lambda: y.mul_(2)[0].item())

    def body() -> None:
        x.add_(1)
        thread.start()
        thread.join()

    graph = FakeGraphs().capture(body, [x])
    assert graph.nodes == ("aten.add_.Tensor",)
    assert torch.equal(y, 2 * draw(3))


def test_what_a_gpu_can_capture_is_not_refused() -> None:
    x, index = draw(4), torch.tensor([1, 2])

    def body() -> None:
        y = torch.where(x > 0, 1.0, x).masked_fill(x < -1, 0.0) + x[index].sum() + x.to(torch.float32).to(x.device)
        y = F.dropout(y, 0.5, training=False) ** 2 - 1 / (1 - y).clamp(-5, 5)
        x.index_put_((index,), attend(y.view(1, 1, 2, 2)).flatten()[:2])
        assert len(x) == x.shape[0] == 4
        assert x.data_ptr()

    for mode in GRAD_MODES:
        with mode():
            FakeGraphs().capture(body, [x, index]).replay()
