"""The fused operations: what they take, their plain-torch truth, and the choice between that and Triton."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Return what has this former name, with a DeprecationWarning."""
    from ebcache_fast.former import former_home

    names = ("Operations", "TORCH", "triton_operations", "own_matmul_operations", "select", "say_once")
    return former_home(__name__, name, "operations", names)
