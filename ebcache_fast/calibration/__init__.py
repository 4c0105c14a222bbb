"""Cache Tables for a model, found by trying: Algorithm 1, its votes, and whole pipelines as callers run them."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Return what has this former name, with a DeprecationWarning."""
    from ebcache_fast.former import former_home

    return former_home(__name__, name, "search", ("calibrate",))
