"""Plans: what every step of a sampling run computes and what it reuses, decided before the run starts.

A model is a row of *sites*, each one branch of one layer. A `StepPlan` has a rule for each of them (compute and keep,
reuse, ...); a `Plan` lines up the StepPlans of a whole run. `lower` makes a `Program` of a step, a tuple of launches,
which is what costs are counted over, what a CUDA graph is known by, and what a person can read. Nothing here runs a
model.
"""

from ebcache_fast.plan.correction import Correction
from ebcache_fast.plan.lowering import lower, verify
from ebcache_fast.plan.memory import Memory
from ebcache_fast.plan.model_shape import ModelShape, repeated
from ebcache_fast.plan.plan import Plan
from ebcache_fast.plan.program import LONGEST_RUN, Launch, Program, Slot, Term
from ebcache_fast.plan.rules import (
    COMPUTE,
    REUSE,
    Compute,
    Forecast,
    FullAndWindow,
    Reuse,
    Rule,
    SharedByGuidance,
    Tokens,
    Window,
)
from ebcache_fast.plan.sites import Branch, Site, SiteShape, branch_names, layered
from ebcache_fast.plan.spans import ForecastSpan, KeepSpan, SkipSpan
from ebcache_fast.plan.step_plan import StepPlan, StepType
from ebcache_fast.plan.timesteps import MAX_INT, exact_timestep, exact_timesteps, shown

__all__ = [
    "COMPUTE",
    "LONGEST_RUN",
    "MAX_INT",
    "REUSE",
    "Branch",
    "Compute",
    "Correction",
    "Forecast",
    "ForecastSpan",
    "FullAndWindow",
    "KeepSpan",
    "Launch",
    "Memory",
    "ModelShape",
    "Plan",
    "Program",
    "Reuse",
    "Rule",
    "SharedByGuidance",
    "Site",
    "SiteShape",
    "SkipSpan",
    "Slot",
    "StepPlan",
    "StepType",
    "Term",
    "Tokens",
    "Window",
    "branch_names",
    "exact_timestep",
    "exact_timesteps",
    "layered",
    "lower",
    "repeated",
    "shown",
    "verify",
]


def __getattr__(name: str) -> type:
    """Return what has this former name, with a DeprecationWarning."""
    if name == "Action":
        from ebcache_fast.former import warn
        from ebcache_fast.plan.former import Action

        warn("ebcache_fast.plan.Action", "COMPUTE and REUSE")
        return Action
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
