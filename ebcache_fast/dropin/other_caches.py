"""Caches of other libraries around a model or its pipeline, known by what they leave there, and what hides ours."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ebcache_fast.dropin.patching import FORWARD, HookChain, PatchedMethod
from ebcache_fast.errors import InputError
from ebcache_fast.models.layers import has_another_forward, walk

FLAG = re.compile(r"_?(is|enabled?)_(\w+_)?cached?")  # as ParaAttention's, cache-dit's and TeaCache's, where it is True
LIBRARY = re.compile(r"\w*(cache_?dit|db_?cache|deep_?cache|easy_?cache|fb_?cache|first_block_cache|tea_?cache)\w*")
CONTEXT = "_context_manager"  # cache-dit's, of a pipeline and of its transformer


def refuse_other_caches(target: Any, module: nn.Module) -> None:
    """Raise InputError, naming the sign, where another library caches this module, or the pipeline that has it."""
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
    """True if the model's forward, below the hooks that are known, is another than its class came with."""
    usual, held = type(model).forward, HookChain(model, FORWARD).innermost.held
    if held is not None and held != usual.__get__(model):
        return True
    return usual.__module__ not in {kind.__module__ for kind in type(model).__mro__}


def refuse_parts_that_keep(model: nn.Module, calls: Iterable[Callable[[], Any]]) -> None:
    """Raise InputError for a part whose replaced forward answers a call with what it gave to the one before.

    calls: call the model with other latents each. What gives one number, as a part that was switched off, keeps none.
    """
    seen: dict[nn.Module, tuple[list[Tensor], list[Tensor]]] = {}

    def look(part: nn.Module, args: Any, named: dict[str, Any], out: Any) -> None:
        inputs, outputs = _tensors((*args, *named.values())), _tensors(out if isinstance(out, tuple | list) else (out,))
        inputs_before, outputs_before = seen.get(part, ([], []))
        seen[part] = inputs, outputs
        if (
            outputs
            and _equal(outputs_before, outputs)
            and not _equal(inputs_before, inputs)
            and outputs[0].min() < outputs[0].max()
        ):
            raise InputError(
                f"{type(model).__name__}.{paths[part]} answers a call with what it kept of another: a cache of another "
                "library has replaced its forward; take that one away first"
            )

    paths = {part: path for path, part in walk(model) if part is not model and has_another_forward(part)}
    hooks = [part.register_forward_hook(look, with_kwargs=True) for part in paths]
    try:
        for call in calls if hooks else ():
            call()
    finally:
        for hook in hooks:
            hook.remove()


def what_hides(model: nn.Module, method: Any) -> str | None:
    """Name of what answers the model's calls in the place of ``method``, as far as can be seen; None if nothing does.

    Whoever puts another forward around one holds it: as an argument or in a closure, as an attribute of the model, or
    of a hook.
    """
    own = vars(model)
    top = own.get(FORWARD, type(model).forward)
    found, seen = [top], {id(top)}
    for candidate in found:
        if isinstance(candidate, MethodType | PatchedMethod) and candidate == method:
            return None
        for inner in _held_by(candidate, own):
            if id(inner) not in seen and not isinstance(inner, nn.Module):
                seen.add(id(inner))
                found.append(inner)
    function = getattr(top, "func", top)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', None) or 'a'}.{name}".replace("<locals>.", "")


def _held_by(function: Any, own: dict[str, Any]) -> Iterator[Any]:
    """Yield what a function may call, of what can be seen."""
    if isinstance(function, partial):
        yield from (function.func, *function.args, *function.keywords.values())
    elif isinstance(function, MethodType):
        yield from (function.__func__, function.__self__)
    elif isinstance(function, FunctionType):
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # an empty one
                yield cell.cell_contents
        yield from (own[name] for name in function.__code__.co_names if name in own and callable(own[name]))
    else:
        yield from filter(callable, getattr(function, "__dict__", {}).values())  # of whatever name


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _equal(before: list[Tensor], now: list[Tensor]) -> bool:
    return len(before) == len(now) and all(map(torch.equal, before, now))


def _says_cached(name: str, value: Any) -> bool:
    if name == CONTEXT:
        return value is not None
    is_on = value is not None and value is not False and not callable(value)
    return is_on and bool(LIBRARY.fullmatch(name) or (value is True and FLAG.fullmatch(name)))
