"""The engine with QKV and fc1 in float8: what it computes, how far that may be off, and where it does so."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from accuracy import DEVICE
from constants import BRANCHES
from fake_graphs import FakeGraphs
from fake_runs import TYPES, Job, bits, call, calls, enable_over, over, plan_of, sampling, states
from float8 import largest_error, needs_float8, rounded_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import naive_sample, relative_error, tiny_dit
from torch import Tensor, nn

from ebcache_fast import enable, stats
from ebcache_fast.engine.buffers import Tail
from ebcache_fast.engine.engine import Batch, Engine
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.engine.step_scheduler import Dispatch, StepScheduler
from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT, DiTDenoiser
from ebcache_fast.models.float8 import check_float8
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import Quantised
from ebcache_fast.plan import Branch, Plan, StepType, layered
from ebcache_fast.samplers import trajectory_noise

FP8 = EngineOptions(fp8=True)
# On a CPU the Triton kernels are interpreted, and products are torch's own for float8.
KERNELS = replace(ops.triton_operations(), linear_gelu=None)
FIRST = ("attn.qkv", "mlp.fc1")


def first_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that run in float8, by path."""
    for layer in range(len(model.blocks)):  # type: ignore[arg-type]
        for name in FIRST:
            path = f"blocks.{layer}.{name}"
            yield path, model.get_submodule(path)  # type: ignore[misc]


class RoundedLinear(nn.Linear):
    """A linear map of what its input and weight are after rows of both were quantised."""

    def forward(self, u: Tensor) -> Tensor:
        return nn.functional.linear(rounded_rows(u), rounded_rows(self.weight), self.bias)


def rounded_model(model: DiT) -> DiT:
    """A copy whose first layers round what they multiply."""
    model = copy.deepcopy(model)
    for _, layer in first_layers(model):
        layer.__class__ = RoundedLinear
    return model


# ----------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_it_is_the_method_with_rounded_factors(scale: float) -> None:
    """Every step type, against the plain loop, in float64: to the bit the same numbers are multiplied."""
    model, job = tiny_dit(5), Job(plan_of(), scale=scale)
    reuse = [[(Branch.SELF_ATTN in kind.reuses, Branch.MLP in kind.reuses)] * 2 for kind in TYPES]
    noise = noise_of(model, job)
    y, plan = torch.tensor(job.labels), job.plan
    made = {"cfg_scale": scale, "guided_channels": job.channels, "eps_scale": plan.eps_scale}
    expected = naive_sample(rounded_model(model), y, noise, plan.timesteps, reuse, "ddpm", **made)
    ours = states(Engine(model, FP8), job)[-1]
    assert relative_error(ours, expected) <= 1e-12
    assert relative_error(ours, states(Engine(model), job)[-1]) > 1e-4


def noise_of(model: DiT, job: Job) -> Tensor:
    """What a job of our own loop begins with and adds."""
    shape = model.in_channels, 8, 8
    return trajectory_noise(job.seed, range(len(job.labels)), len(job.plan), shape).double()


def predicted(model: DiT, x: Tensor, y: Tensor, operations: ops.Operations | None, options: EngineOptions) -> Tensor:
    """One step that computes everything, (N, Cout, H, W)."""
    model = model.to(DEVICE) if operations is KERNELS else model
    engine = Engine(model, options, operations)
    device = engine.denoiser.weight().device
    plan = Plan.from_types([StepType.NO_CACHE], [500], layered(len(model.blocks), BRANCHES))
    run = engine.forward_run(plan, Batch(y.to(device), len(y), 3, engine.denoiser.latent_shape), Tail())
    return run.predict(0, x.to(device)).cpu().double()


class Shifted(nn.Linear):
    """A linear map whose factors, u and w, are varied by nothing, so that autograd tells what they do."""

    def forward(self, u: Tensor) -> Tensor:
        half_steps = largest_error(u.detach()), largest_error(self.weight.detach())
        self.shifts = [torch.zeros_like(half_step, requires_grad=True) for half_step in half_steps]
        self.half_steps = half_steps
        return nn.functional.linear(u + self.shifts[0], self.weight + self.shifts[1], self.bias)


