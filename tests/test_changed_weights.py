"""A model that changes while it is enabled, between runs and in the middle of one: nothing stale, ever."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from constants import ATTN_MLP, NO
from dropin import (
    LABELS,
    TIMESTEPS,
    TYPES,
    assert_bitwise,
    assert_close,
    call,
    drive,
    full_step,
    latents,
    naive_drive,
    plan_of,
)
from tiny import CLASSES, relative_error, tiny_dit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ebcache_fast import enable, stats
from ebcache_fast.errors import TrajectoryError
from ebcache_fast.models import DiT

CHANGED = "weights changed within a run"
OTHER = tiny_dit(9)

Change = Callable[[DiT], object]


class Scaled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.5


class Adapter(nn.Module):
    """A linear layer and a low rank beside it, with or without the layer's attributes."""

    def __init__(self, base: nn.Linear, *, in_features: bool) -> None:
        super().__init__()
        self.base = base
        if in_features:
            self.in_features, self.out_features = base.in_features, base.out_features
        self.down = nn.Parameter(torch.full((2, base.in_features), 0.3).to(base.weight))
        self.up = nn.Parameter(torch.full((base.out_features, 2), 0.2).to(base.weight))

    def forward(self, u: Tensor) -> Tensor:
        return self.base(u) + u @ self.down.t() @ self.up.t()


def linears(model: DiT) -> list[nn.Linear]:
    """One of each kind that there is: modulation, attention, MLP, head."""
    block = model.blocks[0]
    return [block.adaLN_modulation[1], block.attn.qkv, block.mlp.fc1, model.final_layer.linear]


def each_linear(change: Callable[[nn.Linear], object]) -> Change:
    return lambda model: [change(linear) for linear in linears(model)]


