"""The head in both of its forms against the references, under the rule of accuracy."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from accuracy import DTYPES, Guarded, assert_accurate, huge_zeros
from depth import crossed
from interpreter import only_program
from step_operands import NORMS, RAGGED, SIZES, STEPS, Sizes, StepOperands, advancing, assert_advanced
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import launch
from ebcache_fast.kernels.head import head_predict, head_update
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import StepIndex

EVERY_SIZE_AND_DTYPE = crossed("sizes, dtype", SIZES, DTYPES)


def predict_with_reference(case: StepOperands) -> Tensor:
    s = case.sizes
    out = case.x.new_empty(s.rows, s.out_channels, *s.image)
    reference.head_predict(case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, out)
    return out


def run_update(update: Callable[..., None], case: StepOperands) -> None:
    update(case.x, case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, case.update)


def update_with_reference(case: StepOperands) -> Tensor:
    done = case.clone()
    run_update(reference.head_update, done)
    return done.written


@pytest.mark.parametrize("sizes", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_what_lies_beside_the_operands_counts_for_nothing(
    sizes: Sizes, norm: Callable[[StepOperands], StepOperands]
) -> None:
    case = norm(StepOperands.of(sizes, torch.float32))
    exact, alone = case.exact(), case.amid_nan()
    out = Guarded((sizes.rows, sizes.out_channels, *sizes.image), torch.float32)
    head_predict(alone.h, alone.branches, alone.gates, alone.norm, alone.at, alone.linear, alone.guide, out.tensor)
    assert_accurate(out.written(), predict_with_reference(case), predict_with_reference(exact))
    run_update(head_update, alone)
    assert_accurate(alone.written, update_with_reference(case), update_with_reference(exact))


@EVERY_SIZE_AND_DTYPE
def test_predict(sizes: Sizes, dtype: torch.dtype) -> None:
    case = StepOperands.of(sizes, dtype)
    out = Guarded((sizes.rows, sizes.out_channels, *sizes.image), torch.float32)
    head_predict(case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, out.tensor)
    own, exact = predict_with_reference(case), predict_with_reference(case.exact())
    assert_accurate(out.written().to(dtype), own.to(dtype), exact)


@EVERY_SIZE_AND_DTYPE
def test_update(sizes: Sizes, dtype: torch.dtype) -> None:
    case = StepOperands.of(sizes, dtype)
    own, exact = update_with_reference(case), update_with_reference(case.exact())
    x = Guarded(case.x.shape, torch.float32, case.x)
    run_update(head_update, dataclasses.replace(case, x=x.tensor))
    written = dataclasses.replace(case, x=x.written()).written
    assert_accurate(written.to(dtype), own.to(dtype), exact)


def test_nothing_beside_the_memory_is_written() -> None:
    case = StepOperands.of(SIZES["memory"], torch.float32)
    exact = update_with_reference(case.exact())[len(case.x) :]
    own = update_with_reference(case)[len(case.x) :]
    previous = Guarded(case.x.shape, torch.float32, case.update.previous)
    run_update(head_update, dataclasses.replace(case, update=case.update._replace(previous=previous.tensor)))
    assert_accurate(previous.written(), own, exact)


@pytest.mark.parametrize("branches", [0, 1])
def test_fewer_branches(branches: int) -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32, branches)
    x, out = case.x.clone(), case.x.new_empty(4, 8, *case.sizes.image)
    head_update(x, case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, case.update)
    head_predict(case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, out)
    assert_accurate(x, update_with_reference(case), update_with_reference(case.exact()))
    assert_accurate(out, predict_with_reference(case), predict_with_reference(case.exact()))


def test_offsets_beyond_two_to_the_31() -> None:
    """The last tile of the last sample, of the stream, and of the last step's noise, that are zero but for it."""
    tokens, step = 2**14, STEPS - 1
    samples = 2**31 // (16 * tokens) + 1
    sizes = Sizes(samples=1, channels=4, patch=1, grid=(1, tokens), width=16, copies=1, guided=0)
    case = StepOperands.of(sizes, torch.float16, branches=0)
    case.at.step.fill_(step)
    h, x = huge_zeros(samples, tokens, 16), huge_zeros(samples, 4, 1, tokens, dtype=torch.float32)
    noise = huge_zeros(STEPS, samples, 4, 1, tokens, dtype=torch.float32)
    h[-1], x[-1], noise[step, -1] = case.h[0], case.x[0], case.update.noise[step, 0]
    at = StepIndex(case.at.step, case.at.row_of.expand(samples).contiguous())
    with only_program(tokens // 16 - 1, samples - 1):
        head_update(x, h, (), (), case.norm, at, case.linear, case.guide, case.update._replace(noise=noise))
    own, exact = update_with_reference(case), update_with_reference(case.exact())
    assert_accurate(*(one[..., -16:] for one in (x[-1:].half(), own.half(), exact)))


def test_what_is_read_stays_as_it_was() -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    read = [case.h, *case.branches, *case.gates, *case.norm[:2], *case.at[:2], *case.linear, case.guide.settings]
    read += [case.update.coefficients, case.update.noise]
    before = [operand.clone() for operand in read]
    head_update(case.x, case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, case.update)
    assert all(map(torch.equal, read, before))


def test_each_step_reads_its_own_rows() -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    at = StepIndex(case.at.step + 1, case.at.row_of)
    x, own = case.x.clone(), case.x.clone()
    for function, latents in ((head_update, x), (reference.head_update, own)):
        function(latents, case.h, case.branches, case.gates, case.norm, at, case.linear, case.guide, case.update)
    torch.testing.assert_close(x, own, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(x, update_with_reference(case))  # the step before it


@pytest.mark.parametrize("function", [head_update, reference.head_update])
def test_the_step_advances(function: Callable[..., None]) -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    at = advancing(case.at)
    function(case.x, case.h, case.branches, case.gates, case.norm, at, case.linear, case.guide, case.update)
    assert_advanced(at)


@pytest.mark.parametrize("function", [head_predict, reference.head_predict])
def test_the_step_advances_with_a_prediction(function: Callable[..., None]) -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    at = advancing(case.at)
    out = case.x.new_empty(4, 8, *case.sizes.image)
    function(case.h, case.branches, case.gates, case.norm, at, case.linear, case.guide, out)
    assert_advanced(at)


def test_guidance_of_one_and_b_of_one_change_nothing() -> None:
    case = StepOperands.of(Sizes(guided=4), torch.float32)
    case.guide.settings.fill_(1.0)
    out = case.x.new_empty(4, 8, *case.sizes.image)
    raw = torch.empty_like(out)
    head_predict(case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, out)
    reference.head(case.h, case.branches, case.gates, case.norm, case.at, case.linear, raw)
    torch.testing.assert_close(out[:2], raw[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[2:, :4], raw[:2, :4], rtol=1e-4, atol=1e-4)


def test_the_epsilon_counts() -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32, branches=0)
    case.h.mul_(1e-3)
    small = case.norm._replace(eps=1e-4)
    out = case.x.new_empty(4, 8, *case.sizes.image)
    own = torch.empty_like(out)
    for function, tensor in ((head_predict, out), (reference.head_predict, own)):
        function(case.h, [], [], small, case.at, case.linear, case.guide, tensor)
    torch.testing.assert_close(out, own, rtol=1e-4, atol=1e-4)


def test_a_large_mean_costs_no_digits() -> None:
    case = StepOperands.of(SIZES["DiT-XL/2"], torch.float32, branches=0)
    case.h.add_(1e3)
    out = case.x.new_empty(2, 8, *case.sizes.image)
    head_predict(case.h, [], [], case.norm, case.at, case.linear, case.guide, out)
    assert_accurate(out, predict_with_reference(case), predict_with_reference(case.exact()))


def test_a_constant_stream_is_not_divided_by_zero() -> None:
    """Nor do its means reach float16's end in the channels that only fill a tile up."""
    case = StepOperands.of(SIZES["plain"], torch.float16, branches=0)
    case.h.fill_(100.0)
    out = case.x.new_empty(4, 8, *case.sizes.image)
    head_predict(case.h, [], [], case.norm, case.at, case.linear, case.guide, out)
    assert_accurate(out.half(), predict_with_reference(case).half(), predict_with_reference(case.exact()))


@pytest.mark.parametrize("cols", [32, 64])
def test_the_channels_at_a_time_do_not_matter(cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slice of them and two, where our own table makes four."""
    monkeypatch.setattr(launch, "TABLE", {"head": {80: ((launch.ALL, launch.Launch(rows=16, cols=cols, warps=8)),)}})
    case = StepOperands.of(Sizes(width=131), torch.float32)
    out = case.x.new_empty(4, 8, *case.sizes.image)
    head_predict(case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, out)
    assert_accurate(out, predict_with_reference(case), predict_with_reference(case.exact()))


WRONG = {
    "float64 latents": (lambda c: dict(x=c.x.double()), "latents of shape"),
    "strides of x": (lambda c: dict(x=c.x.mT.contiguous().mT), "latents of shape"),
    "x of another batch": (lambda c: dict(x=c.x[:1]), "latents of shape"),
    "three branches": (lambda c: dict(branches=[c.h] * 3, gates=[c.gates[0]] * 3), "at most 2"),
    "features of no patch": (lambda c: dict(linear=c.linear._replace(weight=c.linear.weight[1:])), "features a token"),
    "a bias of another size": (lambda c: dict(linear=c.linear._replace(bias=c.linear.bias[1:])), "must be"),
    "three copies": (lambda c: dict(guide=c.guide._replace(copies=3)), "1, or 2 under guidance"),
    "guided channels": (lambda c: dict(guide=c.guide._replace(channels=5)), r"outside \[0, 4\]"),
    "settings": (lambda c: dict(guide=c.guide._replace(settings=c.guide.settings.double())), "scale and b"),
    "coefficients": (lambda c: dict(update=c.update._replace(coefficients=c.update.coefficients[:, :5])), r"\(S, 6\)"),
    "strides of the coefficients": (
        lambda c: dict(update=c.update._replace(coefficients=c.update.coefficients.T.contiguous().T)),
        "not contiguous",
    ),
    "coefficients without those of the memory": (
        lambda c: dict(update=c.update._replace(previous=c.x.clone())),
        r"\(S, 9\)",
    ),
    "a memory of another batch": (
        lambda c: dict(update=c.update._replace(coefficients=c.x.new_ones(STEPS, 9), previous=c.x[:1].clone())),
        "latents of shape",
    ),
    "noise of fewer steps": (lambda c: dict(update=c.update._replace(noise=c.update.noise[1:])), "latents of shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_operands_are_refused_before_launch(name: str) -> None:
    change, message = WRONG[name]
    case = StepOperands.of(SIZES["plain"], torch.float32)
    names = ("x", "h", "branches", "gates", "norm", "at", "linear", "guide", "update")
    operands = {name: getattr(case, name) for name in names} | change(case)
    before = operands["x"].clone()
    with pytest.raises(InputError, match=message):
        head_update(**operands)
    assert torch.equal(operands["x"], before)


def test_an_output_of_another_shape_is_refused() -> None:
    case = StepOperands.of(SIZES["plain"], torch.float32)
    out = torch.empty(4, 7, *case.sizes.image)
    with pytest.raises(InputError, match="latents of shape"):
        head_predict(case.h, case.branches, case.gates, case.norm, case.at, case.linear, case.guide, out.to(case.h))
