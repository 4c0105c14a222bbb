"""Where a model's own forward lies: accelerate's and diffusers' hooks are put around it, and stay there."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn

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
