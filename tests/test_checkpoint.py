"""Checkpoints: what loads, into what, and that no wrong file runs code, changes a model or is left half-written."""

import argparse
import contextlib
import copy
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models import checkpoint
from ebcache_fast.models.checkpoint import load_checkpoint, load_dit, save_weights
from ebcache_fast.models.modules import DiT

StateDict = dict[str, Tensor]
QKV = "blocks.0.attn.qkv.weight"


def build(seed: int = 0, **changes: Any) -> DiT:
    """A tiny DiT with random values everywhere."""
    sizes: dict[str, Any] = dict(input_size=4, in_channels=3, hidden_size=8, depth=2, num_heads=2, num_classes=5)
    model = DiT(**sizes | changes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def state_of(model: nn.Module) -> StateDict:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def same(a: StateDict, b: StateDict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(call: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """The message of the InputError that the call raises: one line, with a remedy."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert re.search(r"; (pass|rename|choose|correct|use) ", message)
    return message


def refused(path: Path) -> str:
    """The message with which both loaders refuse a file; neither changes the model it was for."""
    model = build(seed=1)
    before = state_of(model)
    message = refusal(load_checkpoint, model, path)
    assert same(state_of(model), before)
    refusal(load_dit, path, num_heads=2)
    assert str(path) in message
    return message


# --- What loads


@pytest.mark.parametrize("wrapper", [None, "ema", "model", "state_dict"])
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_files(tmp_path: Path, wrapper: str | None, suffix: str) -> None:
    source, model = build(), build(seed=1)
    path = tmp_path / f"weights{suffix}"
    torch.save(source.state_dict() if wrapper is None else {wrapper: source.state_dict(), "epoch": 3}, path)
    load_checkpoint(model, path)
    assert same(state_of(model), state_of(source))


def test_a_training_scripts_file(tmp_path: Path) -> None:
    """The original's holds the averaged weights beside the last ones, the optimizer and its arguments."""
    ema, last, model = build(), build(seed=1), build(seed=2)
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    content = {
        "model": last.state_dict(),
        "ema": ema.state_dict(),
        "opt": {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]},
        "args": argparse.Namespace(model="DiT-XL/2", results_dir=None, epochs=1400),
    }
    path = tmp_path / "0400000.pt"
    torch.save(content, path)
    load_checkpoint(model, str(path))
    assert same(state_of(model), state_of(ema))


def test_torch_files_from_before_zip(tmp_path: Path) -> None:
    source, model = build(), build(seed=1)
    path = tmp_path / "old.pt"
    torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False)
    load_checkpoint(model, path)
    assert same(state_of(model), state_of(source))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_become_the_models_dtype(tmp_path: Path, suffix: str, stored: torch.dtype, wanted: torch.dtype) -> None:
    weights = {name: weight.to(stored) for name, weight in build().state_dict().items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(weights, path) if suffix == ".pt" else save_file(weights, path)
    model = build(seed=1).to(wanted)
    load_checkpoint(model, path)
    assert same(state_of(model), {name: weight.to(wanted) for name, weight in weights.items()})


def test_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    """What holds the model's parameters, such as an optimizer, still does; pos_embed is still not trained."""
    model = build(seed=1)
    parameters = list(model.parameters())
    torch.save(build().state_dict(), tmp_path / "a.pt")
    load_checkpoint(model, tmp_path / "a.pt")
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_loaded_model_does_not_hang_on_its_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    source = build()
    torch.save(source.state_dict(), path) if suffix == ".pt" else save_weights(source, path)
    first, second = build(seed=1), load_dit(path, num_heads=2)
    load_checkpoint(first, path)
    path.write_bytes(bytes(path.stat().st_size))  # the same file, overwritten in place
    assert same(state_of(first), state_of(source))
    assert same(state_of(second), state_of(source))


# --- Saving


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype | None) -> None:
    source, path = build(), tmp_path / "a.safetensors"
    save_weights(source, path, dtype)
    stored = load_file(path)
    assert {weight.dtype for weight in stored.values()} == {dtype or torch.float32}
    assert same(stored, {name: weight.to(dtype) for name, weight in state_of(source).items()})
    model = load_dit(path)
    assert same(state_of(model), {name: weight.float() for name, weight in stored.items()})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = build()
    before = state_of(model)
    save_weights(model, tmp_path / "a.safetensors", torch.float16)
    assert same(state_of(model), before)


def test_metadata(tmp_path: Path) -> None:
    save_weights(build(), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "num_heads": "2", "num_classes": "5"}


def test_parameters_that_share_memory_or_are_transposed_are_saved(tmp_path: Path) -> None:
    source = build()
    source.blocks[1].attn.proj.weight = source.blocks[0].attn.proj.weight
    source.t_embedder.mlp[2].weight = nn.Parameter(source.t_embedder.mlp[2].weight.t())
    save_weights(source, tmp_path / "a.safetensors")
    assert same(state_of(load_dit(tmp_path / "a.safetensors")), state_of(source))


@pytest.mark.parametrize("name", ["a.pt", "a", "a.safetensors.bin"])
def test_saving_under_another_suffix(tmp_path: Path, name: str) -> None:
    assert "expected the suffix .safetensors" in refusal(save_weights, build(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_saving_as_integers(tmp_path: Path) -> None:
    assert "torch.int8" in refusal(save_weights, build(), tmp_path / "a.safetensors", torch.int8)
    assert list(tmp_path.iterdir()) == []


def test_saving_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").touch()
    for path in ("folder.safetensors", "missing/a.safetensors", "file/a.safetensors"):
        assert "can't be written" in refusal(save_weights, build(), tmp_path / path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.safetensors"]


def test_a_failing_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(build(), path)
    before = path.read_bytes()

    def full_disk(weights: StateDict, partial: Path, metadata: dict[str, str]) -> None:
        partial.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    assert "No space left" in refusal(save_weights, build(seed=1), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


# --- A model from its checkpoint


SIZES: tuple[dict[str, Any], ...] = (
    dict(),
    dict(learn_sigma=False),
    dict(class_dropout_prob=0.0),
    dict(num_classes=1, in_channels=1, depth=1),
    dict(patch_size=4, input_size=12, hidden_size=12, num_heads=3),
    dict(mlp_ratio=1.5),
    dict(mlp_ratio=15.5 / 44, hidden_size=44),  # 15 rows, but 44 * (15 / 44) rounds down to 14
)


def outputs(model: DiT) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    side = model.patch_size * int(model.pos_embed.shape[1] ** 0.5)
    x = torch.randn(2, model.in_channels, side, side, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([3, 700]), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("changes", SIZES)
def test_model_from_a_saved_file(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = build(**changes).eval()
    save_weights(source, tmp_path / "a.safetensors")
    model = load_dit(tmp_path / "a.safetensors")
    assert same(state_of(model), state_of(source))
    assert torch.equal(outputs(model), outputs(source))
    for name in ("num_heads", "patch_size", "in_channels", "out_channels", "learn_sigma", "training"):
        assert getattr(model, name) == getattr(source, name)
    assert model.y_embedder.num_classes == source.y_embedder.num_classes
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    trained = [name for name, p in source.named_parameters() if p.requires_grad]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


def test_model_from_the_originals_file(tmp_path: Path) -> None:
    source = build(num_heads=4).eval()
    torch.save({"ema": source.state_dict()}, tmp_path / "a.pt")
    model = load_dit(tmp_path / "a.pt", num_heads=4)
    assert torch.equal(outputs(model), outputs(source))
    assert model.y_embedder.num_classes == 5
    assert "pass num_heads=" in refusal(load_dit, tmp_path / "a.pt")


def test_a_loaded_models_dtype_and_random_state(tmp_path: Path) -> None:
    save_weights(build(), tmp_path / "a.safetensors", torch.float16)
    state = torch.get_rng_state()
    assert {p.dtype for p in load_dit(tmp_path / "a.safetensors").parameters()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_heads", [3, 0, -2])
def test_heads_that_do_not_fit(tmp_path: Path, num_heads: int) -> None:
    torch.save(build().state_dict(), tmp_path / "a.pt")
    assert f"{num_heads}" in refusal(load_dit, tmp_path / "a.pt", num_heads=num_heads)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", "many"),
        ("num_heads", "3"),
        ("num_heads", "9" * 5000),
        ("num_classes", "7"),
        ("num_classes", "4"),
        ("num_classes", "-1\n"),
        ("num_classes", "9" * 400),
    ],
)
def test_wrong_metadata(tmp_path: Path, name: str, value: str) -> None:
    metadata = {"num_heads": "2", "num_classes": "5"} | {name: value}
    save_file(build().state_dict(), tmp_path / "a.safetensors", metadata)
    with pytest.raises(InputError) as caught:
        load_dit(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# --- Another model's weights


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


# --- Files that are no weights at all


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


# --- Pickles that would run code


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


# --- Damage


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
