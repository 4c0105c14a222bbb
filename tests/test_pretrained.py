"""Folders that diffusers' save_pretrained wrote: of pipelines and transformers, enabled again, and damaged ones."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_tiny import tiny_cogvideox, tiny_pipeline, tiny_pixart, tiny_transformer
from torch import nn

from ebcache_fast import disable, enable
from ebcache_fast.cli.sample import sample
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser, load_pretrained
from ebcache_fast.plan import Plan

pytest.importorskip("diffusers")

MAKERS: list[Callable[[], Any]] = [tiny_transformer, tiny_pixart, tiny_cogvideox]


def uncached(model: nn.Module) -> Plan:
    shape = as_denoiser(model).shape
    return Plan.uncached((999, 0), shape.depth, tuple(cost.branch for cost in shape.branches))


@pytest.mark.parametrize("make", MAKERS)
def test_a_transformer_comes_back_and_can_be_enabled(make: Callable[[], Any], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path, torch_dtype=torch.float64)
    assert type(again) is type(model)
    assert not again.training
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.double())
    disable(enable(again, uncached(again)))


def test_the_transformer_of_a_pipelines_folder(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    again = load_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), pipe.transformer.parameters()))


def test_older_folders_name_another_class(tmp_path: Path) -> None:
    """As the hub's folders of DiT and PixArt do."""
    (model := tiny_pixart()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"_class_name": "Transformer2DModel"}))
    assert type(load_pretrained(tmp_path)) is type(model)


def test_sampling_from_a_folder_by_the_command_line(tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path / "dit")
    sample(model="diffusers", ckpt=tmp_path / "dit", num_sampling_steps=2, num_samples=3, sample_dir=tmp_path / "out")
    assert np.load(tmp_path / "out" / "samples.npz")["arr_0"].shape == (3, 4, 8, 8)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def unknown_class(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "NoSuchModel"}')


def no_weights(folder: Path) -> None:
    for weights in folder.glob("*.safetensors"):
        weights.unlink()


def damaged_weights(folder: Path) -> None:
    for weights in folder.glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])


@pytest.mark.parametrize("damage", [no_config, damaged_config, unknown_class, no_weights, damaged_weights])
def test_folders_that_hold_no_model(damage: Callable[[Path], None], tmp_path: Path) -> None:
    tiny_transformer().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=r"save_pretrained|can.t be loaded \(\w+: .+\); save it again") as caught:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder_at_all() -> None:
    with pytest.raises(InputError, match=r"facebook/DiT-XL-2-256 has no config\.json"):
        load_pretrained("facebook/DiT-XL-2-256")


def test_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # which makes importing it an ImportError
    with pytest.raises(InputError, match=r"^diffusers is not installed; pip install 'ebcache-fast\[diffusers\]'$"):
        load_pretrained(tmp_path)
