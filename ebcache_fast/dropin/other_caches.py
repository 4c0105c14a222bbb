"""Caches of other libraries around a model or its pipeline, known by what they leave there."""

import re
from typing import Any

from torch import nn

from ebcache_fast.dropin.hooked import FORWARD, innermost
from ebcache_fast.errors import InputError

FLAG = re.compile(r"_?(is|enabled?)_(\w+_)?cached?")  # as ParaAttention's, cache-dit's and TeaCache's, where it is True
LIBRARY = re.compile(r"\w*(cache_?dit|db_?cache|deep_?cache|easy_?cache|fb_?cache|first_block_cache|tea_?cache)\w*")
CONTEXT = "_context_manager"  # cache-dit's, of a pipeline and of its transformer


def refuse_other_caches(target: Any, module: nn.Module) -> None:
    """InputError, naming the sign, where another library caches this module, or the pipeline that has it."""
    # TeaCache keeps its own in the model's class. That of a pipeline says nothing of this one.
    places = (module, vars(module)), (module, vars(type(module))), (target, getattr(target, "__dict__", {}))
    for owner, attributes in places:
        for name, value in attributes.items():
            if _says_cached(name, value):
                library = type(value).__module__.partition(".")[0]
                whose = "another library" if library == "builtins" else library
                raise InputError(
                    f"{type(owner).__name__} has {name!r}: {whose} caches it already, and of two caches one hides the "
                    "other; take that one away first (cache_dit.disable_cache, or as its library does it)"
                )


def has_foreign_forward(model: nn.Module) -> bool:
    """Whether the model's forward, below the hooks that are known, is another than its class came with."""
    usual, held = type(model).forward, innermost(model, FORWARD).held
    if held is not None and held != usual.__get__(model):
        return True
    return usual.__module__ not in {kind.__module__ for kind in type(model).__mro__}


def _says_cached(name: str, value: Any) -> bool:
    if name == CONTEXT:
        return value is not None
    is_on = value is not None and value is not False and not callable(value)
    return is_on and bool(LIBRARY.fullmatch(name) or (value is True and FLAG.fullmatch(name)))
