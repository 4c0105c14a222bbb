"""The engine over the parts of diffusers' PixArt and CogVideoX: own loops, fused kernels, graphs, layer by layer."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from accuracy import DEVICE
from constants import ATTENTION, ATTN_MLP, CPU, MLP, NO
from depth import deep
from diffusers_tiny import ROTARY, tiny_cogvideox, tiny_pixart
from fake_graphs import FakeGraphs
from test_engine_faults import ALLOCATIONS, no_memory
from tiny import relative_error
from torch import Tensor, nn

from ebcache_fast.engine.buffers import BufferSpec, Tail, allocate
from ebcache_fast.engine.cache import FeatureCache
from ebcache_fast.engine.embed_head import OF_EMBED_HEAD
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.flags import Flags
from ebcache_fast.engine.graphs import no_graphs
from ebcache_fast.engine.guidance import Guidance
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import InputError
from ebcache_fast.kernels import launch
from ebcache_fast.models import Conditioning, as_denoiser
from ebcache_fast.ops import operations as ops
from ebcache_fast.plan import COMPUTE, REUSE, Branch, Plan, StepPlan, StepType
from ebcache_fast.samplers import make_sampler, trajectory_noise

pytest.importorskip("diffusers")

MIXED = [NO, ATTENTION, ATTN_MLP, MLP, NO, ATTN_MLP, ATTN_MLP, ATTN_MLP, ATTN_MLP, NO]
TRITON = replace(ops.own_matmul_operations(), attention=None)  # SDPA, as by default
MODELS: dict[str, Callable[[], Any]] = {
    "PixArt-Sigma": tiny_pixart,
    "PixArt-Alpha with sizes": partial(
        tiny_pixart, use_additional_conditions=True, attention_head_dim=12, cross_attention_dim=24
    ),
    "CogVideoX": tiny_cogvideox,
    "CogVideoX with rotary embeddings": partial(tiny_cogvideox, **ROTARY),
    "CogVideoX 1.5": partial(tiny_cogvideox, patch_size_t=2, sample_frames=7, **ROTARY),
}
SAMPLES = 2


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    made: nn.Module = request.param()
    return made.double()


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger tiles than on a GPU: the interpreter takes its time by the program."""
    table = {name: {80: ((launch.ALL, launch.Launch(16, 128, 4)),)} for name in launch.TABLE}
    table["linear_gelu"] = launch.TABLE["linear_gelu"]
    monkeypatch.setattr(launch, "TABLE", table)


def plan_of(model: nn.Module, types: list[StepType], sampler: str = "ddim") -> Plan:
    shape = as_denoiser(model).shape
    return Plan.from_types(types, make_sampler(sampler, len(types)).timesteps, shape.sites, 0.97)


def in_dtype(context: Conditioning, dtype: torch.dtype) -> Any:
    moved = (one.to(DEVICE, dtype) if one is not None and one.is_floating_point() else one for one in context)
    return type(context)(*moved)


@torch.no_grad()
def run(model: nn.Module, plan: Plan, scale: float = 1.5, sampler: str = "ddim", **options: Any) -> Tensor:
    """Our own loop over one plan, in the dtype of the model."""
    engine = Engine(copy.deepcopy(model).to(DEVICE), **options)
    denoiser, stepper = engine.denoiser, make_sampler(sampler, len(plan))
    latents, context = denoiser.probe_inputs(SAMPLES * (2 if scale != 1 else 1))
    noise = trajectory_noise(7, range(SAMPLES), len(plan) if stepper.draws_noise else 0, latents)
    labels = torch.zeros(SAMPLES, dtype=torch.int64, device=DEVICE)
    context = in_dtype(context, denoiser.weight().dtype)
    guidance = Guidance(scale, channels=4)
    with engine.sampling(plan, labels, guidance, torch.tensor(stepper.rows), noise, context) as trajectory:
        while trajectory.advance():
            pass
        return trajectory.x.cpu().clone()