def derived_errors(model: DiT, x: Tensor, y: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """By how much each of these outputs is off at most, and as a root mean square, to first order.

    A factor of a product is wrong by up to half a step, evenly spread, so by half a step over sqrt(3) in the root mean
    square. What that does to an output is its derivative, by autograd; errors of different factors are independent.
    """
    model = copy.deepcopy(model)
    for _, layer in first_layers(model):
        layer.__class__ = Shifted
    found = model(x, torch.full((len(y),), 500), y).flatten()
    layers = [layer for _, layer in first_layers(model)]
    shifts = [shift for layer in layers for shift in layer.shifts]  # type: ignore[union-attr]
    half_steps = [half_step for layer in layers for half_step in layer.half_steps]  # type: ignore[union-attr]
    slopes = [torch.autograd.grad(found[i], shifts, retain_graph=True) for i in outputs]
    terms = [torch.cat([(g * d).flatten() for g, d in zip(each, half_steps, strict=True)]) for each in slopes]
    return torch.stack([each.abs().sum() for each in terms]), torch.stack([each.norm() for each in terms]) / math.sqrt(
        3
    )


WAYS = {"torch": (None, torch.float64), "kernels": (KERNELS, torch.float32), "bfloat16": (KERNELS, torch.bfloat16)}


@needs_float8
@pytest.mark.parametrize("way", WAYS)
def test_its_error_is_what_float8_must_give(way: str) -> None:
    """No output's is above its bound; all together they are as large as rounding to nearest makes them."""
    operations, dtype = WAYS[way]
    if DEVICE.type == "cuda" and operations is KERNELS and dtype == torch.float32:
        pytest.skip("on a GPU float8 products are of bfloat16 models")
    model = tiny_dit(7, torch.bfloat16).double()  # weights that every dtype holds
    x, y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).bfloat16().double(), torch.tensor([1, 4])
    outputs = torch.arange(0, 2 * 8 * 64, 13)
    with torch.no_grad():
        exact = model(x, torch.full((2,), 500), y)
        plain, ours = (
            predicted(copy.deepcopy(model).to(dtype), x, y, operations, options) for options in (EngineOptions(), FP8)
        )
    error, own = ((each - exact).flatten()[outputs] for each in (ours, plain))
    bound, usual = derived_errors(model, x, y, outputs)
    assert (error.abs() <= bound + 2 * own.abs().max()).all()
    assert 0.7 < error.norm() / (usual.square() + own.square()).sum().sqrt() < 1.4


# ------------------------------------------------------------------------------------------------------- products


@given(rows=st.integers(1, 9), width=st.integers(1, 40), seed=st.integers(0, 99), size=st.sampled_from([1e-6, 1, 1e5]))
@settings(max_examples=30)
def test_rows_are_rounded_by_definition(rows: int, width: int, seed: int, size: float) -> None:
    """To the bit, in float64, where no rounding but float8's counts."""
    generator = torch.Generator().manual_seed(seed)
    numbers = (torch.randn(rows, width, generator=generator, dtype=torch.float64) ** 3 * size).to(DEVICE)
    made = empty_quantised(rows, width)
    reference.quantise(numbers, made)
    assert torch.equal(made.values.double() * made.scales.double().unsqueeze(1), rounded_rows(numbers))


def empty_quantised(rows: int, width: int) -> Quantised:
    """Not written yet."""
    return Quantised(
        torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=DEVICE), torch.empty(rows, device=DEVICE)
    )


