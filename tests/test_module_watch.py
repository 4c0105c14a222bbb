"""What a look at a model tells apart: every change of what a graph or a table was made from, and nothing else."""

import sys
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from tiny import tiny_dit
from torch import Tensor, nn

from ebcache_fast.engine.module_watch import Watch
from ebcache_fast.models import DiT

Change = Callable[[DiT], object]


def last(model: DiT) -> nn.Linear:
    """A square layer of the last block, among the last that are looked at."""
    proj = model.blocks[-1].attn.proj
    assert isinstance(proj, nn.Linear)
    return proj


def other_data(model: DiT) -> None:
    last(model).weight.data = last(model).weight.detach().clone()


def other_dtype(model: DiT) -> None:
    """At the same address."""
    model.requires_grad_(False)
    last(model).weight.data = last(model).weight.data.view(torch.int64)


def transpose(model: DiT) -> None:
    """Neither address nor version shows it."""
    before = last(model).weight._version
    last(model).weight.data = last(model).weight.data.t()
    assert last(model).weight._version == before


def swap_children(model: DiT) -> None:
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


class Other(nn.Linear):
    """A layer of the same attributes, and of another forward."""


PARTS: dict[str, Change] = {
    "a parameter": lambda model: setattr(last(model), "weight", nn.Parameter(last(model).weight.detach())),
    "its memory": other_data,
    "its dtype": other_dtype,
    "its strides": transpose,
    "no parameter": lambda model: setattr(last(model), "bias", None),
    "a layer": lambda model: setattr(model.blocks[-1].attn, "proj", nn.Linear(16, 16)),
    "no layer": lambda model: setattr(model.blocks[-1].attn, "proj", None),
    "one layer more": lambda model: last(model).add_module("more", nn.Identity()),
    "layers in each other's place": swap_children,
    "a container": lambda model: setattr(model, "blocks", nn.ModuleList(model.blocks)),
    "a buffer": lambda model: last(model).register_buffer("more", torch.zeros(1)),
    "a class": lambda model: setattr(last(model), "__class__", Other),
    "a processor": lambda model: setattr(model.blocks[-1].attn, "processor", object()),
    "its class's own forward": lambda model: setattr(last(model), "forward", last(model).forward),  # a hook's remains
    "a dict of parameters": lambda model: setattr(last(model), "_parameters", {}),
}
PYTHON: dict[str, Change] = {
    "a hook on the first of all": lambda model: model.x_embedder.register_forward_hook(lambda *_: None),
    "a hook before the first of all": lambda model: model.x_embedder.register_forward_pre_hook(lambda *_: None),
    "a forward of the first of all": lambda model: setattr(model.x_embedder, "forward", lambda x: x),
    "a hook": lambda model: last(model).register_forward_hook(lambda *_: None),
    "a hook before": lambda model: last(model).register_forward_pre_hook(lambda *_: None),
    "a forward": lambda model: setattr(last(model), "forward", MethodType(lambda self, x: x, last(model))),
}
NOTHING: dict[str, Change] = {
    "nothing": lambda model: None,
    "a run": lambda model: model(torch.zeros(1, 4, 8, 8).double(), torch.zeros(1), torch.zeros(1, dtype=torch.int64)),
    "the model's own hook": lambda model: model.register_forward_hook(lambda *_: None),
    "the model's own hook before": lambda model: model.register_forward_pre_hook(lambda *_: None),
    "the model's own forward": lambda model: setattr(model, "forward", MethodType(lambda self, x: x, model)),
    "gradients": lambda model: model.requires_grad_(True),
    "training": lambda model: model.train(),
}


@pytest.mark.parametrize("change", [*PARTS.values(), *PYTHON.values()], ids=[*PARTS, *PYTHON])
def test_other_parts(change: Change) -> None:
    model = tiny_dit()
    watch = Watch(model)
    before = watch.look()
    change(model)
    after = watch.look()
    assert after.parts != before.parts
    assert after.watched is (change in PYTHON.values())
    assert after == Watch(model).look() is not watch.look() is after


@pytest.mark.parametrize("change", NOTHING.values(), ids=NOTHING)
def test_the_same(change: Change) -> None:
    model = tiny_dit()
    watch = Watch(model)
    before = watch.look()
    change(model)
    assert watch.look() is before
    assert not before.watched


