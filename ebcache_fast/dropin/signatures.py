"""Signatures of a model's forward: how models are called, and what one call holds."""

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ebcache_fast.dropin.patching import Method
from ebcache_fast.engine.engine import Batch
from ebcache_fast.errors import InputError
from ebcache_fast.models import Conditioning, Denoiser

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Facts(NamedTuple):
    """Values that a call's tensors hold, on the host."""

    timesteps: frozenset[float]
    labels: tuple[int, ...]


class ForwardCall(NamedTuple):
    """``forward(x, t, y)``, or with guided channels ``forward_with_cfg(x, t, y, cfg_scale)``."""

    x: Tensor  # (R, C, H, W), or of videos (R, C, F, H, W), in the model's dtype
    t: Tensor  # (R,) of any real dtype, or (1,) or () for all rows; on the model's device or the host
    y: Tensor  # (R,) integers
    cfg_scale: float | Tensor = 1.0  # one number
    guided_channels: int = 0
    context: Conditioning = ()  # of R rows

    @property
    def samples(self) -> int:
        """Number of samples: R, or R / 2 under guidance, where the second half repeats the latents of the first."""
        return len(self.y) // 2 if self.guided_channels else len(self.y)

    @property
    def batch(self) -> Batch:
        """Batch of the call's rows, as the engine takes it."""
        return Batch(self.y.long(), self.samples, self.guided_channels, tuple(self.x.shape[1:]), self.context)

    @property
    def held(self) -> Tensor:
        """The tensor that its caller holds for the length of a run: prompts, or labels."""
        return self.tensors[0]

    def row_not_finite(self) -> int | None:
        """The first row whose text is not finite throughout; None without one. It waits for the device."""
        finite = self.held.reshape(len(self.held), -1).isfinite().all(dim=1)
        return None if finite.all() else int(finite.int().argmin())

    def check_text(self) -> None:
        """Raise InputError where a text is not finite: what comes of it would be blamed on the latents."""
        if (row := self.row_not_finite()) is not None:
            raise InputError(
                f"the text of row {row} holds a number that is not finite, as prompts that a float16 encoder overflows "
                "at; encode the prompt in bfloat16 or float32"
            )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Tensors of the call, all of them, `held` first."""
        cfg_scale = (self.cfg_scale,) if isinstance(self.cfg_scale, Tensor) else ()
        return (*[tensor for tensor in self.context if tensor is not None], self.y, self.x, self.t, *cfg_scale)

    def check(self, denoiser: Denoiser) -> None:
        """Raise InputError unless shapes, dtypes and devices are the model's; what tensors hold is not looked at."""
        x, t, y, weight = self.x, self.t, self.y, denoiser.weight()
        if not x.ndim or not len(x):
            raise InputError(f"x of shape {tuple(x.shape)} holds no row; pass one latent or more")
        denoiser.for_shape(tuple(x.shape[1:]), self.context)
        if x.dtype != weight.dtype:
            raise InputError(f"x is {x.dtype}, but the model {weight.dtype}; convert one of them")
        context = (("the context", tensor, ()) for tensor in self.context if tensor is not None)
        for name, tensor, also in (("x", x, ()), ("y", y, ()), ("t", t, (torch.device("cpu"),)), *context):
            if tensor.device not in (weight.device, *also):
                raise InputError(f"{name} is on {tensor.device}, but the model on {weight.device}; move one of them")
        if y.shape != x.shape[:1] or y.dtype not in INTEGERS:
            raise InputError(f"y of shape {tuple(y.shape)} and {y.dtype} does not fit; it must be ({len(x)},) integers")
        if t.shape not in ((), (1,), x.shape[:1]) or t.dtype.is_complex or t.dtype == torch.bool:
            raise InputError(f"t of shape {tuple(t.shape)} and {t.dtype} does not fit; it must be ({len(x)},) numbers")
        if self.guided_channels and len(x) % 2:
            raise InputError(f"{len(x)} rows can't be halved; pass the conditional rows, then as many unconditional")

    def read(self, denoiser: Denoiser) -> Facts:
        """Read what its tensors hold: the one time that a call waits for the device.

        InputError for a label that the model does not have, or latents that are not finite.
        """
        total = self.x.sum(dtype=torch.float64)  # not finite where any number is not
        if total.is_cpu:  # and so is all else
            y, x, t = self.y.tolist(), total.item(), self.t.tolist() if self.t.ndim else (self.t.item(),)
        else:
            y, (x,), t = numbers_of(self.y, total, self.t)
        labels, timesteps = tuple(map(int, y)), frozenset(t)
        highest = denoiser.num_classes - 1 + denoiser.has_null_label
        if not 0 <= min(labels) <= max(labels) <= highest:
            wrong = next(label for label in labels if not 0 <= label <= highest)
            raise InputError(f"label {wrong} in y is outside [0, {highest}]; this model has no other")
        if not math.isfinite(x):
            self.check_text()
            raise InputError("x holds a number that is not finite; begin again, from finite noise")
        if strange := [t for t in timesteps if not math.isfinite(t)]:
            raise InputError(f"t={strange[0]} is not finite; pass timesteps of the plan, in its order")
        return Facts(timesteps, labels)


