"""Methods of ours in the place of a model's own: put there below the hooks around them, and given back."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import attrgetter
from threading import local
from types import CodeType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ebcache_fast.errors import InputError

FORWARD = "forward"
WHY_NOT_TRACED = (
    "ebcache_fast answers for this model, by graphs of its own, which can't be part of those that torch.compile makes: "
    "leave out fullgraph=True around it, or call ebcache_fast.disable(model) first"
)
PROXY, FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE
FRAMES = torch._C._dynamo.eval_frame
NAME = attrgetter("__name__")
Method = Callable[..., Any]


class NotScriptedError(InputError, AttributeError):
    """Failure to script: there is no source; to whoever only asks whether there is, there is none."""


class PatchedMethod:
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
        """Return what the method returns; frames that torch.compile looks at end here, so all of it is here."""
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
        """Code of the method, whose arguments are the model's own: torch.export asks for their names."""
        code: CodeType = self._own(self._name).__code__
        return code

    @property
    def __globals__(self) -> dict[str, Any]:
        """Raise NotScriptedError: torch.jit.script asks for it, to read the source."""
        raise NotScriptedError(
            "an enabled model can't be scripted; call ebcache_fast.disable(model) first, or torch.jit.trace"
        )

    def __eq__(self, other: object) -> bool:
        return self._method == (other._method if isinstance(other, PatchedMethod) else other)

    def __hash__(self) -> int:
        return hash(self._method)


def _compiled(x: Tensor) -> Tensor:
    """Give torch.compile something to compile, as fullgraph=True is an error where it finds nothing."""
    return x + 1


def _is_not_traced(code: CodeType) -> None:
    """Let torch.compile skip this code as torch._dynamo.skip would, to import which takes seconds."""
    strategy = FRAMES._FrameExecStrategy(FRAMES._FrameAction.SKIP, FRAMES._FrameAction.DEFAULT)
    FRAMES.set_code_exec_strategy(code, strategy)


class Holder(NamedTuple):
    """Entry among somebody's attributes that may hold a method."""

    attributes: dict[str, Any]
    name: str

    @property
    def held(self) -> Any:
        """Object that the entry has; None where there is no entry."""
        return self.attributes.get(self.name)


class HookChain:
    """Hooks of accelerate and diffusers around a model's own method, which lies below them all.

    Those of accelerate load offloaded weights and move inputs before the forward, and rewrite it when they come and go.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        own = vars(model)
        self.holders = [Holder(own, name)]  # wherever the method may lie: the model itself first
        if name == FORWARD and "_old_forward" in own:  # accelerate's, of which there is one
            self.holders.append(Holder(own, "_old_forward"))
        if name == FORWARD and "_diffusers_hook" in own:
            for hook in own["_diffusers_hook"]._fn_refs:  # the first of them was put around the forward first
                self.holders.append(Holder(vars(hook), "original_forward" if hook.original_forward else FORWARD))

    @property
    def innermost(self) -> Holder:
        """The holder below all hooks."""
        own, *below = self.holders
        return next((holder for holder in below if not isinstance(holder.held, partial)), own)  # each hook is a partial


class _Asking(local):
    """Depth, of each thread, of the questions to the model itself right now, one within another."""

    depth = 0


class MethodPatch:
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
            holder = HookChain(self._model, name).innermost
            if name in self._above and holder.held is self._above[name]:
                continue  # what is around it gets to it still
            if holder.held is not None:
                self._replaced[name] = holder.held
            holder.attributes[holder.name] = PatchedMethod(self.method, name, method)
        self.is_replaced = True

    def restore(self, methods: Mapping[str, Method]) -> None:
        """Put back what ``methods`` replaced. What somebody put around one of them stays: that gets the model's own."""
        self.is_replaced = False
        self._above = {}
        for name, method in methods.items():
            hooks = HookChain(self._model, name)
            holder = next((holder for holder in hooks.holders if holder.held == method), None)
            if holder is not None:
                self._put_back(holder, name)
            elif (above := hooks.innermost.held) is not None:
                self._above[name] = above

    def _put_back(self, holder: Holder, name: str) -> None:
        if name in self._replaced:
            holder.attributes[holder.name] = self._replaced.pop(name)
        elif holder.name == name and holder.attributes is vars(self._model):
            del holder.attributes[name]  # its class has it
        else:
            holder.attributes[holder.name] = self._of_class(name)

    def _of_class(self, name: str) -> Method:
        method: Method = getattr(type(self._model), name).__get__(self._model)
        return method

    def answer(self, name: str, *args: Any, **named: Any) -> Any:
        """Answer as the model itself does."""
        with self.asked():
            return self.method(name)(*args, **named)

    def method(self, name: str) -> Method:
        """The model's own method of this name."""
        return self._replaced[name] if name in self._replaced else self._of_class(name)

    @property
    def is_asked(self) -> bool:
        """True if the model itself is to answer now: it is in its own place, or asked, and calls itself."""
        return not self.is_replaced or self._asking.depth > 0

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Let the model itself answer whatever this thread calls, while it lasts."""
        self._asking.depth += 1
        try:
            yield
        finally:
            self._asking.depth -= 1


def is_sent_away(model: nn.Module) -> bool:
    """True if a hook brings the model to its device for a call, and sends it away when others come.

    As diffusers' ``enable_model_cpu_offload`` has it.
    """
    hook = vars(model).get("_hf_hook")
    return any(type(link).__name__ in ("CpuOffload", "CustomOffloadHook") for link in getattr(hook, "hooks", (hook,)))


@contextmanager
def bare(model: nn.Module) -> Iterator[None]:
    """Have the model called without the hooks around its forward, which would move its weights, while it lasts."""
    own, holder = vars(model), HookChain(model, FORWARD).innermost
    outermost = own.get(FORWARD)
    if holder.attributes is own and holder.name == FORWARD:
        yield
        return
    own[FORWARD] = holder.held
    try:
        yield
    finally:
        own[FORWARD] = outermost
