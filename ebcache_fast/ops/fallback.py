"""Torch's operations in the place of Triton kernels that can't be launched."""

from dataclasses import fields, replace
from functools import partial
from typing import Any, Self

import torch

from ebcache_fast.errors import CaptureError, EBCacheError
from ebcache_fast.ops import operations as ops
from ebcache_fast.ops.operands import StepIndex

# The operations whose Triton form is one launch of a kernel; the others are torch's libraries, or nobody's default.
OTHERS = (
    "name",
    "scaled_linear",
    "copy",
    "subtract",
    "select_tokens",
    "window_attention",
    "linear_gelu",
    "attention",
)
KERNELS = tuple(field.name for field in fields(ops.Operations) if field.name not in OTHERS)
LONGEST = 300  # characters of somebody else's error that are said


class Fallback:
    """Operations that are torch's for whatever their own kernels can't launch.

    A launch that fails has done nothing, so that torch's operation takes the very same call, in the midst of a step as
    well. What is too large for the card is one operation's matter. Anything else (no C compiler, no driver, a cache
    folder that can't be written) is the machine's: all operations are torch's from then on. Both are said once. With
    ``strict`` CaptureError is raised instead.
    """

    def __init__(self, operations: ops.Operations, *, strict: bool = False) -> None:
        self._preferred, self._strict = operations, strict
        self._why: dict[str, str] = {}  # by operation that torch's answer
        names = () if operations.name == ops.TORCH.name else KERNELS
        guarded: dict[str, Any] = {name: partial(self._run, name) for name in names}
        self.operations = replace(operations, **guarded)

    @classmethod
    def tried(cls, device: torch.device, dtype: torch.dtype) -> Self:
        """The operations of a device and dtype, after a launch of the smallest kernel on the smallest tensors."""
        found = cls(ops.select(device, dtype))
        h, gates = torch.zeros(2, 1, 1, 16, dtype=dtype, device=device)
        step = torch.zeros(1, dtype=torch.int32, device=device)
        found.operations.gated_residual(h, [h.clone()], [gates], StepIndex(step, step.clone()))
        return found

    def implementations(self) -> dict[str, str]:
        """Implementation of each operation by name, with the reason where it is torch's in the place of Triton's."""
        return self._preferred.implementations() | {name: f"torch: {why}" for name, why in self._why.items()}

    def _run(self, name: str, *args: Any, **named: Any) -> None:
        if name not in self._why:
            try:
                return getattr(self._preferred, name)(*args, **named)  # type: ignore[no-any-return]
            except (EBCacheError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # whatever Triton, a compiler, a driver or a file system may raise
                if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                    raise  # the capture is lost, and the step runs eagerly: there it shows whose fault it was
                self._give_up(name, error)
        getattr(ops.TORCH, name)(*args, **named)
        return None

    def _give_up(self, name: str, error: Exception) -> None:
        first = (str(error).splitlines() or [""])[0][:LONGEST]
        is_too_large = type(error).__name__ == "OutOfResources"  # Triton's, which a driver's refusal becomes as well
        why = f"{f'{name} is too large for the card, ' if is_too_large else ''}{type(error).__name__}: {first}"
        if self._strict:
            raise CaptureError(
                f"a Triton kernel could not be launched ({why}); mend that, see `ebcache-fast info`, or pass "
                "strict=False, which runs torch's operations instead"
            ) from error
        self._why |= dict.fromkeys([name] if is_too_large else KERNELS, why)
        ops.say_once(why)
