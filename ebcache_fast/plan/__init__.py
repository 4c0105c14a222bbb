"""What every step of a sampling run computes and what it reuses, decided before the run starts.

A layer is a row of branches (attention, MLP). Each branch of each layer owns one cache *slot*, which holds
the branch's ungated output. A `StepPlan` says for every slot whether one step computes (and stores) or reuses
it; a `Plan` lines up the StepPlans of a whole run and knows what they cost. Nothing here runs a model.
"""

from ebcache_fast.plan.model_shape import BranchShape, ModelShape
from ebcache_fast.plan.plan import Plan
from ebcache_fast.plan.step_plan import Action, Branch, Slot, StepPlan, StepType, branch_names
from ebcache_fast.plan.timesteps import MAX_INT, exact_timestep, exact_timesteps, shown

__all__ = [
    "MAX_INT",
    "Action",
    "Branch",
    "BranchShape",
    "ModelShape",
    "Plan",
    "Slot",
    "StepPlan",
    "StepType",
    "branch_names",
    "exact_timestep",
    "exact_timesteps",
    "shown",
]
