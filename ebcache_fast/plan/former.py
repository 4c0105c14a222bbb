"""Former forms of arguments, which keep working for one release: a depth and branches where sites stand now."""

from collections.abc import Sequence
from typing import Any

from ebcache_fast.former import warn
from ebcache_fast.plan.rules import COMPUTE, REUSE
from ebcache_fast.plan.sites import Branch, Site, layered


class Action:
    """Former name of the two rules."""

    COMPUTE, REUSE = COMPUTE, REUSE


def sites_of(sites: Any, branches: Any, *others: Any) -> tuple[tuple[Site, ...], Any]:
    """Sites, and the argument after them, of calls in today's form or with a depth and branches."""
    if not hasattr(sites, "__index__"):
        return sites, branches
    warn("a depth and branches", "layered(depth, branches)", stacklevel=4)
    names: Sequence[Branch] = branches
    return layered(int(sites), names), others[0] if others else 1.0
