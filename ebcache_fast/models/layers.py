"""Layers of a model as families ask for them: tests of whether they are torch's own and bare, and ways to run them."""

from collections.abc import Iterable, Iterator
from itertools import chain
from operator import attrgetter
from typing import Any, Final

import torch
from torch import Tensor, nn

from ebcache_fast.errors import InputError

# What a fused operation can read. Any other class of tensor (quantised, sharded, packed) has Python of its own, knows
# perhaps few operations, and need have no memory that a kernel could read: the module that it belongs to runs.
PLAIN_TENSORS: Final = frozenset({Tensor, nn.Parameter})


def is_known(part: Any) -> bool:
    """True of torch's or diffusers' own: their Python holds nothing that changes from call to call."""
    return type(part).__module__.startswith(("torch.nn.modules", "diffusers.models."))


def first_foreign(named: Iterable[tuple[str, nn.Module]]) -> str | None:
    """The path of the first of these (path, module) whose class, weights or attention processor are neither's own."""
    for path, module in named:
        for name, part in walk(module, path):
            if not (is_known(part) and is_known(getattr(part, "processor", part)) and has_plain_weights(part)):
                return name
    return None


def has_plain_weights(module: Any) -> bool:
    """True if none of a module's own parameters is of another class of tensor than torch's own."""
    return all(
        weight is None or type(weight) in PLAIN_TENSORS for weight in getattr(module, "_parameters", {}).values()
    )


def walk(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The model and all below it, level by level, each once with the first path to it, whatever holds what."""
    found, seen = [(prefix, model)], {id(model)}
    for path, module in found:
        yield path, module
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append((f"{path}{path and '.'}{name}", child))


def parameters_of(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the parameters of the model and what is below it; one that has two places comes twice."""
    for _, module in walk(model):
        yield from (parameter for parameter in module._parameters.values() if parameter is not None)


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers of the model and what is below it."""
    yield from parameters_of(model)
    for _, module in walk(model):
        yield from (buffer for buffer in module._buffers.values() if buffer is not None)


def in_training(model: nn.Module) -> str | None:
    """A layer in training mode, to which that makes a difference; None without any."""
    matter = ("p", "drop_prob", "dropout_prob", "track_running_stats")  # dropout of every kind, and batch norm
    training = ((path, module) for path, module in walk(model) if module.training)
    return next((path for path, module in training if any(vars(module).get(name) for name in matter)), None)


def has(model: nn.Module, path: str) -> bool:
    """True if there is an attribute at the end of a path such as "blocks.0.attn"."""
    try:
        attrgetter(path)(model)
    except AttributeError:
        return False
    return True


def weight_of(layer: nn.Module) -> Tensor:
    """An empty, plain tensor of the dtype that a layer computes in, on its device, for memory to be made like it.

    That dtype is a plain parameter's, of a layer with quantised weights its bias's (``half()`` leaves torchao's weights
    as they are); or another parameter's, or its ``compute_dtype``, as layers of bitsandbytes and GGUF have it.
    InputError where nothing says it.
    """
    parameters = sorted(layer.parameters(), key=lambda parameter: type(parameter) not in PLAIN_TENSORS)
    computing = (getattr(module, "compute_dtype", None) for module in layer.modules())
    said = chain((parameter.dtype for parameter in parameters), computing)
    found = next(
        (dtype for dtype in said if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1), None
    )
    if found is None or not parameters:
        dtypes = ", ".join(sorted({str(parameter.dtype) for parameter in parameters})) or "no"
        raise InputError(
            f"a {type(layer).__name__} has {dtypes} parameters alone, which say no dtype to compute in; load its model "
            "in float16, bfloat16 or float32"
        )
    first = parameters[0]
    if type(first) in PLAIN_TENSORS and first.dtype == found:
        return first.detach()[:0]  # a view: it is asked for within a step, where nothing may be launched
    return torch.zeros(0, dtype=found, device=first.device)


def linear_into(linear: Any, u: Tensor, out: Tensor) -> None:
    """Write ``linear(u)`` into ``out``; a plain layer's product lands there without a copy."""
    is_product = is_plain(linear) and u.dtype == linear.weight.dtype == out.dtype  # autocast lets them differ
    has_rows = out.stride(2) == 1 and out.stride(0) == out.shape[1] * out.stride(1)  # whole, or a part of each
    if is_product and has_rows:
        torch.addmm(linear.bias, u.flatten(0, 1), linear.weight.t(), out=out.flatten(0, 1))
    else:
        out.copy_(linear(u))


def is_plain(linear: Any) -> bool:
    """True if the layer is its dense weight and bias alone: no adapter, parametrization or hook."""
    return type(linear) is nn.Linear and is_bare(linear)


def are_plain_embed_head(embedder: Any, linear: Any, *others: Tensor) -> bool:
    """True if embedding and head are bare layers, and these others plain tensors of one dtype with them."""
    if not (is_plain(linear) and is_plain_patching(embedder) and PLAIN_TENSORS.issuperset(map(type, others))):
        return False
    return len({weight.dtype for weight in (embedder.proj.weight, linear.weight, *others)}) == 1


def is_plain_patching(embedder: Any) -> bool:
    """True if the embedder is one bare convolution of patches side by side, and nothing after it but positions."""
    proj = embedder.proj
    if is_watched(embedder) or type(proj) is not nn.Conv2d or not is_bare(proj):
        return False
    apart = (proj.stride, proj.padding, proj.dilation, proj.groups) == (proj.kernel_size, (0, 0), (1, 1), 1)
    is_normed = not isinstance(getattr(embedder, "norm", None), nn.Identity | None)
    is_cropped = getattr(embedder, "pos_embed_max_size", None) is not None
    return apart and not is_normed and not is_cropped and bool(getattr(embedder, "flatten", True))


def is_bare(layer: Any) -> bool:
    """True if a layer's weight and bias are plain parameters of its own, and its forward its class's."""
    return type(layer.weight) is type(layer.bias) is nn.Parameter and not is_watched(layer)


def is_watched(module: Any) -> bool:
    """True if hooks, or another forward than its class's, change what a module does."""
    return bool(module._forward_hooks or module._forward_pre_hooks or has_another_forward(module))


def has_another_forward(module: Any) -> bool:
    """True if an instance has a forward that is not its class's; whoever took theirs away may have left that there."""
    forward = vars(module).get("forward")
    return forward is not None and forward != type(module).forward.__get__(module)
