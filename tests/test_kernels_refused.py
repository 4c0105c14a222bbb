"""Operands that a kernel can't take: one line names the value and what is allowed, and nothing is written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import in_place
from float8 import needs_float8
from kernel_operations import Call, Operation, mapped, tensors
from step_operands import EMBED, EMBED_NORM, PREDICT, RUN, STEPS, UPDATE
from stream_operands import (
    ATTENTION,
    GATHER,
    GELU,
    RESIDUAL,
    RESIDUAL_FLOAT8,
    RESIDUAL_NORM,
    SCATTER,
    SUM,
    WINDOW,
)
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.ops.operands import Advance, StepIndex

Edit = Callable[[Any], Any]


def put(**edits: Edit) -> Callable[[Call], Call]:
    """Operands changed, each by its own; what lies within one is named as "update__noise"."""

    def change(call: Call) -> Call:
        for path, edit in edits.items():
            name, _, inner = path.partition("__")
            value = call[name]
            value = value._replace(**{inner: edit(getattr(value, inner))}) if inner else edit(value)
            call = call | {name: value}
        return call

    return change


def becomes(value: Any) -> Edit:
    return lambda _: value


def first_of(tensor: Tensor) -> Tensor:
    return tensor[:1]


def all_but_first(tensor: Tensor) -> Tensor:
    return tensor[1:]


def transposed_in_memory(tensor: Tensor) -> Tensor:
    """The same values, and other strides."""
    return tensor.mT.contiguous().mT


def each(edit: Edit) -> Edit:
    return lambda values: [edit(value) for value in values]


def on_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


OF_LATENTS = {
    "float64 latents": (put(x=Tensor.double), "latents of shape"),
    "strides of x": (put(x=transposed_in_memory), "latents of shape"),
}
OF_EMBEDS = OF_LATENTS | {
    "bfloat16 latents": (put(x=Tensor.bfloat16), "latents of shape"),
    "x of another size": (put(x=lambda x: x[..., :-1].contiguous()), "can't be cut"),
    "three rows a sample": (put(x=lambda x: torch.cat([x, x, x])[:5].contiguous()), "4 rows for 5 samples"),
    "dtype of the weight": (put(patches__weight=Tensor.half), "float16"),
    "shape of the bias": (put(patches__bias=all_but_first), "must be"),
    "positions of another grid": (put(patches__positions=all_but_first), "must be"),
    "float64 stream": (put(h=Tensor.double), "float64 is none of"),
}
HALF_WIDE = torch.zeros(3, 5, 96)
ONE = torch.ones(1, dtype=torch.int32)
OF_RESIDUALS = {
    "float64": (put(h=Tensor.double), "float64 is none of"),
    "strides": (put(h=becomes(HALF_WIDE[:, :, ::2])), "not contiguous"),
    "shape of h": (put(h=lambda h: h.flatten(0, 1)), "rows, tokens, channels"),
    "nothing": (put(h=lambda h: h[:0]), "one or more of each"),
    "shape of a branch": (put(branches=each(lambda branch: branch[:, 1:].contiguous())), "must be"),
    "strides of a branch": (put(branches=each(becomes(HALF_WIDE[:, :, :48]))), "not contiguous"),
    "dtype of a branch": (put(branches=each(Tensor.half)), "float16"),
    "three branches": (put(branches=lambda b: [*b, b[0]], gates=lambda g: [*g, g[0]]), "at most 2"),
    "gates missing": (put(gates=becomes([])), "one gate a branch"),
    "shape of a gate": (put(gates=each(lambda gate: gate[..., 1:])), "modulation table"),
    "dtype of a gate": (put(gates=each(Tensor.half)), "modulation table"),
    "strides of the gates": (put(gates=lambda gates: [gates[0], gates[1].contiguous()]), "views of one table"),
    "channels apart": (put(gates=each(becomes(torch.zeros(6, 2, 96)[:, :, ::2]))), "side by side"),
    "int64 step": (put(at=lambda at: at._replace(step=at.step.long())), "step of shape"),
    "a float count": (put(at=lambda at: at._replace(advance=Advance(torch.zeros(1), 1))), "advance.to of shape"),
    "rows": (put(at=becomes(StepIndex(ONE, ONE.repeat(4)))), "row_of of shape"),
}


def with_u_like_h(change: Callable[[Call], Call]) -> Callable[[Call], Call]:
    def change_both(call: Call) -> Call:
        call = change(call)
        return call | dict(u=torch.empty_like(call["h"]))

    return change_both


OF_FLOAT8 = {
    "values in bfloat16": (put(u__values=Tensor.bfloat16), "must be .*float8_e4m3fn"),
    "another float8": (put(u__values=lambda values: values.view(torch.float8_e5m2)), "must be .*float8_e4m3fn"),
    "shape of values": (put(u__values=lambda values: values[:, :2].contiguous()), "must be"),
    "strides of values": (put(u__values=transposed_in_memory), "contiguous"),
    "scales of rows": (put(u__scales=lambda scales: scales[:, 0]), "must be"),
    "scales in float64": (put(u__scales=Tensor.double), "must be .*float32"),
    "strides of scales": (put(u__scales=transposed_in_memory), "contiguous"),
}
OF_SUMS = {
    "four steps": (put(sums=lambda sums: torch.cat([sums, sums])), r"4 steps .* outside \[1, 3\]"),
    "no step": (put(sums=lambda sums: sums[:0]), "0 steps"),
    "gates of fewer slots": (put(gates=lambda gates: gates[:, 1:]), "do not fit"),
    "no slots": (put(slots=lambda slots: slots[:0], gates=lambda gates: gates[:, :0]), "do not fit"),
    "strides of the slots": (put(slots=transposed_in_memory), "not contiguous"),
    "dtype of the slots": (put(slots=Tensor.half), "float16"),
    "shape of the base": (put(base=first_of), "must be"),
    "float64": (put(sums=Tensor.double), "float64 is none of"),
}
OF_HEADS = {
    "three branches": (put(branches=lambda b: [*b, b[0]], gates=lambda g: [*g, g[0]]), "at most 2"),
    "features of no patch": (put(linear__weight=all_but_first), "features a token"),
    "a bias of another size": (put(linear__bias=all_but_first), "must be"),
    "three copies": (put(guide__copies=becomes(3)), "1, or 2 under guidance"),
    "guided channels": (put(guide__channels=becomes(5)), r"outside \[0, 4\]"),
    "settings": (put(guide__settings=Tensor.double), "scale and b"),
}
OF_UPDATES = (
    OF_LATENTS
    | OF_HEADS
    | {
        "x of another batch": (put(x=first_of), "latents of shape"),
        "coefficients": (put(update__coefficients=lambda each: each[:, :5]), r"\(S, 6\)"),
        "strides of the coefficients": (put(update__coefficients=transposed_in_memory), "not contiguous"),
        "coefficients without those of the memory": (
            lambda call: put(update__previous=becomes(call["x"].clone()))(call),
            r"\(S, 9\)",
        ),
        "a memory of another batch": (
            lambda call: put(
                update__coefficients=lambda each: each.new_ones(STEPS, 9),
                update__previous=becomes(call["x"][:1].clone()),
            )(call),
            "latents of shape",
        ),
        "noise of fewer steps": (put(update__noise=all_but_first), "latents of shape"),
    }
)
OF_RUNS = {
    "float64 latents": (put(x=Tensor.double), "latents of shape"),
    "float64 sums": (put(sums=Tensor.double), "float64 is none of"),
    "strides of the sums": (put(sums=transposed_in_memory), "not contiguous"),
    "every other sum": (put(sums=lambda sums: torch.cat([sums, sums])[::2]), "not contiguous"),
    "an embedding of another width": (put(patches__weight=all_but_first), "must be"),
    "noise of another batch": (put(update__noise=lambda noise: noise[:, 1:]), "latents of shape"),
}


def of_tokens(stream: str, tokens: str) -> dict[str, tuple[Callable[[Call], Call], str]]:
    """By the names that an operation has for the whole stream and for the chosen tokens."""
    return {
        "float64": (put(**{stream: Tensor.double, tokens: Tensor.double}), "float64 is none of"),
        "a matrix": (put(**{stream: lambda whole: whole[0]}), "not .rows, tokens, channels."),
        "no token chosen": (put(indices=lambda c: c[:, :0], **{tokens: lambda t: t[:, :0]}), "1 to 5"),
        "more than there are": (put(indices=becomes(torch.zeros(2, 6, dtype=torch.int32))), "1 to 5"),
        "indices in int64": (put(indices=Tensor.long), "int64"),
        "indices of fewer rows": (put(indices=first_of), r"\(1, 3\)"),
        "indices without rows": (put(indices=lambda indices: indices[0]), r"must be \(2, 1 to 5\)"),
        "strides of the indices": (put(indices=transposed_in_memory), "contiguous"),
        "device of the indices": (put(indices=on_meta), "meta"),
        "tokens that were not chosen": (put(**{tokens: lambda t: t[:, :2].contiguous()}), r"must be \(2, 3, 24\)"),
        "channels": (put(**{tokens: lambda t: t[..., :8].contiguous()}), r"must be \(2, 3, 24\)"),
        "dtype of the tokens": (put(**{tokens: Tensor.half}), "float16"),
        "strides of the tokens": (put(**{tokens: transposed_in_memory}), "not contiguous"),
        "strides of the stream": (put(**{stream: transposed_in_memory}), "not contiguous"),
        "device of the tokens": (put(**{tokens: on_meta}), "meta"),
    }


OF_GELU = {
    "float64": (
        lambda call: mapped(lambda _, tensor: tensor.double(), call),
        "float64 is none of",
    ),
    "u of three dimensions": (put(u=lambda u: u[None]), "not matrices"),
    "out of three dimensions": (put(out=lambda out: out[None]), "not matrices"),
    "no rows": (put(u=lambda u: u[:0], out=lambda out: out[:0]), "one or more of each"),
    "no features": (
        put(linear=lambda linear: type(linear)(*(each[:0] for each in linear)), out=lambda out: out[:, :0]),
        "one or more of each",
    ),
    "rows of out": (put(out=all_but_first), r"must be \(9, 72\)"),
    "weight of the other layout": (put(linear__weight=lambda weight: weight.T.contiguous()), r"must be \(72, 40\)"),
    "size of the bias": (put(linear__bias=all_but_first), r"must be \(72,\)"),
    "strides of u": (put(u=becomes(torch.zeros(9, 80)[:, ::2])), "not contiguous"),
    "strides of out": (put(out=becomes(torch.zeros(9, 144)[:, ::2])), "not contiguous"),
    "dtype of the weight": (put(linear__weight=Tensor.half), "float16"),
    "dtype of the bias": (put(linear__bias=Tensor.bfloat16), "bfloat16"),
    "dtype of out": (put(out=Tensor.half), "float16"),
    "device": (put(linear__weight=on_meta), "meta"),
}
OF_ATTENTION = {
    "float64": (put(qkv=Tensor.double, out=Tensor.double), "float64 is none of"),
    "no heads": (put(heads=becomes(0)), "0 heads"),
    "less than no heads": (put(heads=becomes(-3)), "-3 heads"),
    "heads that do not divide D": (put(heads=becomes(5)), "5 heads do not cut 96"),
    "more heads than channels": (put(heads=becomes(192)), "192 heads do not cut 96"),
    "wide heads": (
        put(qkv=becomes(torch.zeros(2, 5, 3 * 258)), out=becomes(torch.zeros(2, 5, 258))),
        "heads of 1 to 128; leave this to torch",
    ),
    "unpacked": (put(qkv=lambda qkv: qkv.view(2, 11, 3, 96)), r"must be \(2, 11, 288\)"),
    "only two of three": (put(qkv=lambda qkv: qkv[..., :192].contiguous()), r"must be \(2, 11, 288\)"),
    "rows of out": (put(out=first_of), r"must be \(1, 11, 288\)"),
    "no tokens": (put(qkv=lambda qkv: qkv[:, :0], out=lambda out: out[:, :0]), "one or more of each"),
    "strides of qkv": (put(qkv=transposed_in_memory), "not contiguous"),
    "strides of out": (put(out=transposed_in_memory), "not contiguous"),
    "dtype of qkv": (put(qkv=Tensor.half), "float16"),
    "dtype of out": (put(out=Tensor.bfloat16), "bfloat16"),
    "device": (put(qkv=on_meta), "meta"),
}
WIDE_HEADS = {name: becomes(torch.zeros(1, 1, 3, 129)) for name in ("q", "k", "v", "out")}
OF_WINDOWS = {
    "float64": (lambda call: mapped(lambda _, tensor: tensor.double(), call), "float64 is none of"),
    "no window": (put(window=becomes(0)), "a window of 0 tokens in heads of 24"),
    "less than none": (put(window=becomes(-1)), "a window of -1 tokens"),
    "wide heads": (put(**WIDE_HEADS), "of 129"),
    "three dimensions": (put(out=lambda out: out[0]), "must be .rows, heads, tokens, features."),
    "no tokens": (put(out=lambda out: out[:, :, :0]), "one or more of each"),
    "features of out": (put(out=transposed_in_memory), "side by side"),
    "shape of q": (put(q=first_of), r"must be \(2, 3, 21, 24\)"),
    "shape of k": (put(k=lambda k: k[:, :, :4]), r"must be \(2, 3, 21, 24\)"),
    "shape of v": (put(v=lambda v: v[..., :4]), r"must be \(2, 3, 21, 24\)"),
    "dtype of k": (put(k=Tensor.half), "float16 does not fit; .* float32"),
    "device of v": (put(v=on_meta), "meta"),
}
WRONG = (
    *((operation, OF_EMBEDS) for operation in (EMBED, EMBED_NORM)),
    (RESIDUAL, OF_RESIDUALS),
    (RESIDUAL_NORM, {name: (with_u_like_h(change), message) for name, (change, message) in OF_RESIDUALS.items()}),
    (RESIDUAL, {"nothing to add": (put(branches=becomes([]), gates=becomes([])), "no branch")}),
    (RESIDUAL_FLOAT8, OF_FLOAT8),
    (SUM, OF_SUMS),
    (PREDICT, OF_HEADS | {"channels of the output": (put(out=lambda out: out[:, 1:]), "latents of shape")}),
    (UPDATE, OF_UPDATES),
    (RUN, OF_RUNS),
    (GATHER, of_tokens("source", "out")),
    (SCATTER, of_tokens("target", "source")),
    (GELU, OF_GELU),
    (ATTENTION, OF_ATTENTION),
    (WINDOW, OF_WINDOWS),
)


@pytest.mark.parametrize(
    ("operation", "change", "message"),
    [
        pytest.param(
            operation,
            *wrong,
            id=f"{operation}-{name}",
            marks=(needs_float8,) if operation is RESIDUAL_FLOAT8 else (),
        )
        for operation, cases in WRONG
        for name, wrong in cases.items()
    ],
)
def test_bad_operands_are_refused_before_launch(
    operation: Operation, change: Callable[[Call], Call], message: str
) -> None:
    call = mapped(lambda _, tensor: in_place(tensor), change(operation.call()))
    before = bits(call)
    with pytest.raises(InputError, match=message):
        operation.kernel(**call)
    assert bits(call) == before


def bits(call: Call) -> list[bytes]:
    """Of every tensor that has some: a comparison of numbers would not know NaN again."""
    whole = (tensor.cpu().contiguous() for _, tensor in tensors(call) if not tensor.is_meta)
    return [tensor.view(torch.uint8).numpy().tobytes() for tensor in whole]
