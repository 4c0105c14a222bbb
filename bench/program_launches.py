"""Launches counted over programs, without running anything: what a step of any plan costs on DiT-XL/2."""

from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch

from ebcache_fast import CacheTable
from ebcache_fast.engine.step_scheduler import Dispatch, StepScheduler
from ebcache_fast.models import DIT_MODELS, as_denoiser
from ebcache_fast.plan import COMPUTE, REUSE, Branch, ModelShape, Plan, Program, StepPlan, StepType, lower

# What the libraries launch for a branch, computed whole: QKV, attention and its projection; fc1 with its GELU, and fc2.
OF_A_BRANCH: Final[Mapping[Branch, int]] = MappingProxyType({Branch.SELF_ATTN: 3, Branch.MLP: 2})
TABLES = ("eb-cache-released-50", "fora-2-50", "fora-3-50", "fora-4-50")  # of any model
# Plans beyond the step types: which layers of DiT-XL/2's 28 a step computes, reusing the others'.
MASKS: Final[Mapping[str, frozenset[int]]] = MappingProxyType(
    {
        "first and last layer computed": frozenset({0, 27}),
        "every fourth layer computed": frozenset(range(0, 28, 4)),
    }
)


def launches_of(program: Program) -> int:
    """Every launch of a program, those of its branches included."""
    branches = [program.sites[site].branch for site in program.branches]
    return len(program) - len(branches) + sum(OF_A_BRANCH[branch] for branch in branches)


def dispatched(plan: Plan, shape: ModelShape) -> Iterator[tuple[Dispatch, Program, int]]:
    """What our own loop runs at once, its program, and how often it does."""
    for dispatch, times in Counter(StepScheduler(plan).dispatches()).items():
        options = {"samples": True, "steps": dispatch.steps, "tokens": shape.tokens, "is_guided": True}
        yield dispatch, lower(dispatch.plan, shape.site_shapes, plan.memory, **options), times


def by_kind(plan: Plan, shape: ModelShape) -> dict[str, int]:
    """Launches of each kind of dispatch in a plan, by its name as `bench.launches` has it."""
    found = {}
    for (step, steps), program, _ in dispatched(plan, shape):
        found[step.type_name if steps == 1 else f"a run of {steps} {step.type_name}"] = launches_of(program)
    return found


def masked(layers: frozenset[int], shape: ModelShape) -> Plan:
    """A plan of two steps: all is computed, then these layers alone."""
    rules = tuple(COMPUTE if site.layer in layers else REUSE for site in shape.sites)
    full = StepPlan.uniform(StepType.NO_CACHE, shape.sites)
    return Plan((full, StepPlan(shape.sites, rules)), (1, 0))


def counted() -> dict[str, Any]:
    """Launches a step of the named tables, and our own launches (branches aside) of steps that reuse some layers."""
    with torch.device("meta"):
        shape = as_denoiser(DIT_MODELS["DiT-XL/2"]()).shape
    tables = {}
    for name in TABLES:
        plan = CacheTable.named(name).plan(shape)
        total = sum(times * launches_of(program) for _, program, times in dispatched(plan, shape))
        tables[name] = {"launches": total, "steps": len(plan), "a_step": total / len(plan)}
    mixed = {}
    for name, layers in MASKS.items():
        *_, program = (program for _, program, _ in dispatched(masked(layers, shape), shape))
        mixed[name] = {"own_launches": len(program) - len(program.branches), "launches": launches_of(program)}
    return {"tables": tables, "mixed_steps": mixed}
