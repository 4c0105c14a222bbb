"""Eligibility of a call for the engine: by what the call asks for, and what the model is by now."""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ebcache_fast.dropin.patching import MethodPatch
from ebcache_fast.dropin.probe import probe
from ebcache_fast.dropin.signatures import ForwardCall
from ebcache_fast.engine.flags import Flags, Functions
from ebcache_fast.engine.module_watch import ModuleState, Watch
from ebcache_fast.engine.options import EngineOptions
from ebcache_fast.errors import EBCacheError, InputError
from ebcache_fast.models import Denoiser, as_denoiser
from ebcache_fast.models.layers import PLAIN_TENSORS, in_training, parameters_of, walk
from ebcache_fast.plan import Plan
from ebcache_fast.sampling import plan_for

OFF_SWITCH = "EBCACHE_DISABLE"
Probed = tuple[object, ...]  # what a probe ran: modules in their places, the code they run, torch's functions


class DeclinedError(Exception):
    """Refusal of a call that the model's own forward has to answer; the message says why."""


class UnfitError(DeclinedError):
    """Refusal of a call that only the model's own forward may take. Its cause is the error if that does not."""


class Admitted(NamedTuple):
    """Call that the engine can answer, and what it is to be answered with."""

    call: ForwardCall
    held: Tensor  # the call's, by its caller, for the length of a run
    denoiser: Denoiser
    weights: ModuleState
    flags: Flags


class Eligibility:
    """Lets calls of one model through to the engine as long as that computes what the model's own forward would.

    Raises InputError where the model computes something else than its parts say, TableError where the plan is for
    another one.
    """

    def __init__(self, model: nn.Module, plan: Plan, options: EngineOptions, own: MethodPatch) -> None:
        options.check(as_denoiser(model))
        self.model, self.plan, self.options, self.patch = model, plan, options, own
        if layer := in_training(model):
            raise InputError(f"{type(model).__name__}'s {layer} is in training mode; call model.eval()")
        self.guided_channels = probe(model, plan)  # of forward_with_cfg; 0 where the model's own has to run
        self.forget()
        self._probed: Probed = self._code(self._watch.look(), Flags.now(self._device).functions)

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: a copy has another model to look at."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.forget()

    def forget(self) -> None:
        """Look at everything again when the next call comes."""
        self._watch = Watch(self.model)
        self._device = torch.device("cpu")  # the model's, once it is looked at
        self._seen: object = None  # parts and functions as they were looked at last
        self._probed = ()
        self._checked: object = None  # the form of the call, and the weights, that were checked last
        self._misfit: str | None = None  # why the model can't be answered for as it is now

    def admit(self, call: ForwardCall | None) -> Admitted:
        """The call, None being one whose arguments the engine does not know.

        Raises DeclinedError where the model's own forward has to answer, UnfitError where it has to try.
        """
        call, tensors = self._asks_for_nothing_else(call)
        weights, flags = self._watch.look(), Flags.now(self._device)  # while the device may be busy with a call
        if (seen := (weights.parts, flags.functions)) != self._seen:
            self._look_again(weights, flags.functions)
            self._seen = seen
            flags = Flags.now(self._device)  # which may be another by now
        if self._misfit:
            raise DeclinedError(self._misfit)
        if flags.autocast:
            raise DeclinedError("autocast is on")
        lacks = [tensor is None for tensor in call.context]
        form = weights, call.guided_channels, lacks, [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        if form != self._checked:
            self._check(call)
            self._checked = form
        return Admitted(call, tensors[0], self._denoiser, weights, flags)

    def _check(self, call: ForwardCall) -> None:
        try:
            call.check(self._denoiser)
        except InputError as error:
            if self.options.strict:
                raise
            raise UnfitError(str(error)) from error

    def _asks_for_nothing_else(self, call: ForwardCall | None) -> tuple[ForwardCall, tuple[Tensor, ...]]:
        if os.environ.get(OFF_SWITCH, "0") not in ("", "0"):
            raise DeclinedError(OFF_SWITCH)
        if call is None:
            raise DeclinedError("arguments that the engine does not know")
        if not PLAIN_TENSORS.issuperset(map(type, tensors := call.tensors)):
            raise DeclinedError("arguments that are no plain tensors")
        if self.model.training:
            raise DeclinedError("the model is in training mode")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*tensors, *parameters_of(self.model))):
            raise DeclinedError("gradients are recorded")
        if forward_ad._current_level >= 0:
            raise DeclinedError("gradients are carried forward")
        if isinstance(call.cfg_scale, Tensor) and call.cfg_scale.numel() != 1:
            raise DeclinedError("cfg_scale differs within the batch")
        return call, tensors

    def _look_again(self, weights: ModuleState, functions: Functions) -> None:
        """Find out whether the model can still be answered for; hooks or modules may be others by now."""
        self._misfit = None
        try:
            self._denoiser: Denoiser = as_denoiser(self.model)
            self.options.check(self._denoiser)
            if (weight := self._denoiser.weight()).is_meta:
                raise InputError("its weights are on the meta device, as offloading leaves them")
            self._device = weight.device
            if layer := in_training(self.model):
                raise InputError(f"its {layer} is in training mode, and the engine runs it as in eval mode")
            if (code := self._code(weights, functions)) != self._probed:
                self._probe_again()
                self._probed = code
        except EBCacheError as error:
            self._misfit = f"the model was changed: {error}"
        else:
            if module := self._denoiser.passed_over_hooks():
                self._misfit = f"{module} has hooks, and no part of the engine calls it"

    def _code(self, weights: ModuleState, functions: Functions) -> Probed:
        modules = [module for _, module in walk(self.model)]
        forwards = [vars(module).get("forward") for module in modules[1:]]  # the model's own is where ours lies
        return [tuple(module._modules.items()) for module in modules], forwards, weights.code, functions

    def _probe_again(self) -> None:
        plan_for(self._denoiser, self.plan)
        with self.patch.asked():
            guided_channels = probe(self.model, self.plan)
        if guided_channels != self.guided_channels:
            raise InputError("its forward_with_cfg is another one; enable it again")
