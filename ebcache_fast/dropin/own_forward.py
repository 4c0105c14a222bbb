"""The methods that a model came with: replaced by others, still there to be asked, and put back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import local
from typing import Any

from torch import nn

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
        """Let the model answer with these."""
        own = vars(self._model)
        free = [name for name in methods if name not in self._above or own.get(name) is not self._above[name]]
        self._replaced.update({name: own[name] for name in free if name in own})
        own.update({name: methods[name] for name in free})
        self.is_replaced = True

    def restore(self, methods: Mapping[str, Method]) -> None:
        """Put back what ``methods`` replaced. What somebody put around one of them stays: that gets the model's own."""
        own = vars(self._model)
        self.is_replaced = False
        self._above = {name: own[name] for name in methods if name in own and own[name] != methods[name]}
        for name in methods:
            if own.get(name) == methods[name]:
                del own[name]
                own.update({name: self._replaced.pop(name)} if name in self._replaced else {})

    def answer(self, name: str, *args: Any) -> Any:
        """What the model itself answers."""
        own = self._replaced.get(name) or getattr(type(self._model), name).__get__(self._model)
        with self.asked():
            return own(*args)

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
