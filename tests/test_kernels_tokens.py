"""Gathering and scattering of tokens against the references: they move bits, so that results are equal."""

from collections.abc import Callable

import pytest
import torch
from accuracy import DEVICE, DTYPES, Guarded, draw, huge_zeros, in_place
from interpreter import only_program
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.kernels import launch
from ebcache_fast.kernels.tokens import gather_tokens, scatter_tokens
from ebcache_fast.ops import reference

SHAPES = [  # (R, T, k, D)
    (1, 1, 1, 1),
    (2, 7, 3, 5),
    (3, 16, 16, 96),
    (4, 11, 1, 131),
    (2, 17, 9, 1152),
]


def choice(rows: int, tokens: int, k: int, seed: int = 0) -> Tensor:
    """Distinct indices (R, k) int32 in an order of their own, which no kernel may rely on."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, tokens, generator=generator).argsort(dim=1)[:, :k].int().contiguous().to(DEVICE)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, tokens, k, width = shape
    source, chosen = draw(rows, tokens, width, dtype=dtype, seed=1), choice(rows, tokens, k)
    before = source.clone()
    out = Guarded((rows, k, width), dtype)
    gather_tokens(source, chosen, out.tensor)
    expected = torch.empty(rows, k, width, dtype=dtype, device=DEVICE)
    reference.gather_tokens(source, chosen, expected)
    assert torch.equal(out.written(), expected)
    assert torch.equal(source, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, tokens, k, width = shape
    source, chosen = draw(rows, k, width, dtype=dtype, seed=2), choice(rows, tokens, k)
    before = source.clone()
    expected = draw(rows, tokens, width, dtype=dtype, seed=3)
    target = Guarded(expected.shape, dtype, expected)
    scatter_tokens(source, chosen, target.tensor)
    reference.scatter_tokens(source, chosen, expected)
    assert torch.equal(target.written(), expected)
    assert torch.equal(source, before)


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


Operands = tuple[Tensor, Tensor, Tensor]  # the stream, the choice, the tokens
WRONG: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Operands], str]] = {
    "float64": (lambda s, c, t: (s.double(), c, t.double()), "float64 is none of"),
    "a matrix": (lambda s, c, t: (s[0], c, t), "not .rows, tokens, channels."),
    "no token chosen": (lambda s, c, t: (s, c[:, :0], t[:, :0]), r"1 to 5"),
    "more than there are": (lambda s, c, t: (s, torch.zeros(2, 6, dtype=torch.int32), torch.zeros(2, 6, 24)), "1 to 5"),
    "indices in int64": (lambda s, c, t: (s, c.long(), t), "int64"),
    "indices of fewer rows": (lambda s, c, t: (s, c[:1], t), r"\(1, 3\)"),
    "indices without rows": (lambda s, c, t: (s, c[0], t), r"must be \(2, 1 to 5\)"),
    "strides of the indices": (lambda s, c, t: (s, c.T.contiguous().T, t), "contiguous"),
    "device of the indices": (lambda s, c, t: (s, c.to("meta"), t), "meta"),
    "tokens that were not chosen": (lambda s, c, t: (s, c, t[:, :2].contiguous()), r"must be \(2, 3, 24\)"),
    "channels": (lambda s, c, t: (s, c, t[..., :8].contiguous()), r"must be \(2, 3, 24\)"),
    "dtype of the tokens": (lambda s, c, t: (s, c, t.half()), "float16"),
    "strides of the tokens": (lambda s, c, t: (s, c, t.mT.contiguous().mT), "not contiguous"),
    "strides of the stream": (lambda s, c, t: (s.mT.contiguous().mT, c, t), "not contiguous"),
    "device of the tokens": (lambda s, c, t: (s, c, t.to("meta")), "meta"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("function", [gather_tokens, scatter_tokens])
def test_bad_operands_are_refused_before_launch(function: Callable[..., None], name: str) -> None:
    change, message = WRONG[name]
    whole = torch.full((2, 5, 24), 5.0), torch.zeros(2, 3, dtype=torch.int32), torch.full((2, 3, 24), 5.0)
    stream, chosen, tokens = map(in_place, change(*whole))
    first, last = (stream, tokens) if function is gather_tokens else (tokens, stream)
    before = last.clone()
    with pytest.raises(InputError, match=message):
        function(first, chosen, last)
    assert last.is_meta or torch.equal(last, before)
