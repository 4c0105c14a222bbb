"""Checkpoints: what loads, into what, and that no wrong file runs code, changes a model or is left half-written."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import StateDict, build, refusal, same, state_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ebcache_fast.errors import InputError
from ebcache_fast.models import checkpoint
from ebcache_fast.models.checkpoint import load_checkpoint, load_dit, save_weights
from ebcache_fast.models.modules import DiT

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
