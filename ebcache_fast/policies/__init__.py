"""Policies: each a function that returns a Plan without running a model."""

from ebcache_fast.policies.fora import fora, fora_at_cost

__all__ = ["fora", "fora_at_cost"]
