"""LoRA by peft: put there, scaled, switched off, fused and taken away, before and after enabling."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from depth import deep
from diffusers_kinds import COG_2B, DIT, SIGMA, STEPS, Kind, table_of
from diffusers_oracle import bare, replaying
from tiny import relative_error
from torch import Tensor

from ebcache_fast import disable, enable, stats

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

Change = Callable[[Any], object]
Draw = Callable[[Any], Tensor]
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out", "linear", "linear_1")


def config(rank: int = 4) -> Any:
    """Of every kind of layer that has weights to multiply; an adapter that is new changes something."""
    return peft.LoraConfig(r=rank, lora_alpha=8, init_lora_weights=False, target_modules=list(ADAPTED))


def injected(pipe: Any) -> None:
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config(), pipe.transformer, "one")


def wrapped(pipe: Any) -> None:
    torch.manual_seed(0)
    pipe.transformer = peft.get_peft_model(pipe.transformer, config(), adapter_name="one")


def each_layer(name: str, *args: Any) -> Change:
    def change(pipe: Any) -> None:
        for module in pipe.transformer.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                getattr(module, name)(*args)

    return change


def merged_for_good(pipe: Any) -> None:
    pipe.transformer = pipe.transformer.merge_and_unload()


LAYERS: dict[str, Change] = {
    "scaled": each_layer("set_scale", "one", 0.3),
    "switched off": each_layer("enable_adapters", False),
    "switched on": each_layer("enable_adapters", True),
    "fused": each_layer("merge"),
    "no longer fused": each_layer("unmerge"),
}


def follow(pipe: Any, draw: Draw, changes: dict[str, Change], *, again: bool = False) -> None:
    """Assert that an enabled pipeline is the method after each of these changes; all but fusing change what it draws.

    again: enable it anew after each.
    """
    other = copy.deepcopy(pipe)
    enable(pipe, table_of(pipe))
    last = draw(pipe)
    for name, change in changes.items():
        for one in (pipe, other):
            change(one)
        if again:
            enable(pipe, table_of(pipe))
        ours = draw(pipe)
        assert relative_error(ours, draw(replaying(other))) < 1e-5, name
        assert (relative_error(ours, last) < 1e-4) == ("fused" in name), name
        last = ours
    counted = stats(pipe)
    assert sum(counted.steps.values()) == STEPS * (1 if again else 1 + len(changes))
    assert not counted.originals
    assert not counted.refreshed
    assert torch.equal(draw(disable(pipe)), draw(other))


@pytest.mark.parametrize(
    ("kind", "again"),
    [(DIT, False), (SIGMA, True), (COG_2B, False), deep(DIT, True), deep(SIGMA, False), deep(COG_2B, True)],
    ids=str,
)
def test_adapters_of_layers(kind: Kind, again: bool) -> None:
    pipe, draw = bare(kind)
    follow(copy.deepcopy(pipe), draw, {"put there": injected, **LAYERS}, again=again)


@pytest.mark.parametrize("kind", [DIT, SIGMA], ids=str)
def test_a_model_that_is_wrapped_and_unwrapped(kind: Kind) -> None:
    """As LoRA of PixArt is loaded: peft's model stands in the transformer's place."""
    pipe, draw = copy.deepcopy(bare(kind)[0]), bare(kind)[1]
    other, inner = copy.deepcopy(pipe), pipe.transformer
    follow(pipe, draw, {"wrapped": wrapped, "fused": each_layer("merge"), "no longer fused": each_layer("unmerge")})
    wrapped(other)
    assert pipe.transformer is not inner
    assert enable(pipe.transformer, table_of(pipe)) is pipe.transformer
    assert stats(pipe) == stats(inner)
    for one in (enable(pipe, table_of(pipe)), other):
        merged_for_good(one)
    assert pipe.transformer is inner
    assert relative_error(draw(pipe), draw(replaying(other))) < 1e-5
    assert sum(stats(pipe).steps.values()) == STEPS


# ------------------------------------------------------------------------------------------- of diffusers' pipelines


def saved(folder: Path, seed: int) -> Path:
    """LoRA as diffusers saves it, of this seed."""
    pipe = COG_2B.pipeline()
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.transformer.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets), "saved")
    layers = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="saved")
    pipe.save_lora_weights(folder, transformer_lora_layers=layers)
    return folder


def test_a_pipelines_lora(tmp_path: Path) -> None:
    first, second = (saved(tmp_path / str(seed), seed) for seed in (0, 1))

    def load(folder: Path, name: str, pipe: Any) -> None:
        pipe.load_lora_weights(folder, adapter_name=name)

    changes: dict[str, Change] = {
        "loaded": partial(load, first, "first"),
        "scaled": lambda pipe: pipe.set_adapters(["first"], [0.4]),
        "another": partial(load, second, "second"),
        "both": lambda pipe: pipe.set_adapters(["first", "second"], [0.5, 0.7]),
        "switched off": lambda pipe: pipe.disable_lora(),
        "switched on": lambda pipe: pipe.enable_lora(),
        "one deleted": lambda pipe: pipe.delete_adapters("second"),
        "fused": lambda pipe: pipe.fuse_lora(),
        "no longer fused": lambda pipe: pipe.unfuse_lora(),
        "unloaded": lambda pipe: pipe.unload_lora_weights(),
    }
    follow(COG_2B.pipeline(), bare(COG_2B)[1], changes)


def test_fused_and_unloaded_in_whole_runs(tmp_path: Path) -> None:
    pipe, other = COG_2B.pipeline(), COG_2B.pipeline()
    enable(pipe, table_of(pipe))
    drawn = [COG_2B.draw(pipe)]
    for one in (pipe, other):
        one.load_lora_weights(saved(tmp_path, 0))
    drawn.append(COG_2B.draw(pipe))
    assert relative_error(drawn[-1], COG_2B.draw(replaying(other))) < 1e-5
    for one in (pipe, other):
        one.fuse_lora()
        one.unload_lora_weights()
    drawn.append(COG_2B.draw(pipe))
    assert relative_error(drawn[-1], COG_2B.draw(replaying(other))) < 1e-5
    assert relative_error(drawn[1], drawn[0]) > 1e-3
    assert not stats(pipe).originals
    assert torch.equal(COG_2B.draw(disable(pipe)), COG_2B.draw(other))


def test_a_scale_given_with_the_call_is_the_models_own(tmp_path: Path) -> None:
    pipe = COG_2B.pipeline()
    pipe.load_lora_weights(saved(tmp_path, 0))
    scaled = dict(attention_kwargs={"scale": 0.5})
    plain = COG_2B.draw(pipe, **scaled)
    assert relative_error(plain, COG_2B.draw(pipe)) > 1e-4
    enable(pipe, table_of(pipe))
    assert torch.equal(COG_2B.draw(pipe, **scaled), plain)
    assert stats(pipe).originals == {"arguments that the engine does not know": STEPS}
