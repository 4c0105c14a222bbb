"""How many launches a step costs on the engine path of our own sampler.

Counted are every Triton launch and every ATen operation that is not a view; 28 layers, as DiT-XL/2 has.
"""

import json

import pytest
import torch
from accuracy import DEVICE
from constants import ATTENTION, ATTN_MLP, NO
from float8 import needs_float8
from tiny import tiny_dit

from bench.launch_count import count_trajectory, few_programs
from bench.launches import OUT
from bench.program_launches import by_kind, counted
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.models import as_denoiser
from ebcache_fast.plan import Plan, StepType


@pytest.mark.slow
def test_launches_of_every_step_type_of_28_layers() -> None:
    model = tiny_dit(depth=28, dtype=torch.float32).to(DEVICE)
    # The first step of a kind allocates its buffers; the second is what counts.
    with few_programs():
        counts = count_trajectory(model, [NO, ATTENTION, ATTN_MLP, NO, ATTENTION, *[ATTN_MLP] * 4])
    totals = {i: count.total() for i, count in counts.items()}
    assert list(totals) == [0, 1, 2, 3, 4, 5, 8]  # the fifth stands for a run of three
    assert totals[3] <= 200, counts[3]
    assert totals[4] <= 88, counts[4]
    assert totals[5] == totals[8] == 2, counts[5]


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("cfg_scale", "sampler"), [(1.0, "ddpm"), (1.5, "ddim")])
def test_launches_are_what_the_formula_says(cfg_scale: float, sampler: str, depth: int) -> None:
    model = tiny_dit(depth=depth, dtype=torch.float32).to(DEVICE)
    counts = count_trajectory(model, [NO, ATTENTION, ATTN_MLP, NO, ATTENTION, ATTN_MLP, ATTN_MLP], cfg_scale, sampler)
    assert {i: counts[i].total() for i in (3, 4, 5)} == {3: 7 * depth + 1, 4: 3 * depth + 2, 5: 2}, counts


@pytest.mark.parametrize("types", [[NO, ATTENTION, ATTN_MLP, NO, ATTENTION, *[ATTN_MLP] * 4]])
@pytest.mark.parametrize("depth", [1, 3])
def test_programs_say_what_is_launched(depth: int, types: list[StepType]) -> None:
    model = tiny_dit(depth=depth, dtype=torch.float32).to(DEVICE)
    shape = as_denoiser(model).shape
    counts = count_trajectory(model, types)
    said = by_kind(Plan.from_types(types, range(len(types), 0, -1), shape.sites), shape)
    assert said == {
        "NO_CACHE": counts[3].total(),
        "ATTENTION": counts[4].total(),
        "ATTN_MLP": counts[8].total(),
        "a run of 3 ATTN_MLP": counts[5].total(),
    }


def test_the_readme_s_launches_are_those_of_programs() -> None:
    report = json.loads(OUT.read_text())
    assert report["by_program"] == {name: part["launches"] for name, part in report["after"].items()}
    assert {name: report[name] for name in ("tables", "mixed_steps")} == counted()


@needs_float8
@pytest.mark.parametrize("depth", [1, 3])
def test_float8_costs_a_launch_a_computed_mlp_for_its_gelu_and_one_for_the_tokens(depth: int) -> None:
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    model = tiny_dit(depth=depth, dtype=dtype).to(DEVICE)
    types = [NO, ATTENTION, ATTN_MLP, NO, ATTENTION, ATTN_MLP, ATTN_MLP]
    counts = count_trajectory(model, types, options=EngineOptions(fp8=True))
    assert {i: counts[i].total() for i in (3, 4, 5)} == {3: 8 * depth + 2, 4: 4 * depth + 2, 5: 2}, counts
