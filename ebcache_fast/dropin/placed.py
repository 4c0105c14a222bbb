"""What lies in the place of a model's method: whoever traces, exports or compiles the model does not get into ours."""

import functools
import sys
from collections.abc import Callable
from itertools import chain
from operator import attrgetter
from types import CodeType
from typing import Any, Self

import torch
from torch import Tensor

from ebcache_fast.errors import InputError

WHY_NOT_TRACED = (
    "ebcache_fast answers for this model, by graphs of its own, which can't be part of those that torch.compile makes: "
    "leave out fullgraph=True around it, or call ebcache_fast.disable(model) first"
)
PROXY, FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE
FRAMES = torch._C._dynamo.eval_frame
NAME = attrgetter("__name__")


class NotScriptedError(InputError, AttributeError):
    """There is no source to script; to whoever only asks whether there is, there is none."""


class Placed:
    """A method of ours, called as the model's own of that name was.

    Exported and traced it is the model's own. Whoever compiles the model, with fullgraph=True too, runs it as it is.
    Bound to the model once more, as cache-dit does when it leaves, it stays what it is.
    """

    def __init__(self, own: Callable[[str], Callable[..., Any]], name: str, method: Callable[..., Any]) -> None:
        functools.update_wrapper(self, method)
        self._own, self._name, self._method = own, name, method
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_untraced"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._untraced: Callable[..., Any] | None = None
        _is_not_traced(type(self).__call__.__code__)
        if "torch._dynamo" in sys.modules:
            self._untraced = torch.compiler.disable(self._method, reason=WHY_NOT_TRACED)  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, **named: Any) -> Any:
        """What the method returns. This is where the frames that torch.compile looks at end, so all of it is here."""
        if torch.compiler.is_exporting():
            return self._own(self._name)(*args, **named)
        if torch.compiler.is_compiling():  # a function around the model
            if self._untraced is None:
                torch._dynamo.graph_break(WHY_NOT_TRACED)
            return self._untraced(*args, **named)  # type: ignore[misc]
        if (
            torch._C._is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._get_dispatch_mode(PROXY) is not None
            or torch._C._get_dispatch_mode(FAKE) is not None
            or "FakeTensor" in map(NAME, map(type, chain(args, named.values())))
        ):
            return self._own(self._name)(*args, **named)
        if not callable(FRAMES.get_eval_frame_callback()):  # nobody compiles
            return self._method(*args, **named)
        if self._untraced is None:
            self._untraced = torch.compiler.disable(self._method, reason=WHY_NOT_TRACED)  # type: ignore[no-untyped-call]
        _compiled(torch.zeros((), device="cpu"))
        return self._untraced(*args, **named)

    def __get__(self, instance: object, owner: type | None = None) -> Self:
        return self

    @property
    def __code__(self) -> CodeType:
        """That of the method, whose arguments are the model's own: torch.export asks for their names."""
        code: CodeType = self._own(self._name).__code__
        return code

    @property
    def __globals__(self) -> dict[str, Any]:
        """Nothing: torch.jit.script asks for it, to read the source. Raises NotScriptedError."""
        raise NotScriptedError(
            "an enabled model can't be scripted; call ebcache_fast.disable(model) first, or torch.jit.trace"
        )

    def __eq__(self, other: object) -> bool:
        return self._method == (other._method if isinstance(other, Placed) else other)

    def __hash__(self) -> int:
        return hash(self._method)


def _compiled(x: Tensor) -> Tensor:
    """Something to compile, for torch.compile(fullgraph=True) is in error where it finds nothing."""
    return x + 1


def _is_not_traced(code: CodeType) -> None:
    """Let torch.compile skip this code as torch._dynamo.skip would, to import which takes seconds."""
    strategy = FRAMES._FrameExecStrategy(FRAMES._FrameAction.SKIP, FRAMES._FrameAction.DEFAULT)
    FRAMES.set_code_exec_strategy(code, strategy)