@needs_float8
@pytest.mark.parametrize("operations", [ops.TORCH, KERNELS], ids=["reference", "torch's own"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_product_of_float8(dtype: torch.dtype, operations: ops.Operations) -> None:
    if DEVICE.type == "cuda" and dtype == torch.float32:
        pytest.skip("on a GPU products scaled by rows come in bfloat16")
    generator = torch.Generator().manual_seed(0)
    numbers = (torch.randn(*shape, generator=generator) for shape in ((33, 48), (64, 48), (64,)))
    u, weight, bias = (each.to(DEVICE) for each in numbers)
    left, right, out = empty_quantised(33, 48), empty_quantised(64, 48), torch.empty(33, 64, dtype=dtype, device=DEVICE)
    reference.quantise(u * torch.logspace(-3, 3, 33, device=DEVICE).unsqueeze(1), left)  # rows of all sizes
    reference.quantise(weight * torch.logspace(3, -3, 64, device=DEVICE).unsqueeze(1), right)
    bias = bias.to(dtype)
    operations.scaled_linear(left, right, bias, out)
    whole = [one.values.double() * one.scales.double().unsqueeze(1) for one in (left, right)]
    exact, size = whole[0] @ whole[1].T + bias.double(), whole[0].abs() @ whole[1].abs().T + bias.abs().double()
    # The cores of a GPU keep 13 bits of a sum beside its largest product, and drop the rest of each of them.
    sums = 2.0**-12 if DEVICE.type == "cuda" else 2.0**-20
    assert ((out.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + sums * size).all()


# --------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize("whole", [False, True])
def test_graphs_are_bit_for_bit_what_runs_without(whole: bool) -> None:
    model, job, graphs = tiny_dit(3, torch.float32), Job(plan_of()), FakeGraphs()
    options = replace(FP8, whole_trajectory=whole, strict=True)
    engine = Engine(model, options, graphs.wrap(ops.TORCH), over(graphs))
    eager = bits(states(Engine(model, FP8), job))[-1:]
    assert bits(states(engine, job))[-1:] == eager
    assert bits(states(engine, job))[-1:] == eager
    assert graphs.captures == (1 if whole else len(kinds(job)))


def kinds(job: Job) -> set[Dispatch]:
    """What our own loop dispatches, of which there is a graph each."""
    return set(StepScheduler(job.plan).dispatches())


def test_a_write_to_the_weights_counts_from_the_next_trajectory_on() -> None:
    """One that changes neither address nor version; the graphs stay."""
    model, job, graphs = tiny_dit(3, torch.float32), Job(plan_of()), FakeGraphs()
    engine = Engine(model, replace(FP8, strict=True), make_graphs=over(graphs))
    before = states(engine, job)[-1]
    with sampling(engine, job) as running:
        running.advance()
        for _, layer in first_layers(model):
            layer.weight.data.mul_(1.5)
        while running.advance():
            pass
        assert torch.equal(running.x, before)  # what this run multiplies by was made at its start
    after = states(engine, job)[-1]
    assert relative_error(after, before) > 1e-2
    assert bits([after]) == bits(states(Engine(model, FP8), job)[-1:])
    assert graphs.captures == len(kinds(job))


def test_memory_is_announced_and_each_run_has_weights_of_its_own() -> None:
    model, job = tiny_dit(3, torch.float32), Job(plan_of())
    sizes = []
    for options in (EngineOptions(), FP8):
        with sampling(Engine(model, options), job) as running:
            per_run = running._buffer_set.buffers.per_run
            sizes.append(sum(one.nbytes for one in per_run.tensors))
    width, depth = 16, 2
    assert sizes == [0, depth * (7 * width * width + 4 * 7 * width)]


# ------------------------------------------------------------------------------------------------- where it does so


def doubled(module: nn.Module, _: object, out: Tensor) -> Tensor:
    return 2 * out


@pytest.mark.parametrize("path", ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"])
def test_a_layer_that_is_not_plain_runs_as_the_module_it_is(path: str) -> None:
    model, job = tiny_dit(5), Job(plan_of())
    rounded = rounded_model(model)
    rounded.get_submodule(path).__class__ = nn.Linear
    for each in (model, rounded):
        each.get_submodule(path).register_forward_hook(doubled)
    engine = Engine(model, FP8)
    assert relative_error(states(engine, job)[-1], states(Engine(rounded), job)[-1]) <= 1e-12
    assert engine.stats.operations["scaled_linear"] == "float8, in 3 of 4 branches"


def test_hooks_that_come_and_go_within_a_run_are_followed() -> None:
    """As ever where nothing is a graph: one that goes leaves a layer whose weight was not quantised."""
    model, job = tiny_dit(5), Job(plan_of())
    handle = model.blocks[0].mlp.fc1.register_forward_hook(doubled)
    with sampling(Engine(model, FP8), job) as running:
        running.advance()
        handle.remove()
        model.blocks[1].attn.qkv.register_forward_hook(seen := Seen())
        while running.advance():
            pass
        assert running.x.isfinite().all()
    assert seen.calls == sum(Branch.SELF_ATTN not in kind.reuses for kind in TYPES[1:])


class Seen:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: object) -> None:
        self.calls += 1


def test_without_a_plain_layer_it_is_the_engine_as_ever() -> None:
    model, job = tiny_dit(5, torch.float32), Job(plan_of())
    for _, layer in first_layers(model):
        layer.register_forward_hook(lambda *_: None)
    engine = Engine(model, FP8)
    assert bits(states(engine, job)) == bits(states(Engine(model), job))
    assert engine.stats.operations["scaled_linear"] == "float8, in 0 of 4 branches"


def test_stats_say_whether_it_does() -> None:
    model = tiny_dit(5)
    assert Engine(model, FP8).stats.operations["scaled_linear"] == "float8, in 4 of 4 branches"
    assert Engine(model).stats.operations["scaled_linear"] == "nothing: fp8=False"


@pytest.mark.parametrize("guided", [False, True])
def test_the_drop_in_does_so_too(guided: bool) -> None:
    model, graphs = tiny_dit(3, torch.float32), FakeGraphs()
    job = Job(plan_of(eps_scale=1.0), scale=1.5 if guided else 1.0)
    plain = calls(enable(copy.deepcopy(model), job.plan), job)
    eager = calls(enable(copy.deepcopy(model), job.plan, fp8=True), job)
    enable_over(over(graphs), model, job.plan, fp8=True, strict=True)
    assert bits(calls(model, job)) == bits(eager)
    assert 1e-4 < relative_error(eager[0], plain[0]) < 0.2
    assert stats(model).operations["scaled_linear"] == "float8, in 4 of 4 branches"
    assert graphs.captures > 0


class OfAnotherLayout:
    """A denoiser like a DiT's, but none."""

    def __init__(self, model: nn.Module) -> None:
        self._like = DiTDenoiser(model)

    def __getattr__(self, name: str) -> object:
        return getattr(self._like, name)


def test_models_of_another_layout_are_refused() -> None:
    with pytest.raises(InputError, match="OfAnotherLayout sees another layout; leave it out"):
        Engine(tiny_dit(), FP8, make_denoiser=OfAnotherLayout)  # type: ignore[arg-type]


class OnCuda(DiTDenoiser):
    """One whose weights seem to be on a GPU."""

    dtype = torch.bfloat16

    def weight(self) -> Tensor:
        return _OnCuda(self.dtype)  # type: ignore[return-value]


class _OnCuda:
    device, is_cuda = torch.device("cuda", 0), True

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("sizes", "dtype", "capability", "why"),
    [
        ({}, torch.bfloat16, (8, 9), None),
        ({}, torch.bfloat16, (8, 6), "compute capability 8.6 is below 8.9"),
        ({}, torch.float16, (9, 0), "the model is torch.float16 and not torch.bfloat16"),
        ({}, torch.float64, (9, 0), "torch.float64 has no kernels"),
        ({"hidden_size": 24}, torch.bfloat16, (9, 0), "widths 24 and 96 are not both multiples of 16"),
        ({"mlp_ratio": 1.5}, torch.bfloat16, (9, 0), "widths 16 and 24 are not both multiples of 16"),
    ],
)
def test_gpus_and_models_that_have_no_such_products_are_refused(
    sizes: dict[str, object],
    dtype: torch.dtype,
    capability: tuple[int, int],
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(OnCuda, "dtype", dtype)
    denoiser = OnCuda(tiny_dit(0, **sizes))
    if why is None:
        check_float8(denoiser)
        return
    with pytest.raises(InputError, match=f"fp8=True needs .*, and here {why}; leave it out"):
        check_float8(denoiser)


@torch.no_grad()
def test_a_model_that_is_moved_where_there_are_none_answers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = enable(tiny_dit(3), plan_of(), fp8=True)
    monkeypatch.setattr(ops, "why_not_float8", lambda device, dtype: None if dtype == torch.float64 else "is none")
    job = Job(plan_of())
    model.float()
    assert math.isfinite(float(call(model, job, 0).sum()))
    (why,) = stats(model).originals
    assert "here is none" in why