# Over the interpreter each takes a second.
INTERPRETED = pytest.mark.parametrize(
    "model",
    [pytest.param(make, id=name, marks=() if " with " in name else pytest.mark.slow) for name, make in MODELS.items()],
    indirect=True,
)


@INTERPRETED
@pytest.mark.parametrize("scale", [deep(1.0), 1.5])
@pytest.mark.usefixtures("few_programs")
def test_every_step_type_over_the_kernels(model: nn.Module, scale: float) -> None:
    plan = plan_of(model, MIXED)
    exact = run(model, plan, scale, operations=ops.TORCH)
    assert relative_error(run(model.float(), plan, scale, operations=TRITON), exact) <= 1e-5
    assert relative_error(exact, run(model.double(), plan_of(model, [NO] * 10), scale)) > 1e-3


@INTERPRETED
@pytest.mark.usefixtures("few_programs")
def test_plans_that_reuse_layer_by_layer(model: nn.Module) -> None:
    """A branch that takes the stream as it is comes first, after one, and after more than one operation can add."""
    shape = as_denoiser(model).shape
    pattern = [REUSE, COMPUTE, REUSE, REUSE, COMPUTE, COMPUTE]
    steps = [StepPlan.uniform(NO, shape.sites)]
    for start in range(len(pattern)):
        rules = (pattern[(start + i) % len(pattern)] for i in range(len(shape.sites)))
        steps.append(StepPlan(shape.sites, tuple(rules)))
    plan = Plan(tuple(steps), make_sampler("ddim", len(steps)).timesteps)
    exact = run(model, plan, operations=ops.TORCH)
    assert relative_error(run(model.float(), plan, operations=TRITON), exact) <= 1e-5


@pytest.mark.parametrize("whole", [False, True])
def test_graphs_say_what_eager_steps_do(model: nn.Module, whole: bool) -> None:
    plan, options = plan_of(model, MIXED), EngineOptions(whole_trajectory=whole)
    backends: list[FakeGraphs] = []

    def make_graphs(device: torch.device) -> FakeGraphs:
        backends.append(FakeGraphs())
        return backends[-1]

    replayed = run(model, plan, options=options, make_graphs=make_graphs)
    assert torch.equal(replayed, run(model, plan))
    assert len(backends) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [False, True])
def test_cuda_graphs_give_the_bits_of_the_same_kernels_without(model: nn.Module, whole: bool) -> None:
    model, options = model.bfloat16(), EngineOptions(strict=True, whole_trajectory=whole)
    plan = plan_of(model, MIXED)
    assert torch.equal(run(model, plan, options=options), run(model, plan, make_graphs=no_graphs))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm-solver++"])
@torch.no_grad()
def test_hooked_ends_run_as_modules(model: nn.Module, sampler: str) -> None:
    plan = plan_of(model, MIXED, sampler)
    plain = run(model, plan, sampler=sampler)
    called = []
    for end in ("proj_out", "pos_embed" if hasattr(model, "pos_embed") else "patch_embed"):
        getattr(model, end).register_forward_hook(lambda *_, end=end: called.append(end))
    assert relative_error(run(model, plan, sampler=sampler), plain) < 1e-12
    assert len(set(called)) == 2
    ran = Engine(model).stats.operations
    assert [name for name, what in ran.items() if what == "the model's own layers"] == list(OF_EMBED_HEAD)


def test_usual_ends_of_one_dtype_are_plain(model: nn.Module) -> None:
    is_of_several_frames = getattr(getattr(model, "patch_embed", None), "patch_size_t", None) is not None
    assert as_denoiser(model).has_plain_embed_head is not is_of_several_frames
    model.get_submodule("proj_out").float()
    assert not as_denoiser(model).has_plain_embed_head


class Strange(nn.Linear):
    """Of somebody else's, whose Python may do another thing at each call."""


@pytest.mark.parametrize("path", ["proj_out", "transformer_blocks.1.attn1.to_q"])
def test_layers_of_somebody_elses_are_named(model: nn.Module, path: str) -> None:
    assert as_denoiser(model).foreign_layer() is None
    model.get_submodule(path).__class__ = Strange
    assert as_denoiser(model).foreign_layer() == path