def numbers_of(*tensors: Tensor) -> list[list[float]]:
    """Numbers in tensors (n,) or (): of a GPU by one awaited copy of all, in float64, of the host as they are."""
    away = [tensor.double().flatten() for tensor in tensors if not tensor.is_cpu]
    copied = iter(torch.cat(away).tolist() if away else ())
    return [tensor.flatten().tolist() if tensor.is_cpu else list(islice(copied, tensor.numel())) for tensor in tensors]


class Answering(Protocol):
    """Answerer of calls: see `CachedForward`."""

    @property
    def guided_channels(self) -> int:
        """Number of channels that ``forward_with_cfg`` guides; 0 where the model's own has to run."""
        ...

    def answer(self, call: ForwardCall | None, name: str, *args: Any, **named: Any) -> Any:
        """Return our output (R, Cout, H, W), or whatever the model's own method of that name returns."""
        ...


class Signature(Protocol):
    """The methods that take the place of a model's own, bound to who answers."""

    unconditional_first: bool  # how their pipelines order the rows of a guided batch

    def __init__(self, answering: Answering) -> None: ...

    @property
    def methods(self) -> Mapping[str, Method]:
        """Methods by the names of the model's own."""
        ...

    @staticmethod
    def ask(model: Any, call: ForwardCall) -> Any:
        """Return the tensor of the model's own method for a call."""
        ...


class FacebookDiTSignature:
    """Signature of the original's DiT."""

    unconditional_first = False

    def __init__(self, answering: Answering) -> None:
        self._answering, self._guided_channels = answering, answering.guided_channels

    @property
    def methods(self) -> Mapping[str, Method]:
        guided: dict[str, Method] = {"forward_with_cfg": self.forward_with_cfg}
        return {"forward": self.forward} | (guided if self._guided_channels else {})

    @staticmethod
    def ask(model: Any, call: ForwardCall) -> Any:
        if call.guided_channels:
            return model.forward_with_cfg(call.x, call.t, call.y, call.cfg_scale)
        return model(call.x, call.t, call.y)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *more: Any, **others: Any) -> Tensor:
        """Answer as the model: latents x (R, C, H, W), timesteps t (R,), labels y (R,) -> (R, out_channels, H, W)."""
        call = None if more or others else ForwardCall(x, t, y)
        out: Tensor = self._answering.answer(call, "forward", x, t, y, *more, **others)
        return out

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Answer as the model: the second half of the batch is unconditional, and takes the latents of the first."""
        call = ForwardCall(x, t, y, cfg_scale, self._guided_channels)
        out: Tensor = self._answering.answer(call, "forward_with_cfg", x, t, y, cfg_scale)
        return out
