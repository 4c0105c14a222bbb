"""The first call that a pipeline of diffusers makes of its transformer: seen by letting it begin."""

from typing import Any

from ebcache_fast.dropin.diffusers_signatures import signature_of
from ebcache_fast.dropin.signatures import ForwardCall
from ebcache_fast.errors import InputError


class _SeenError(Exception):
    """Ends a pipeline's run at its first call."""

    def __init__(self, call: ForwardCall | None) -> None:
        super().__init__("the call that was waited for")
        self.call = call


class _Waiting:
    """Answerer of no call: it takes the first one away."""

    guided_channels = 0

    def answer(self, call: ForwardCall | None, name: str, *args: Any, **named: Any) -> Any:
        """Raise the exception that carries the call."""
        raise _SeenError(call)


def capture_call(pipe: Any, **arguments: Any) -> ForwardCall:
    """The first call that ``pipe(**arguments)`` makes of its transformer, which does not run.

    InputError where the pipeline makes none, or one that the engine does not know.
    """
    forward = signature_of(pipe.transformer)(_Waiting()).methods["forward"]
    own = vars(pipe.transformer)
    before = {name: own[name] for name in ("forward",) if name in own}
    own["forward"] = forward
    call = None
    try:
        pipe(**arguments)
    except _SeenError as seen:
        call = seen.call
    finally:
        del own["forward"]
        own.update(before)
    if call is None:
        raise InputError(
            f"{type(pipe).__name__} calls its transformer in a way that the engine does not know; pass it no "
            f"attention arguments (got {', '.join(arguments)})"
        )
    return call