def in_place(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.add_(0.1)


def through_data(linear: nn.Linear) -> None:
    linear.weight.data.add_(0.1)


def other_data(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data * 1.5


def fuse(linear: nn.Linear) -> None:
    low = torch.ones(2, linear.in_features, dtype=linear.weight.dtype)
    linear.weight.data += torch.full((linear.out_features, 2), 0.05, dtype=linear.weight.dtype) @ low


def other_parameter(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach() * 1.5)


def swap(linear: nn.Linear) -> None:
    torch.utils.swap_tensors(linear.weight, nn.Parameter(linear.weight.detach() * 1.5))


def other_module(model: DiT) -> None:
    for owner, name in ((model.blocks[0].attn, "qkv"), (model.blocks[1].mlp, "fc2"), (model.final_layer, "linear")):
        linear = getattr(owner, name)
        setattr(owner, name, nn.Linear(linear.in_features, linear.out_features, dtype=linear.weight.dtype))


def other_container(model: DiT) -> None:
    model.blocks[1] = copy.deepcopy(OTHER.blocks[1])
    model.x_embedder, model.y_embedder = copy.deepcopy(OTHER.x_embedder), copy.deepcopy(OTHER.y_embedder)


def adapt(model: DiT) -> None:
    for owner, name in ((model.blocks[0].attn, "qkv"), (model.blocks[1].mlp, "fc2"), (model.final_layer, "linear")):
        setattr(owner, name, Adapter(getattr(owner, name), in_features=True))


def through_half(model: DiT) -> None:
    model.half()
    model.double()


def load(model: DiT, *, assign: bool) -> None:
    model.load_state_dict({name: value.clone() for name, value in OTHER.state_dict().items()}, assign=assign)


def hook(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda *event: event[2] * 1.5)


def parametrized(linear: nn.Linear) -> None:
    parametrize.register_parametrization(linear, "weight", Scaled())


SEEN: dict[str, Change] = {
    "in place": each_linear(in_place),
    ".data =": each_linear(other_data),
    "load_state_dict": partial(load, assign=False),
    "load_state_dict, assigned": partial(load, assign=True),
    "to(float32)": lambda model: model.to(torch.float32),
    "half and back": through_half,
    "a parameter replaced": each_linear(other_parameter),
    "a layer replaced": other_module,
    "containers replaced": other_container,
    "an adapter": adapt,
    "a parametrization": each_linear(parametrized),
    "hooks on layers": each_linear(hook),
    "swap_tensors": each_linear(swap),
}
UNSEEN: dict[str, Change] = {".data.add_": each_linear(through_data), "fuse_lora": each_linear(fuse)}


def own_answer(model: DiT, x: Tensor, t: int, y: Tensor = LABELS) -> Tensor:
    """What the class's forward says, eps scaled as by the plan."""
    with torch.no_grad():
        out = DiT.forward(model, x, torch.full((len(x),), t), y)
    out[:, : model.in_channels] *= 0.9
    return out


@pytest.mark.parametrize("change", [*SEEN.values(), *UNSEEN.values()], ids=[*SEEN, *UNSEEN])
@pytest.mark.parametrize("done", [3, 6], ids=["after a cancelled run", "after a whole run"])
def test_between_runs(change: Change, done: int, model: DiT) -> None:
    enable(model, plan_of(), strict=True)
    before = drive(model, latents(model)[:done])
    change(model)
    xs = latents(model)
    ours = drive(model, xs, LABELS.clone())
    assert_close(ours[:1], [own_answer(model, xs[0], TIMESTEPS[0])])
    assert_close(ours, naive_drive(model, xs))
    assert all(relative_error(one, other) > 1e-9 for one, other in zip(before, ours, strict=False))


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN)
@pytest.mark.parametrize("step", [1, 4])
def test_within_a_run(change: Change, step: int, model: DiT) -> None:
    enable(model, plan_of())
    drive(model, latents(model)[:step])
    change(model)
    xs = latents(model)
    ours = [call(model, x, t, LABELS) for x, t in list(zip(xs, TIMESTEPS, strict=True))[step:]]
    assert_close(ours[:1], [own_answer(model, xs[step], TIMESTEPS[step])])
    assert stats(model).refreshed == {CHANGED: 1}
    rest = naive_drive(model, xs[step:], types=[NO, *TYPES[step + 1 :]], timesteps=TIMESTEPS[step:])
    assert_close(ours, rest)


def test_within_a_strict_run(model: DiT) -> None:
    enable(model, plan_of(), strict=True)
    x, second = latents(model, steps=2)
    call(model, x, 930, LABELS)
    each_linear(in_place)(model)
    for _ in range(2):
        with pytest.raises(TrajectoryError, match=rf"^t=700 [^\n]*{CHANGED}[^\n]*strict=False[^\n]*$"):
            call(model, second, 700, LABELS)
    assert_close(drive(model, [x, second], LABELS.clone()), naive_drive(model, [x, second]))


@pytest.mark.parametrize("write", [through_data, fuse])
def test_a_write_that_leaves_no_trace_within_a_run(write: Callable[[nn.Linear], object], model: DiT) -> None:
    """The documented limit: modulation and caches are as old as the run; weights that a step reads are as they are."""
    modulation, *others = linears(model)
    x, second = latents(model, steps=2)
    enable(model, plan_of([NO, ATTN_MLP]))
    untouched = drive(model, [x, second])
    for inert in (modulation, *others[:2]):
        call(model, x, TIMESTEPS[0], LABELS)
        write(inert)
        assert torch.equal(call(model, second, TIMESTEPS[1], LABELS), untouched[1])
        untouched = drive(model, [x, second])
        assert_close(untouched[:1], [full_step(model, x, TIMESTEPS[0])])
    enable(model, plan_of([NO, NO]))
    for live in others:
        call(model, x, TIMESTEPS[0], LABELS)
        write(live)
        assert_close([call(model, second, TIMESTEPS[1], LABELS)], [full_step(model, second, TIMESTEPS[1])])


# ------------------------------------------------------------------------ what no part of the engine can stand for


class OtherAttention(nn.Module):
    """The layout of attention, another meaning."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, 2

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = self.proj(u)
        return out


def other_attention(model: DiT) -> None:
    model.blocks[1].attn = OtherAttention(model.blocks[1].attn)


def bare_adapter(model: DiT) -> None:
    model.blocks[0].attn.qkv = Adapter(model.blocks[0].attn.qkv, in_features=False)


def container_hook(path: str) -> Change:
    return lambda model: model.get_submodule(path).register_forward_hook(lambda *event: event[2] * 1.5)


def forget_hooks(model: DiT) -> None:
    for module in model.modules():
        module._forward_hooks.clear()


def one_layer_more(model: DiT) -> None:
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def offload(model: DiT) -> None:
    """As accelerate does: a layer fetches its weights when it is called."""
    for block in model.blocks:
        layer, held = block.attn.qkv, block.attn.qkv.weight.detach()
        layer.weight = nn.Parameter(held.to("meta"), requires_grad=False)
        layer.forward = partial(F.linear, weight=held, bias=layer.bias)


FOREIGN: dict[str, Change] = {
    "offloaded weights": offload,
    "attention of another kind": other_attention,
    "an adapter without the layer's attributes": bare_adapter,
    "one layer more": one_layer_more,
    **{
        f"a hook on {path}": container_hook(path) for path in ("blocks.0", "blocks.1.attn", "y_embedder", "final_layer")
    },
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("in_order", [False, True])
def test_the_model_itself_answers(change: Change, in_order: bool, model: DiT) -> None:
    enable(model, plan_of(), in_order=in_order)
    xs = latents(model)
    drive(model, xs[:2])
    change(model)
    plain = copy.deepcopy(model)
    plain.forward = DiT.forward.__get__(plain)
    assert_bitwise(drive(model, xs), drive(plain, xs))
    assert list(stats(model).originals.values()) == [6]


def pop_layer(model: DiT) -> None:
    del model.blocks[-1]


@pytest.mark.parametrize(
    ("change", "undo"), [(container_hook("blocks.0.attn"), forget_hooks), (one_layer_more, pop_layer)]
)
def test_what_was_undone_leaves_nothing(change: Change, undo: Change, model: DiT) -> None:
    enable(model, plan_of())
    xs = latents(model)
    change(model)
    drive(model, xs)
    undo(model)
    assert_close(drive(model, xs), naive_drive(model, xs))
    assert sum(stats(model).originals.values()) == 6
    assert stats(model).refreshed == {}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_strictly_nobody_answers(change: Change, model: DiT) -> None:
    enable(model, plan_of(), strict=True)
    change(model)
    with pytest.raises(TrajectoryError, match=r"^the plan can't be followed here: [^\n]*strict=False[^\n]*$"):
        call(model, latents(model)[0], 930, LABELS)
    assert not stats(model).steps


@pytest.mark.parametrize("change", [each_linear(in_place), each_linear(other_parameter)])
def test_interleaved_runs_all_follow(change: Change, model: DiT) -> None:
    enable(model, plan_of(), max_trajectories=2)
    xs, both = latents(model), (LABELS, LABELS.flip(0) + 1)
    for y in both:
        drive(model, xs[:1], y)
    change(model)
    outs = [[call(model, x, t, y) for y in both] for x, t in list(zip(xs, TIMESTEPS, strict=True))[1:]]
    for y, ours in zip(both, zip(*outs, strict=True), strict=True):
        assert_close(ours, naive_drive(model, xs[1:], y, [NO, *TYPES[2:]], TIMESTEPS[1:]))
    assert stats(model).refreshed == {CHANGED: 2}


def test_a_model_of_other_labels(model: DiT) -> None:
    """The range of labels is that of the embedding there is now."""
    enable(model, plan_of())
    wide = tiny_dit(7, num_classes=2 * CLASSES)
    model.y_embedder = wide.y_embedder
    x, y = latents(model)[0], torch.tensor([2 * CLASSES, 7, 0])
    assert_close([call(model, x, 930, y)], [own_answer(model, x, 930, y)])
