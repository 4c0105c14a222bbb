"""Weights that change between runs, over fake graphs: never a stale bit, and new graphs where their memory moved."""

import gc
from collections.abc import Callable

import pytest
import torch
from constants import ATTN_MLP, NO
from fake_graphs import FakeGraphs
from fake_runs import SMALLEST, Job, bits, calls, eager_states, enable_over, no_graphs, over, plan_of, states
from tiny import tiny_dit
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ebcache_fast.engine.engine import Engine
from ebcache_fast.models import DiT
from ebcache_fast.ops import operations as ops

JOB = Job(plan_of((NO, ATTN_MLP)), labels=(2,))
GRAPHS = 2


def tiny() -> DiT:
    return tiny_dit(0, torch.float32, **SMALLEST)


def weights_of(model: DiT) -> dict[str, Tensor]:
    """Others of the same shapes."""
    return {name: value * 1.1 for name, value in model.state_dict().items()}


class Doubled(nn.Module):
    """A parametrization, and an adapter around a layer."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * (x if self.inner is None else self.inner(x))


def step_an_optimizer(model: DiT) -> None:
    with torch.enable_grad():
        sum(parameter.sum() for parameter in model.parameters()).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def qkv(model: DiT) -> nn.Linear:
    return model.blocks[1].attn.qkv


def proj(model: DiT) -> nn.Linear:
    return model.blocks[0].attn.proj


IN_PLACE: dict[str, Callable[[DiT], object]] = {
    "mul_": lambda model: qkv(model).weight.mul_(1.1),
    "data.add_": lambda model: qkv(model).weight.data.add_(0.1),
    "detach().mul_": lambda model: model.final_layer.linear.bias.detach().mul_(2),
    "load_state_dict": lambda model: model.load_state_dict(weights_of(model)),
    "optimizer": step_an_optimizer,
}
MOVED: dict[str, Callable[[DiT], object]] = {
    "data": lambda model: setattr(qkv(model).weight, "data", qkv(model).weight.data * 1.1),
    "data, transposed where it lies": lambda model: setattr(proj(model).weight, "data", proj(model).weight.data.t()),
    "load_state_dict, assigned": lambda model: model.load_state_dict(weights_of(model), assign=True),
    "a new parameter": lambda model: setattr(qkv(model), "weight", nn.Parameter(qkv(model).weight * 1.1)),
    "another dtype": lambda model: model.double(),
    "there and back": lambda model: model.bfloat16().float(),
    "a layer replaced": lambda model: setattr(model.blocks[1].mlp, "fc1", nn.Linear(8, 32)),
    "a block replaced": lambda model: model.blocks.__setitem__(1, tiny_dit(9, torch.float32, **SMALLEST).blocks[0]),
}
FOREIGN: dict[str, Callable[[DiT], object]] = {
    "an adapter around a layer": lambda model: setattr(model.blocks[0].mlp, "fc2", Doubled(model.blocks[0].mlp.fc2)),
    "a parametrization": lambda model: parametrize.register_parametrization(qkv(model), "weight", Doubled()),
}


EVERY = IN_PLACE | MOVED | FOREIGN


def assert_graphs(graphs: FakeGraphs, mutate: Callable[[DiT], object]) -> None:
    """Those of before, those of before and after, or, with layers whose Python a graph would not run, none after."""
    gc.collect()
    after = GRAPHS * (mutate in MOVED.values())
    left = 0 if mutate in FOREIGN.values() else GRAPHS
    assert (graphs.captures, len(graphs.alive)) == (GRAPHS + after, left)


@torch.no_grad()
def change(model: DiT, mutate: Callable[[DiT], object]) -> None:
    torch.manual_seed(0)
    mutate(model)


@pytest.mark.parametrize("mutate", EVERY.values(), ids=EVERY)
def test_our_own_loop_follows(mutate: Callable[[DiT], object]) -> None:
    model, graphs = tiny(), FakeGraphs()
    engine = Engine(model, operations=graphs.wrap(ops.TORCH), make_graphs=over(graphs))
    before = bits(states(engine, JOB))
    change(model, mutate)
    after = bits(states(engine, JOB))
    assert after == bits(eager_states(model, JOB)) != before
    assert_graphs(graphs, mutate)
    eager = ["layer of torch's own" in why for why in engine.stats.eager]
    assert eager == [True] * (mutate in FOREIGN.values())


@pytest.mark.parametrize("mutate", EVERY.values(), ids=EVERY)
def test_the_drop_in_that_is_trusted_follows(mutate: Callable[[DiT], object]) -> None:
    graphs, enabled, fresh = FakeGraphs(), tiny(), tiny()
    enable_over(over(graphs), enabled, JOB.plan, graphs.wrap(ops.TORCH), in_order=True)
    before = bits(calls(enabled, JOB))
    for model in (enabled, fresh):
        change(model, mutate)
    enable_over(no_graphs, fresh, JOB.plan)
    after = bits(calls(enabled, JOB))
    assert after == bits(calls(fresh, JOB)) != before
    assert_graphs(graphs, mutate)


def test_every_parameter_and_buffer_is_read_anew_by_every_run() -> None:
    model, graphs = tiny(), FakeGraphs()
    engine = Engine(model, operations=graphs.wrap(ops.TORCH), make_graphs=over(graphs))
    before = bits(states(engine, JOB))
    for name, value in model.state_dict().items():
        value.mul_(1.5)  # the parameter's own memory, and no version that would tell
        after = bits(states(engine, JOB))
        assert after == bits(eager_states(model, JOB)), name
        assert after != before, name
        before = after
    assert graphs.captures == GRAPHS


def test_what_a_foreign_layer_holds_in_python_is_never_stale() -> None:
    """A number that no tensor is, as an adapter's scale: a graph would keep it."""

    class Scaled(Doubled):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.inner(x)

    model = tiny()
    layer = model.blocks[0].mlp.fc2 = Scaled(model.blocks[0].mlp.fc2)
    engine = Engine(model, make_graphs=over(FakeGraphs()))
    before = bits(states(engine, JOB))
    layer.scale = 3.0
    after = bits(states(engine, JOB))
    assert after == bits(eager_states(model, JOB)) != before
