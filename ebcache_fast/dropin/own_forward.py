"""The methods that a model came with: replaced by others, still there to be asked, and put back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import local
from typing import Any

from torch import nn

from ebcache_fast.dropin.hooked import Place, innermost, places
from ebcache_fast.dropin.placed import Placed

Method = Callable[..., Any]


class _Asking(local):
    """Of each thread: how often it asks the model itself right now, one question within another."""

    depth = 0


class OwnForward:
    """``forward`` and its kin of one model, whether its class or the instance itself has them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._replaced: dict[str, Method] = {}  # what the instance itself had
        self._above: dict[str, Method] = {}  # what somebody had put around the replacements when they were removed
        self.is_replaced = False
        self._asking = _Asking()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_asking"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._asking = _Asking()

    def replace(self, methods: Mapping[str, Method]) -> None:
        """Let the model answer with these, below the hooks around its forward."""
        for name, method in methods.items():
            place = innermost(self._model, name)
            if name in self._above and place.held is self._above[name]:
                continue  # what is around it gets to it still
            if place.held is not None:
                self._replaced[name] = place.held
            place.attributes[place.name] = Placed(self.method, name, method)
        self.is_replaced = True

    def restore(self, methods: Mapping[str, Method]) -> None:
        """Put back what ``methods`` replaced. What somebody put around one of them stays: that gets the model's own."""
        self.is_replaced = False
        self._above = {}
        for name, method in methods.items():
            place = next((place for place in places(self._model, name) if place.held == method), None)
            if place is not None:
                self._put_back(place, name)
            elif (above := innermost(self._model, name).held) is not None:
                self._above[name] = above

    def _put_back(self, place: Place, name: str) -> None:
        if name in self._replaced:
            place.attributes[place.name] = self._replaced.pop(name)
        elif place.name == name and place.attributes is vars(self._model):
            del place.attributes[name]  # its class has it
        else:
            place.attributes[place.name] = self._of_class(name)

    def _of_class(self, name: str) -> Method:
        method: Method = getattr(type(self._model), name).__get__(self._model)
        return method

    def answer(self, name: str, *args: Any, **named: Any) -> Any:
        """What the model itself answers."""
        with self.asked():
            return self.method(name)(*args, **named)

    def method(self, name: str) -> Method:
        """The model's own method of this name."""
        return self._replaced[name] if name in self._replaced else self._of_class(name)

    @property
    def is_asked(self) -> bool:
        """Whether the model itself is to answer now: it is in its own place, or asked, and calls itself."""
        return not self.is_replaced or self._asking.depth > 0

    @contextmanager
    def asked(self) -> Iterator[None]:
        """While this lasts, the model itself answers whatever this thread calls."""
        self._asking.depth += 1
        try:
            yield
        finally:
            self._asking.depth -= 1
