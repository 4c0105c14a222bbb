"""What training wraps around weights is taken off, and a model opened in the dtype that they are in."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from constants import CPU
from safetensors.torch import save_file
from tiny import CLASSES, tiny_dit
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.models import DiT, load_checkpoint
from ebcache_fast.models.checkpoint import open_checkpoint

PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "ema.")
Weights = dict[str, Tensor]


def weights(seed: int = 4) -> Weights:
    return tiny_dit(seed, torch.float32).state_dict()


def named(prefix: str, of: Weights) -> Weights:
    return {f"{prefix}{name}": weight for name, weight in of.items()}


def loaded(path: Path) -> Weights:
    model = tiny_dit(5, torch.float32)
    load_checkpoint(model, path)
    return model.state_dict()


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_training_puts_before_every_name(prefix: str, suffix: str, tmp_path: Path) -> None:
    """DistributedDataParallel, torch.compile, both in either order, and modules that hold the model."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        save_file(named(prefix, weights()), path)
    else:
        torch.save({"ema": named(prefix, weights()), "epoch": 3}, path)
    assert same(loaded(path), weights())


def test_the_average_is_taken_where_both_are_there(tmp_path: Path) -> None:
    both = named("model.", weights(6)) | named("ema.", weights())
    wrapped = {"state_dict": {"model": named("module.", weights())}}
    for content in (both, {"state_dict": both}, wrapped, {"model": weights(6), "ema": weights()}):
        torch.save(content, tmp_path / "a.pt")
        assert same(loaded(tmp_path / "a.pt"), weights())


def test_a_prefix_that_not_every_name_has_is_part_of_the_name(tmp_path: Path) -> None:
    mixed = weights()
    mixed["module.pos_embed"] = mixed.pop("pos_embed")
    torch.save(mixed, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"'pos_embed': expected shape .*, got no such key"):
        loaded(tmp_path / "a.pt")


def test_a_file_that_holds_itself_comes_to_an_end(tmp_path: Path) -> None:
    within: dict[str, Any] = {}
    within["ema"] = within
    torch.save(within, tmp_path / "a.pt")
    with pytest.raises(InputError, match="expected dense floating weights, got a dict"):
        loaded(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float8_e4m3fn, torch.float32),  # in which no model computes
    ],
)
def test_a_model_is_opened_in_the_dtype_of_most_weights(
    stored: torch.dtype, expected: torch.dtype, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    kept = {name: w if name == "pos_embed" else w.to(stored) for name, w in weights().items()}
    torch.save(kept, path)

    make = partial(DiT, 8, 4, hidden_size=16, depth=2, num_heads=2, num_classes=CLASSES)  # the sizes of tiny_dit
    model = open_checkpoint(make, path, CPU)
    assert not model.training
    assert same(model.state_dict(), {name: w.to(expected) for name, w in kept.items()})
    assert {p.dtype for p in open_checkpoint(make, path, CPU, torch.float32).parameters()} == {torch.float32}
