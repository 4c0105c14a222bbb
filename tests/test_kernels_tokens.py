"""Gathering and scattering of tokens: whatever bits they are, wherever they lie."""

import pytest
import torch
from accuracy import DEVICE, Guarded, draw, huge_zeros
from interpreter import only_program
from stream_operands import choice
from torch import Tensor

from ebcache_fast.kernels import launch
from ebcache_fast.kernels.tokens import gather_tokens, scatter_tokens


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("rows", [2, 5])
def test_many_programs_of_several_tokens(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that end within a row, and the last one beyond all of them."""
    monkeypatch.setattr(launch, "TABLE", {"tokens": {80: ((launch.ALL, launch.Launch(4, 0, 4)),)}})
    source, chosen = draw(rows, 13, 24, dtype=torch.float32, seed=4), choice(rows, 13, 5)
    out, back = Guarded((rows, 5, 24), torch.float32), Guarded(source.shape, torch.float32, torch.zeros(()))
    gather_tokens(source, chosen, out.tensor)
    scatter_tokens(out.written(), chosen, back.tensor)
    kept = torch.zeros(rows, 13, 1, dtype=torch.bool, device=DEVICE).scatter_(1, chosen.long().unsqueeze(2), True)
    assert torch.equal(back.written(), source * kept)


def test_every_bit_is_kept() -> None:
    """Of NaN with a payload, negative zeros, infinities and the smallest numbers."""
    patterns = torch.tensor([0x7FC01234, -0x003FFFFF, -(2**31), 0x7F800000, 1, -0x00800000], dtype=torch.int32)
    source = patterns.to(DEVICE).view(torch.float32).reshape(1, 6, 1)
    chosen = choice(1, 6, 4)
    out, target = torch.empty(1, 4, 1, device=DEVICE), torch.zeros(1, 6, 1, device=DEVICE)
    gather_tokens(source, chosen, out)
    scatter_tokens(out, chosen, target)
    where = chosen[0].long()
    assert torch.equal(bits(out), bits(source[:, where].contiguous()))
    assert torch.equal(bits(target[:, where].contiguous()), bits(out))


def test_offsets_beyond_two_to_the_31() -> None:
    """A batch row's first token, and a chosen token, may lie that far."""
    width = 16
    tokens = 2**31 // width + 16
    stream = huge_zeros(2, tokens, width)
    stream[1, -1] = draw(width, dtype=torch.float16, seed=5)
    chosen = torch.tensor([[0, 1], [2, tokens - 1]], dtype=torch.int32, device=DEVICE)
    out, other = huge_zeros(2, 2, width), huge_zeros(2, tokens, width)
    with only_program(3):
        gather_tokens(stream, chosen, out)
        scatter_tokens(stream[:, -2:].contiguous(), chosen, other)
    assert torch.equal(out[1, 1], stream[1, -1])
    assert torch.equal(other[1, -1], stream[1, -1])


def test_more_chosen_tokens_than_32_bits_count_elements_of() -> None:
    width = 16
    k = 2**31 // width + 1
    tokens, chosen = huge_zeros(1, k, width), torch.zeros(1, k, dtype=torch.int32, device=DEVICE)
    stream = huge_zeros(1, k, width)
    chosen[0, -1] = 5
    tokens[0, -1] = draw(width, dtype=torch.float16, seed=6)
    last = launch.parameters("tokens", k, DEVICE).rows
    with only_program((k - 1) // last):
        scatter_tokens(tokens, chosen, stream)
    assert torch.equal(stream[0, 5], tokens[0, -1])
