"""A Cache Table in which every field says something."""

from constants import ATTENTION, ATTN_MLP, NO

from ebcache_fast.plan.table import CacheTable, Provenance, SamplerSpec

FULL = CacheTable(
    timesteps=[999, 500, 0],
    step_types=[NO, ATTN_MLP, ATTENTION],
    eps_scale=0.955,
    sampler=SamplerSpec(name="ddpm", steps=3, train_steps=1000),
    model={"width": 8, "depth": 2},
    made=Provenance(
        by="calibrate",
        source='a "test"\n',
        options={"b": 0.955, "samples": 8, "literal": False, "cap": None, "norm": "rms"},
        errors={"ATTENTION": (None, 0.25, 0.5), "ATTN_MLP": (None, 0.0, 1.0)},
        votes={"NO_CACHE": (8, 0, 1), "ATTN_MLP": (0, 8, 7)},
    ),
)
