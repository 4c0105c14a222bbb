"""Where a model's own forward lies: accelerate's and diffusers' hooks are put around it, and stay there."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

from ebcache_fast.dropin.placed import Placed

FORWARD = "forward"


class Place(NamedTuple):
    """An entry among somebody's attributes."""

    attributes: dict[str, Any]
    name: str

    @property
    def held(self) -> Any:
        """What lies there; None where nothing does."""
        return self.attributes.get(self.name)


def places(model: nn.Module, name: str) -> list[Place]:
    """Wherever a model's method of this name may lie: in the model itself, and below the hooks around its forward.

    Those of accelerate load offloaded weights and move inputs before the forward, and rewrite it when they come and go.
    """
    own = vars(model)
    found = [Place(own, name)]
    if name == FORWARD and "_old_forward" in own:  # accelerate's, of which there is one
        found.append(Place(own, "_old_forward"))
    if name == FORWARD and "_diffusers_hook" in own:
        for hook in own["_diffusers_hook"]._fn_refs:  # the first of them was put around the forward first
            found.append(Place(vars(hook), "original_forward" if hook.original_forward else FORWARD))
    return found


def innermost(model: nn.Module, name: str) -> Place:
    """The place below all hooks."""
    own, *below = places(model, name)
    return next((place for place in below if not isinstance(place.held, partial)), own)  # each hook is a partial


def is_sent_away(model: nn.Module) -> bool:
    """Whether a hook brings the model to its device for a call, and sends it away when others come, as diffusers'
    ``enable_model_cpu_offload`` has it.
    """
    hook = vars(model).get("_hf_hook")
    return any(type(one).__name__ in ("CpuOffload", "CustomOffloadHook") for one in getattr(hook, "hooks", (hook,)))


def what_hides(model: nn.Module, method: Any) -> str | None:
    """What answers the model's calls in the place of ``method``, as far as can be seen; None where that is reached.

    Whoever puts another forward around one holds it: as an argument or in a closure, as an attribute of the model, or
    of a hook.
    """
    own = vars(model)
    top = own.get(FORWARD, type(model).forward)
    found, seen = [top], {id(top)}
    for one in found:
        if isinstance(one, MethodType | Placed) and one == method:
            return None
        for each in _held_by(one, own):
            if id(each) not in seen and not isinstance(each, nn.Module):
                seen.add(id(each))
                found.append(each)
    function = getattr(top, "func", top)
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', None) or 'a'}.{name}".replace("<locals>.", "")


def _held_by(one: Any, own: dict[str, Any]) -> Iterator[Any]:
    """What a function may call, of what can be seen."""
    if isinstance(one, partial):
        yield from (one.func, *one.args, *one.keywords.values())
    elif isinstance(one, MethodType):
        yield from (one.__func__, one.__self__)
    elif isinstance(one, FunctionType):
        for cell in one.__closure__ or ():
            with suppress(ValueError):  # an empty one
                yield cell.cell_contents
        yield from (own[name] for name in one.__code__.co_names if name in own and callable(own[name]))
    else:
        yield from filter(callable, getattr(one, "__dict__", {}).values())  # of whatever name


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """While this lasts, the model is called without the hooks around its forward, which would move its weights."""
    own, place = vars(model), innermost(model, FORWARD)
    hooked = own.get(FORWARD)
    if place.attributes is own and place.name == FORWARD:
        yield
        return
    own[FORWARD] = place.held
    try:
        yield
    finally:
        own[FORWARD] = hooked
