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

from ebcache_fast import CacheTable, calibrate, disable, enable, stats
from ebcache_fast.apps import cli
from ebcache_fast.apps.cli.sample import sample
from ebcache_fast.calibration.algorithm1 import Algorithm1
from ebcache_fast.errors import InputError
from ebcache_fast.models import as_denoiser, load_pretrained
from ebcache_fast.plan import Plan
from ebcache_fast.samplers import trajectory_noise

diffusers = pytest.importorskip("diffusers")

MAKERS: list[Callable[[], Any]] = [tiny_transformer, tiny_pixart, tiny_cogvideox]


def uncached(model: nn.Module) -> Plan:
    shape = as_denoiser(model).shape
    return Plan.uncached((999, 0), shape.sites)


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


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A pipeline, saved to the folder "pipe" of an empty one that is the current one."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny_pipeline()
    pipe.scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_end=0.015, timestep_spacing="trailing")
    pipe.save_pretrained("pipe")
    return pipe


CALIBRATE = "calibrate --model diffusers --out t.json --samples 2 --num-sampling-steps 5 --a 9 --k 9"


@pytest.mark.parametrize("folder", ["pipe", "pipe/transformer", "./pipe/transformer/"])
def test_a_table_of_a_folder_is_for_its_pipeline(folder: str, saved: Any) -> None:
    assert cli.main(f"{CALIBRATE} --cfg-scale 4 --ckpt {folder}".split()) == 0
    table = CacheTable.load("t.json")
    assert table == calibrate(
        saved, labels=range(1000), samples=2, steps=5, algorithm=Algorithm1(a=9, k=9), batch_size=64
    )
    enable(saved, table)
    saved([1, 2], num_inference_steps=5)
    assert stats(saved).refreshed == {}
    assert stats(saved).steps == {"NO_CACHE": 3, "ATTN_MLP": 2}


def test_what_a_folder_samples_is_its_pipelines(saved: Any) -> None:
    assert cli.main(f"{CALIBRATE} --ckpt pipe".split()) == 0
    noise = trajectory_noise(3, range(2), 0, (4, 8, 8))[0]
    for table in ("", " --table t.json --num-sampling-steps 5"):
        steps = "" if table else " --num-sampling-steps 5"
        line = f"sample --model diffusers --ckpt pipe --num-samples 2 --cfg-scale 4 --global-seed 3{steps}{table}"
        assert cli.main(line.split()) == 0
        drawn = np.load("samples/samples.npz")["arr_0"]
        if table:
            enable(saved, CacheTable.load("t.json"))
        assert np.abs(drawn - latents_of(saved, noise)).max() < 1e-4


def latents_of(pipe: Any, noise: torch.Tensor) -> np.ndarray:
    """What a DiTPipeline ends with for labels 0 and 1, before its autoencoder."""
    seen: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def watched(*args: Any, **named: Any) -> Any:
        out = step(*args, **named)
        seen.append(out.prev_sample)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", watched)
        patch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *_, **__: noise)
        pipe([0, 1], guidance_scale=4.0, num_inference_steps=5)
    return seen[-1][:2].numpy()


def test_a_scheduler_that_no_sampler_follows_is_refused_with_the_way_out(
    saved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    saved.scheduler = diffusers.DDIMScheduler()  # which clips
    saved.save_pretrained("pipe")
    for command in (CALIBRATE, "sample --model diffusers --num-sampling-steps 2 --num-samples 1"):
        assert cli.main(f"{command} --ckpt pipe".split()) == 2
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1
        assert "the scheduler of pipe: clip_sample=True of DDIMScheduler" in err
        assert "pass --sampler ddim" in err
        assert cli.main(f"{command} --ckpt pipe --sampler ddim".split()) == 0


@pytest.mark.parametrize("content", [None, "{", "[]", '{"_class_name": "NoSuchScheduler"}'])
def test_a_damaged_scheduler_is_one_typed_line(
    content: str | None, saved: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path("pipe/scheduler/scheduler_config.json")
    file.unlink() if content is None else file.write_text(content)
    assert cli.main(f"{CALIBRATE} --ckpt pipe".split()) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "scheduler_config.json can't be loaded" in err


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
