"""Policies by name, those of other packages, so that ``compare --methods`` can run them."""

from collections.abc import Callable
from typing import Any

from ebcache_fast.errors import TableError
from ebcache_fast.plan import shown
from ebcache_fast.plan.registry import Registry
from ebcache_fast.policies import BUILT_IN

RESERVED = frozenset({"no-cache", "table", "steps", "eps-scale", "l2c", *BUILT_IN})  # what compare has itself

Policy = Callable[..., Any]  # see PolicyRegistry


class PolicyRegistry(Registry[Policy]):
    """Functions (timesteps, shape) or (timesteps, shape, argument) that return a Plan or a CacheTable."""

    kind = "policy"

    def __init__(self) -> None:
        super().__init__({})

    def check(self, name: str, thing: object) -> None:
        """Raise TableError for a name that `compare` has itself, and for what is no function."""
        if name in RESERVED:
            raise TableError(f"policy {name!r}: the name is taken by compare; register it under another one")
        if not callable(thing) or not hasattr(thing, "__qualname__"):
            raise TableError(f"policy {name!r}: expected a function (timesteps, shape) -> Plan, got {shown(thing)}")


POLICIES = PolicyRegistry()
register_policy = POLICIES.register
