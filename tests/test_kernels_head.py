"""The head in both of its forms: offsets that need 64 bits, slices of channels, guidance that changes nothing."""

import pytest
import torch
from accuracy import assert_accurate, huge_zeros, in_float64
from interpreter import only_program
from kernel_operations import check
from step_operands import PREDICT, STEPS, UPDATE, Sizes

from ebcache_fast.kernels import launch
from ebcache_fast.kernels.head import head_predict, head_update
from ebcache_fast.ops import reference
from ebcache_fast.ops.operands import StepIndex


def test_offsets_beyond_two_to_the_31() -> None:
    """The last tile of the last sample, of the stream, and of the last step's noise, that are zero but for it."""
    tokens, step = 2**14, STEPS - 1
    samples = 2**31 // (16 * tokens) + 1
    sizes = Sizes(samples=1, channels=4, patch=1, grid=(1, tokens), width=16, copies=1, guided=0)
    call = UPDATE.make(sizes, torch.float16) | dict(branches=[], gates=[])
    call["at"].step.fill_(step)
    h, x = huge_zeros(samples, tokens, 16), huge_zeros(samples, 4, 1, tokens, dtype=torch.float32)
    noise = huge_zeros(STEPS, samples, 4, 1, tokens, dtype=torch.float32)
    h[-1], x[-1], noise[step, -1] = call["h"][0], call["x"][0], call["update"].noise[step, 0]
    at = StepIndex(call["at"].step, call["at"].row_of.expand(samples).contiguous())
    with only_program(tokens // 16 - 1, samples - 1):
        head_update(**call | dict(x=x, h=h, at=at, update=call["update"]._replace(noise=noise)))
    own, exact = UPDATE.expected(call)["x"], UPDATE.expected(in_float64(call))["x"]
    assert_accurate(*(one[..., -16:] for one in (x[-1:].half(), own.half(), exact)))


def test_guidance_of_one_and_b_of_one_change_nothing() -> None:
    call = PREDICT.make(Sizes(guided=4), torch.float32)
    call["guide"].settings.fill_(1.0)
    raw = torch.empty_like(call["out"])
    head_predict(**call)
    reference.head(*(call[name] for name in ("h", "branches", "gates", "norm", "at", "linear")), raw)
    torch.testing.assert_close(call["out"][:2], raw[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(call["out"][2:, :4], raw[:2, :4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cols", [32, 64])
def test_the_channels_at_a_time_do_not_matter(cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slice of them and two, where our own table makes four."""
    monkeypatch.setattr(launch, "TABLE", {"head": {80: ((launch.ALL, launch.Launch(rows=16, cols=cols, warps=8)),)}})
    check(PREDICT, PREDICT.make(Sizes(width=131), torch.float32), torch.float32)