def test_the_usual_layers_are_taken_apart(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to a layer as a whole goes past the fused operations."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    block: Any = model.get_submodule("transformer_blocks.0")
    for part in (block.attn1, block.ff):
        monkeypatch.setattr(type(part), "forward", refuse)
    assert run(model, plan_of(model, [NO, ATTENTION, MLP])).isfinite().all()


@pytest.mark.parametrize("room", range(1, 1 + ALLOCATIONS + 2))  # after the noise: buffers, then what steps share
def test_too_little_memory_is_said(model: nn.Module, room: int) -> None:
    plan = plan_of(model, [NO, ATTN_MLP])
    with no_memory(room), pytest.raises(InputError, match=r"Tried to allocate 7 GiB.\); sample fewer"):
        run(model, plan)


def test_memory_is_said_before_it_is_taken() -> None:
    """CogVideoX-2B at 720 x 480 and 49 frames, guided: 8 GB, of which none is touched here."""
    import diffusers

    with torch.device("meta"):
        denoiser = as_denoiser(diffusers.CogVideoXTransformer3DModel().bfloat16())
    shape, rows = denoiser.shape, 2
    plan = Plan.from_types([NO, ATTN_MLP], (999, 0), shape.sites)
    cache = FeatureCache(shape, plan.memory, rows, torch.bfloat16, torch.device("meta"))
    assert plan.cache_bytes(shape, rows, itemsize=2) == cache.nbytes == 2 * 30 * rows * 17776 * 1920 * 2
    spec = BufferSpec(Tail(), rows, 1, 0, 2, len(plan), plan.memory, Flags.now(CPU), denoiser.latent_shape, ())
    with no_memory(1), pytest.raises(InputError, match=f"of 2 rows needs {cache.nbytes / 2**30:.2f} GiB of cache"):
        allocate(spec, denoiser)


def test_macs() -> None:
    """FLOPs over 788 TFLOP/s, two rows, as milliseconds: what the design counts on."""
    import diffusers

    with torch.device("meta"):
        sigma = diffusers.PixArtTransformer2DModel(
            sample_size=128, caption_channels=4096, use_additional_conditions=False
        )
        video = diffusers.CogVideoXTransformer3DModel()
    for transformer, expected in ((sigma, (16.7, 6.2)), (video, (305.0, 80.0))):
        shape = as_denoiser(transformer).shape
        full, attention, _ = plan_of(transformer, [NO, ATTENTION, ATTN_MLP]).step_macs(shape)
        times = [2 * 2 * macs / 788e12 * 1e3 for macs in (full, attention)]
        assert times == pytest.approx(expected, rel=0.01)
        assert (Branch.CROSS_ATTN in shape.branches) == (transformer is sigma)


def test_what_stands_before_and_after_the_layers_is_counted_weight_by_weight() -> None:
    """What embeds the timestep once a row, the ends once a token of the latents."""
    sigma, video = tiny_pixart(), tiny_cogvideox(in_channels=8, time_embed_dim=12)
    per_row: dict[nn.Module, list[nn.Module]] = {
        sigma: [sigma.adaln_single],
        video: [video.time_embedding, video.norm_out.linear],
    }
    for block in video.transformer_blocks:
        per_row[video] += [block.norm1.linear, block.norm2.linear]
    ends = {sigma: [sigma.pos_embed.proj, sigma.proj_out], video: [video.patch_embed.proj, video.proj_out]}
    for model, tokens in ((sigma, 16), (video, 48)):
        row, token = (sum(map(matrix_elements, parts[model])) for parts in (per_row, ends))
        shape = as_denoiser(model).shape
        assert (shape.fixed_weights, shape.fixed_macs) == (row + token, row + token * tokens)


def matrix_elements(part: nn.Module) -> int:
    """Of all its weights but biases."""
    return sum(weight.numel() for weight in part.parameters() if weight.ndim > 1)