class Adapted(nn.Linear):
    """What peft's layers keep beside their weights."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.scaling = {"one": 2.0}
        self._active_adapter = ["one"]
        self._disable_adapters = False


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.scaling.update(one=0.5),
        lambda layer: layer._active_adapter.append("other"),
        lambda layer: setattr(layer, "_disable_adapters", True),
    ],
    ids=["a scale", "one more", "off"],
)
def test_an_adapter_that_counts_otherwise_is_another_version(change: Callable[[Adapted], object]) -> None:
    model = tiny_dit()
    model.blocks[-1].attn.proj = adapted = Adapted()
    watch = Watch(model)
    before = watch.look()
    assert watch.look() is before
    change(adapted)
    after = watch.look()
    assert after.versions != before.versions
    assert after.parts == before.parts


@torch.no_grad()
def test_a_write_is_another_version_of_the_same_parts() -> None:
    model = tiny_dit()
    watch = Watch(model)
    before = watch.look()
    last(model).weight.add_(1)
    after = watch.look()
    assert after != before
    assert after.parts == before.parts


def test_hooks_that_are_gone_again() -> None:
    model = tiny_dit()
    watch = Watch(model)
    before = watch.look()
    handle = last(model).register_forward_hook(lambda *_: None)
    assert watch.look().watched
    handle.remove()
    assert watch.look() == before


def test_inference_tensors_have_no_versions_and_all_others_have() -> None:
    model = tiny_dit()
    with torch.inference_mode():
        last(model).weight = nn.Parameter(torch.zeros(16, 16), requires_grad=False)
    watch = Watch(model)
    before = watch.look()
    assert watch.look() is before
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert watch.look().versions != before.versions


def test_a_look_keeps_no_weights() -> None:
    """Whoever replaces weights has the memory of the old ones at once."""
    layer = nn.Linear(2, 2)
    freed: list[int] = []

    class Told(nn.Parameter):
        def __del__(self) -> None:
            freed.append(1)

    layer.weight = Told(torch.zeros(2, 2))
    Watch(layer).look()
    layer.weight = nn.Parameter(torch.zeros(2, 2))
    assert freed


def test_a_layer_made_where_another_lay_is_another() -> None:
    """Python gives a new object the address of one that is gone."""
    model = tiny_dit()
    watch = Watch(model)
    for _ in range(10):
        before = watch.look()
        del model.blocks[-1].attn.proj
        model.blocks[-1].attn.proj = nn.Linear(16, 16)
        assert watch.look() is not before


def test_a_layer_more_places_of_which_there_are_by_now() -> None:
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer)
    watch = Watch(model)
    before = watch.look()
    model.append(layer)
    after = watch.look()
    assert after.parts != before.parts
    assert after.versions == before.versions, "it is looked at once"


def of_this_file() -> None:
    """A function that a layer finds among its file's."""


class Numbered(nn.Module):
    """A layer with plain numbers, as attention has."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale, self.is_causal, self.stride, self.kind, self.eps = 2, 0.5, False, (1, 1), "a", None

    def forward(self, x: Tensor) -> Tensor:
        self.method()
        self.static()
        return x

    def method(self) -> None:
        of_this_file()

    @staticmethod
    def static() -> None:
        return None


NUMBERS: dict[str, Change] = {
    "a norm's epsilon": lambda model: setattr(model.blocks[-1].norm2, "eps", 1e-3),
    "heads": lambda model: setattr(model.blocks[-1].attn, "num_heads", 1),
    "a kind of GELU": lambda model: setattr(model.blocks[0].mlp.act, "approximate", "none"),
    "a number of the whole": lambda model: setattr(model, "patch_size", 1),
    "a layer's mode": lambda model: model.y_embedder.train(),
    **{
        f"{name}={value}": lambda model, name=name, value=value: setattr(last(model).more, name, value)  # type: ignore[misc]
        for name, value in dict(heads=4, scale=0.25, is_causal=True, stride=(2, 1), kind="b", eps=1e-6).items()
    },
    "no number": lambda model: delattr(last(model).more, "heads"),
    "a class's forward": lambda model: setattr(Numbered, "forward", lambda self, x: 2 * x),
    "another method": lambda model: setattr(Numbered, "method", lambda self: None),
    "no other method": lambda model: delattr(Numbered, "method"),
    "a method without self": lambda model: setattr(Numbered, "static", staticmethod(lambda: None)),
    "a function of its file": lambda model: setattr(sys.modules[__name__], "of_this_file", lambda: None),
    "a call": lambda model: setattr(Numbered, "__call__", lambda self, x: x),
    "a processor's number": lambda model: setattr(model.blocks[0].attn.processor, "_attention_backend", "sage"),
}


@pytest.mark.parametrize("change", NUMBERS.values(), ids=NUMBERS)
def test_other_numbers_and_functions_are_other_code(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in [*vars(Numbered).items()]:
        if callable(value):
            monkeypatch.setattr(Numbered, name, value)
    monkeypatch.setattr(Numbered, "__call__", Numbered.__call__)
    monkeypatch.setattr(sys.modules[__name__], "of_this_file", of_this_file)
    model = tiny_dit()
    last(model).more = Numbered()
    model.blocks[0].attn.processor = type("Processor", (), {})()
    model.blocks[0].attn.processor._attention_backend = None
    watch = Watch(model)
    before = watch.look()
    assert watch.look() is before
    change(model)
    after = watch.look()
    assert after.code != before.code
    assert after.parts != before.parts
    assert after is watch.look()
