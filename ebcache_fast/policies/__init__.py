"""Policies: each a function that returns a Plan without running a model."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from ebcache_fast.plan import ModelShape, Plan
from ebcache_fast.policies.delta_dit import delta_dit, delta_dit_of
from ebcache_fast.policies.ditfastattn import ditfastattn
from ebcache_fast.policies.fora import fora, fora_at_cost, fora_of
from ebcache_fast.policies.forecast import forecast
from ebcache_fast.policies.l2c import l2c
from ebcache_fast.policies.pab import pab, pab_of
from ebcache_fast.policies.power import power, power_of
from ebcache_fast.policies.taylorseer import hicache_of, taylorseer, taylorseer_of
from ebcache_fast.policies.toca import toca, toca_of

__all__ = [
    "BUILT_IN",
    "delta_dit",
    "ditfastattn",
    "fora",
    "fora_at_cost",
    "forecast",
    "l2c",
    "pab",
    "power",
    "taylorseer",
    "toca",
]

# By the name that commands call them by: functions of timesteps, shape and an argument as it is written.
BUILT_IN: Final[Mapping[str, Callable[[tuple[float, ...], ModelShape, str], Plan]]] = MappingProxyType(
    {
        "fora": fora_of,
        "taylorseer": taylorseer_of,
        "hicache": hicache_of,
        "power": power_of,
        "pab": pab_of,
        "toca": toca_of,
        "delta-dit": delta_dit_of,
    }
)
