"""A table whose sites differ, and its file."""

import json
from typing import Any

from ebcache_fast.plan import (
    COMPUTE,
    REUSE,
    Branch,
    ModelShape,
    Plan,
    Site,
    SiteShape,
    StepPlan,
    layered,
)
from ebcache_fast.plan.table import CacheTable, Provenance, SamplerSpec

C, R = COMPUTE, REUSE
BOTH = (Branch.SELF_ATTN, Branch.MLP)


def shape_of(sites: tuple[Site, ...]) -> ModelShape:
    shapes = tuple(SiteShape(site.layer, site.branch, 1, 1) for site in sites)
    return ModelShape(8, 4, shapes, fixed_macs=1, fixed_weights=1, sizes=(("width", 8),))


def plan_of(sites: tuple[Site, ...], *rows: str) -> Plan:
    """A plan of rows of c and r, a letter a site."""
    steps = [StepPlan(sites, tuple({"c": C, "r": R}[kind] for kind in row)) for row in rows]
    return Plan(tuple(steps), tuple(range(10 * len(steps), 0, -10)), 0.95)


SITES = (*layered(3, BOTH), Site(3, Branch.SELF_ATTN))
PLAN = plan_of(SITES, "ccccccc", "rccrcrr", "rrrrrrr", "rcrcrcc", "rcrcrcc")
TABLE = CacheTable.from_plan(
    PLAN,
    sampler=SamplerSpec(name="ddim", steps=5, train_steps=1000),
    model={"width": 8},
    made=Provenance(by="a test", source="", votes={"MLP": (1, 2, 3, 4, 5)}),
)
FILE = """{
  "format": "ebcache-fast.cache-table",
  "schema": 2,
  "model": {
    "width": 8
  },
  "sampler": {
    "name": "ddim",
    "steps": 5,
    "train_steps": 1000
  },
  "timesteps": [50, 40, 30, 20, 10],
  "sites": [
    {
      "layers": 3,
      "branches": ["SELF_ATTN", "MLP"]
    },
    {
      "layers": 1,
      "branches": ["SELF_ATTN"]
    }
  ],
  "kinds": {
    "c": {
      "rule": "compute"
    },
    "r": {
      "rule": "reuse"
    }
  },
  "steps": [
    "c",
    "r c*2 r c r*2",
    "r",
    "(r c)*3 c",
    "(r c)*3 c"
  ],
  "eps_scale": 0.95,
  "allow_amplify": false,
  "made": {
    "by": "a test",
    "source": "",
    "options": {},
    "errors": {},
    "votes": {
      "MLP": [1, 2, 3, 4, 5]
    }
  }
}
"""


def changed(**values: Any) -> str:
    return json.dumps(json.loads(FILE) | values)
