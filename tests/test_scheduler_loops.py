"""Our own loop with samplers read off diffusers' schedulers, against the schedulers' eager loop around tiny models."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, BRANCHES, MLP, NO
from fake_graphs import FakeGraphs
from schedulers import scheduler_loop, with_scaled_eps
from tiny import LayerReuse, empty_cache, naive_predict, relative_error, tiny_dit
from torch import Tensor

from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import InputError, TableError
from ebcache_fast.models import DiT
from ebcache_fast.plan import Plan, StepType, layered
from ebcache_fast.plan.table import CacheTable, SamplerSpec
from ebcache_fast.samplers import Sampler, sampler_of, trajectory_noise
from ebcache_fast.sampling import sample

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own

TYPES = (NO, NO, ATTENTION, ATTN_MLP, ATTN_MLP, ATTN_MLP, ATTN_MLP, MLP, NO)  # runs of 3 and of 1
REUSED: dict[StepType, LayerReuse] = {
    NO: (False, False),
    ATTENTION: (True, False),
    ATTN_MLP: (True, True),
    MLP: (False, True),
}
LABELS = torch.tensor([1, 4])
SCALE, B, SEED = 1.5, 0.93, 4
COGVIDEOX = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
dpm = partial(diffusers.DPMSolverMultistepScheduler)
SCHEDULERS = {
    "DPM-Solver++": (dpm, torch.float32),
    "DPM-Solver++, v": (partial(dpm, prediction_type="v_prediction"), torch.float32),
    "SDE-DPM-Solver++": (partial(dpm, algorithm_type="sde-dpmsolver++"), torch.float32),
    "CogVideoX's DDIM": (partial(diffusers.CogVideoXDDIMScheduler, **COGVIDEOX), torch.float64),
    "CogVideoX's DPM": (partial(diffusers.CogVideoXDPMScheduler, **COGVIDEOX), torch.float64),
}
NEAR = {torch.float32: 1e-5, torch.float64: 1e-10}
EVERY_SCHEDULER = pytest.mark.parametrize("name", SCHEDULERS)


def model_in(dtype: torch.dtype) -> DiT:
    return tiny_dit(5, torch.float64, learn_sigma=False).to(dtype)


def plan_for(sampler: Sampler, types: Sequence[StepType] = TYPES) -> Plan:
    return Plan.from_types(types, sampler.timesteps, layered(2, BRANCHES), B)


@torch.no_grad()
def eager_loop(scheduler: Any, model: DiT, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The scheduler's loop around the naive cached model, with our noise."""
    caches, types = (empty_cache(model), empty_cache(model)), iter(TYPES)

    def predict(x: Tensor, t: int) -> Tensor:
        reuse = [REUSED[next(types)]] * 2
        return naive_predict(model, x, t, LABELS, reuse, caches, SCALE, 3)[0]

    noise = trajectory_noise(SEED, range(len(LABELS)), len(TYPES), (4, 8, 8), next(model.parameters()).dtype)
    return scheduler_loop(scheduler, noise[0], noise[1:], with_scaled_eps(scheduler, predict, B), monkeypatch)


@EVERY_SCHEDULER
def test_our_loop_equals_the_scheduler_s(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, dtype = SCHEDULERS[name]
    model, sampler = model_in(dtype), sampler_of(make(), len(TYPES))
    ours = sample(model, LABELS, table=plan_for(sampler), sampler=sampler, cfg_scale=SCALE, seed=SEED)
    assert relative_error(ours, eager_loop(make(), model, monkeypatch)) <= NEAR[dtype]


@EVERY_SCHEDULER
@pytest.mark.parametrize("whole", [False, True], ids=["a graph a step", "one graph"])
def test_graphs_give_the_eager_bits(name: str, whole: bool) -> None:
    make, dtype = SCHEDULERS[name]
    model, sampler, graphs = model_in(dtype), sampler_of(make(), len(TYPES)), FakeGraphs()
    engine = Engine(model, EngineOptions(strict=True, whole_trajectory=whole), make_graphs=lambda _: graphs)
    run = partial(sample, model, LABELS, table=plan_for(sampler), sampler=sampler)
    for seed in (0, 1):
        assert torch.equal(run(seed=seed, engine=engine), run(seed=seed))
    assert graphs.captures == (1 if whole else 5)


def test_samplers_take_turns_on_one_engine() -> None:
    model = model_in(torch.float64)
    engine = Engine(model)
    for make, _ in (*SCHEDULERS.values(), *SCHEDULERS.values()):
        sampler = sampler_of(make(), 4)
        run = partial(sample, model, LABELS, sampler=sampler, seed=2)
        assert torch.equal(run(engine=engine), run())


def test_a_sampler_and_what_else_is_said_of_the_run() -> None:
    model, sampler = model_in(torch.float32), sampler_of(dpm(), 4)
    expected = sample(model, LABELS, sampler=sampler)
    assert torch.equal(sample(model, LABELS, sampler=sampler, steps=4), expected)
    uncached = Plan.uncached(sampler.timesteps, layered(2, BRANCHES))
    assert torch.equal(sample(model, LABELS, sampler=sampler, table=uncached), expected)
    assert relative_error(sample(model, LABELS, sampler="dpm-solver++", steps=4), expected) < 1e-4  # betas in float64
    with pytest.raises(InputError, match="steps=5: the sampler given has 4"):
        sample(model, LABELS, sampler=sampler, steps=5)
    table = CacheTable(sampler.timesteps, [NO] * 4, sampler=SamplerSpec(name="dpm-solver++", steps=4, train_steps=1000))
    assert torch.equal(sample(model, LABELS, sampler=sampler, table=table), expected)
    with pytest.raises(TableError, match="sampler='sde-dpm-solver\\+\\+': the table is for 'dpm-solver"):
        sample(model, LABELS, sampler=sampler_of(dpm(algorithm_type="sde-dpmsolver++"), 4), table=table)
    with pytest.raises(TableError, match="table is for 9 steps, the sampler given has 4"):
        sample(model, LABELS, sampler=sampler, table=plan_for(sampler_of(dpm(), len(TYPES))))
    with pytest.raises(TableError, match="step 3: the table is for timestep 249, the sampler is at 250"):
        sample(model, LABELS, sampler=sampler, table=Plan.uncached((*sampler.timesteps[:3], 249), layered(2, BRANCHES)))
