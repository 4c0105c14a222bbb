"""Checkpoints that are refused: another model's, no weights at all, code, damage."""

import argparse
import contextlib
import copy
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import build, refusal, same, state_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from ebcache_fast.errors import InputError
from ebcache_fast.models.checkpoint import load_checkpoint, load_dit, save_weights

QKV = "blocks.0.attn.qkv.weight"


def refused(path: Path) -> str:
    """The message with which both loaders refuse a file; neither changes the model it was for."""
    model = build(seed=1)
    before = state_of(model)
    message = refusal(load_checkpoint, model, path)
    assert same(state_of(model), before)
    refusal(load_dit, path, num_heads=2)
    assert str(path) in message
    return message


SIZES: tuple[dict[str, Any], ...] = (
    dict(),
    dict(learn_sigma=False),
    dict(class_dropout_prob=0.0),
    dict(num_classes=1, in_channels=1, depth=1),
    dict(patch_size=4, input_size=12, hidden_size=12, num_heads=3),
    dict(mlp_ratio=1.5),
    dict(mlp_ratio=15.5 / 44, hidden_size=44),  # 15 rows, but 44 * (15 / 44) rounds down to 14
)


def test_another_size_names_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(build(hidden_size=16).state_dict(), path)
    model = build()
    before = state_of(model)
    message = refusal(load_checkpoint, model, path)
    assert "'pos_embed': expected shape (1, 4, 8), got shape (1, 4, 16)" in message
    assert same(state_of(model), before)


def test_another_depth(tmp_path: Path) -> None:
    shallow, deep = build(), build(depth=3)
    torch.save(shallow.state_dict(), tmp_path / "shallow.pt")
    torch.save(deep.state_dict(), tmp_path / "deep.pt")
    missing = refusal(load_checkpoint, deep, tmp_path / "shallow.pt")
    assert "'blocks.2.attn.qkv.weight': expected shape (24, 8), got no such key" in missing
    extra = refusal(load_checkpoint, shallow, tmp_path / "deep.pt")
    assert "'blocks.2.attn.qkv.weight': expected no such key, got shape (24, 8)" in extra


def test_positions_are_required(tmp_path: Path) -> None:
    weights = state_of(build())
    del weights["pos_embed"]
    torch.save(weights, tmp_path / "a.pt")
    assert "'pos_embed': expected shape (1, 4, 8), got no such key" in refused(tmp_path / "a.pt")


@pytest.mark.parametrize("name", sorted(build(depth=1).state_dict()))
def test_every_key_counts(tmp_path: Path, name: str) -> None:
    weights = build().state_dict()
    save_file({key: w for key, w in weights.items() if key != name}, tmp_path / "less.safetensors")
    assert f"'{name}': expected shape" in refusal(load_checkpoint, build(), tmp_path / "less.safetensors")
    save_file(weights | {name: torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    assert f"'{name}': expected shape" in refused(tmp_path / "other.safetensors")


def test_a_key_from_the_file_stays_on_one_line(tmp_path: Path) -> None:
    torch.save(build().state_dict() | {"a\nb" * 500: torch.zeros(1)}, tmp_path / "a.pt")
    assert r"a\nba\nb" in refused(tmp_path / "a.pt")


def nested() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


NO_WEIGHTS: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "number": lambda: 3,
    "text": lambda: "text",
    "list": lambda: [torch.zeros(24, 8)],
    "folder": lambda: {"weight": torch.zeros(24, 8)},
    "integers": lambda: torch.zeros(24, 8, dtype=torch.int64),
    "complex": lambda: torch.zeros(24, 8, dtype=torch.complex64),
    "booleans": lambda: torch.zeros(24, 8, dtype=torch.bool),
    "sparse": lambda: torch.zeros(24, 8).to_sparse(),
    "meta": lambda: torch.zeros(24, 8, device="meta"),
    "more shape than memory": lambda: torch.zeros(1).expand(24, 8),
    "empty": lambda: torch.zeros(24, 0),
    "nested": nested,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", NO_WEIGHTS)
@pytest.mark.parametrize("wrapper", [None, "ema"])
def test_values_that_are_no_weights(tmp_path: Path, wrapper: str | None, kind: str) -> None:
    weights = build().state_dict() | {QKV: NO_WEIGHTS[kind]()}
    torch.save(weights if wrapper is None else {wrapper: weights}, tmp_path / "a.pt")
    assert f"'{QKV}': expected dense floating weights, got a " in refused(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content", [None, 7, [1, 2], torch.zeros(3), {}, {"ema": {}}, {"ema": None}, {"epoch": 3}, {1: torch.zeros(1)}]
)
def test_contents_that_are_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"garbage " * 99, b"\x80\x02}.", b"\xff" * 64, b"{}"])
def test_foreign_bytes(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content)
    refused(tmp_path / f"a{suffix}")


