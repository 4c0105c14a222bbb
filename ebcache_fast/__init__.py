"""EB-Cache for diffusion transformers: a precomputed Cache Table, fused operations, one graph per type of step."""

from typing import Any

from ebcache_fast._version import __version__
from ebcache_fast.calibration.pipeline import calibrate
from ebcache_fast.dropin.dry_run import DryCheck, dry_check
from ebcache_fast.dropin.enable import disable, enable, enabled, stats
from ebcache_fast.engine.engine import Engine
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import (
    CaptureError,
    EBCacheError,
    InputError,
    JobError,
    TableError,
    TrajectoryError,
)
from ebcache_fast.former import install
from ebcache_fast.plan import Plan, StepType
from ebcache_fast.plan.table import CacheTable
from ebcache_fast.plan.table_set import TableSet, load_tables
from ebcache_fast.sampling import sample

install()

__all__ = [
    "CacheTable",
    "CaptureError",
    "DryCheck",
    "EBCacheError",
    "Engine",
    "EngineOptions",
    "InputError",
    "JobError",
    "Plan",
    "StepType",
    "TableError",
    "TableSet",
    "TrajectoryError",
    "__version__",
    "calibrate",
    "disable",
    "dry_check",
    "enable",
    "enabled",
    "load_tables",
    "sample",
    "stats",
]


def __getattr__(name: str) -> Any:
    """Former modules, with a DeprecationWarning."""
    from ebcache_fast.former import former_module

    return former_module(name)