def test_the_other_formats_bytes(tmp_path: Path) -> None:
    save_weights(build(), tmp_path / "a.safetensors")
    torch.save(build().state_dict(), tmp_path / "b.pt")
    (tmp_path / "a.safetensors").rename(tmp_path / "a.pt")
    (tmp_path / "b.pt").rename(tmp_path / "b.safetensors")
    assert "can't be read" in refused(tmp_path / "a.pt")
    assert "can't be read" in refused(tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["a.bin", "a", "a.ckpt", "a.pt.zip"])
def test_wrong_suffix(tmp_path: Path, name: str) -> None:
    torch.save(build().state_dict(), tmp_path / name)
    assert "expected the suffix .pt or .pth or .safetensors" in refused(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_missing_file_and_folder(tmp_path: Path, suffix: str) -> None:
    assert "No such file" in refused(tmp_path / f"missing{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    assert "can't be read" in refused(tmp_path / f"folder{suffix}")


def test_the_reason_is_the_files_own(tmp_path: Path) -> None:
    """Whatever else is being handled while a file is refused."""
    try:
        raise KeyError("something else")
    except KeyError:
        assert "No such file" in refused(tmp_path / "missing.pt")


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


class MaliciousNamespace(Malicious):
    """Hides the call in the state of the one class that is let through."""

    def __reduce__(self) -> tuple[Any, ...]:
        return argparse.Namespace, (), {"x": Malicious(Path(self.folder))}


@pytest.mark.parametrize("attack", [Malicious, MaliciousNamespace])
@pytest.mark.parametrize("wrapper", [None, "ema", "args"])
@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
def test_no_code_is_run(
    tmp_path: Path, attack: type[Malicious], wrapper: str | None, form: str, recwarn: pytest.WarningsRecorder
) -> None:
    trap, path = tmp_path / "trap", tmp_path / "a.pt"
    evil = attack(trap)
    content = evil if wrapper is None else dict(build().state_dict()) | {wrapper: evil}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert "can't be read" in refused(path)
    assert not trap.exists()
    assert [warning for warning in recwarn if "pickle" in str(warning.message)] == []
    pickle.loads(pickle.dumps(evil))  # the trap works
    assert trap.exists()


def test_the_reason_names_what_was_not_let_in(tmp_path: Path) -> None:
    torch.save({"ema": Malicious(tmp_path / "trap")}, tmp_path / "a.pt")
    assert "mkdir" in refused(tmp_path / "a.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of one good file of each form."""
    folder, model = tmp_path_factory.mktemp("files"), build(depth=1)
    torch.save({"ema": model.state_dict()}, folder / "zip.pt")
    torch.save(model.state_dict(), folder / "old.pt", _use_new_zipfile_serialization=False)
    save_weights(model, folder / "a.safetensors")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def load_bytes(folder: Path, name: str, content: bytes) -> None:
    """Load a file into a model, and check that it is InputError, with the model unchanged, or success."""
    path = folder / name
    path.write_bytes(content)
    model = build(seed=1, depth=1)
    before = state_of(model)
    try:
        load_checkpoint(model, path)
    except InputError:
        assert same(state_of(model), before)
    else:
        assert not same(state_of(model), before)
    with contextlib.suppress(InputError):
        load_dit(path, num_heads=2)


names = st.sampled_from(["zip.pt", "old.pt", "a.safetensors"])


@settings(max_examples=25)
@given(name=names, part=st.floats(0, 1, exclude_max=True))
@example(name="zip.pt", part=0.999)
def test_truncated_files(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, name: str, part: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / name
    path.write_bytes(files[name][: int(len(files[name]) * part)])
    refused(path)


@settings(max_examples=50)
@given(
    name=names,
    changes=st.lists(st.tuples(st.integers(0, 3000), st.booleans(), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_mutated_files(
    files: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    changes: list[tuple[int, bool, int]],
) -> None:
    """Bytes changed near either end, where headers and directories are."""
    content = bytearray(files[name])
    for offset, from_end, value in changes:
        content[-1 - offset if from_end else offset] = value
    load_bytes(tmp_path_factory.getbasetemp(), name, bytes(content))


def test_a_refused_model_is_usable(tmp_path: Path) -> None:
    """After any number of refusals the right file still loads."""
    model, source = build(seed=1), build()
    twin = copy.deepcopy(model)
    for changes in SIZES[1:5]:
        torch.save(build(**changes).state_dict(), tmp_path / "wrong.pt")
        refusal(load_checkpoint, model, tmp_path / "wrong.pt")
    assert same(state_of(model), state_of(twin))
    torch.save(source.state_dict(), tmp_path / "right.pt")
    load_checkpoint(model, tmp_path / "right.pt")
    assert same(state_of(model), state_of(source))
