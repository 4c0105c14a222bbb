"""`calibrate` where one sample can't vote: the error names it at once, what voted before it is kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_tiny import TEXT_LENGTH, tiny_cogvideox_2b, tiny_pixart_sigma
from tiny import CLASSES, tiny_dit
from torch import nn

from ebcache_fast import calibrate
from ebcache_fast.calibration import progress as calibration_progress
from ebcache_fast.calibration.algorithm1 import Algorithm1
from ebcache_fast.errors import EBCacheError, InputError, JobError

STEPS = 5
PROMPTS = ["the red cat", "a small old house", "the dog", "a green bird"]
BAD = 2  # the sample that fails
PICTURE = dict(height=8, width=8, use_resolution_binning=False, clean_caption=False, max_sequence_length=TEXT_LENGTH)
VIDEO = dict(height=16, width=16, num_frames=5, max_sequence_length=TEXT_LENGTH)
PIPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "PixArt": (tiny_pixart_sigma, PICTURE),
    "CogVideoX": (tiny_cogvideox_2b, VIDEO),
}


def encoding(pipe: Any, fault: Callable[[tuple[Any, ...]], object]) -> Any:
    """The pipeline; ``fault`` gets what encode_prompt returns for the prompt that is to fail."""
    encode = pipe.encode_prompt

    def encode_prompt(prompt: Any, *args: Any, **named: Any) -> Any:
        out = encode(prompt, *args, **named)
        if PROMPTS[BAD] in prompt:
            fault(out)
        return out

    pipe.encode_prompt = encode_prompt
    return pipe


def negative_place(pipe: Any) -> int:
    """Where encode_prompt returns the negative prompt's text."""
    return 2 if "PixArt" in type(pipe).__name__ else 1


def kept(file: Path) -> list[int]:
    """How many samples each tally of a progress file has."""
    return [tally["samples"] for tally in json.loads(file.read_text())["tallies"].values()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("make", "call"), PIPES.values(), ids=PIPES)
def test_a_text_that_is_not_finite_is_named_and_the_same_call_goes_on(
    make: Callable[[], Any], call: dict[str, Any], value: float, tmp_path: Path
) -> None:
    file, ran, rest = tmp_path / "progress.json", [], []
    options = dict(prompts=PROMPTS, steps=STEPS, call=call, progress_file=file, target_speedup=1.2)
    options |= {"method": "algorithm1"}
    bad = encoding(make(), lambda out: out[0][:, 1].fill_(value))
    with pytest.raises(InputError, match=r"sample 2, prompt 'the dog': its text, .*not finite; encode in") as caught:
        calibrate(bad, **options, on_step=ran.append)
    assert "\n" not in str(caught.value)
    assert len(ran) == BAD * STEPS  # none of it in vain
    assert kept(file) == [BAD]
    table = calibrate(make(), **options, on_step=rest.append)
    assert table == calibrate(make(), **(options | {"progress_file": None}))
    assert table.made is not None
    assert len(ran) + len(rest) == table.made.options["rounds"] * len(PROMPTS) * STEPS


def test_a_bad_negative_prompt_is_blamed() -> None:
    pipe = tiny_pixart_sigma()
    encoding(pipe, lambda out: out[negative_place(pipe)].fill_(float("nan")))
    with pytest.raises(InputError, match="prompt 'the dog': its negative prompt's text"):
        calibrate(pipe, prompts=PROMPTS[BAD:], steps=STEPS, call=PICTURE)


def test_a_bad_prompt_of_a_batch_is_named_and_a_long_one_cut() -> None:
    prompts = ["a cat", " ".join(["the dog"] * 50)]
    bad = encoding(tiny_pixart_sigma(), lambda out: None)
    encode = bad.encode_prompt

    def encode_prompt(prompt: Any, *args: Any, **named: Any) -> Any:
        out = encode(prompt, *args, **named)
        out[0][1] = float("nan")
        return out

    bad.encode_prompt = encode_prompt
    with pytest.raises(InputError, match=r"sample 1, prompt 'the dog the dog .*…': its text") as caught:
        calibrate(bad, prompts=prompts, steps=STEPS, call=PICTURE, batch_size=2)
    assert len(str(caught.value)) < 400


def test_an_encoder_that_raises_names_the_prompt(tmp_path: Path) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no memory left")

    options = dict(prompts=PROMPTS, steps=STEPS, call=PICTURE, progress_file=tmp_path / "progress.json")
    with pytest.raises(JobError, match="sample 2, prompt 'the dog': the pipeline raised RuntimeError: no memory left"):
        calibrate(encoding(tiny_pixart_sigma(), fail), **options)
    assert kept(tmp_path / "progress.json") == [BAD]


def test_ctrl_c_while_a_prompt_is_encoded_keeps_the_others(tmp_path: Path) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    options = dict(prompts=PROMPTS, steps=STEPS, call=PICTURE, progress_file=tmp_path / "progress.json")
    with pytest.raises(KeyboardInterrupt):
        calibrate(encoding(tiny_pixart_sigma(), stop), **options)
    assert kept(tmp_path / "progress.json") == [BAD]


def test_another_list_of_prompts_is_refused_by_its_first_differences(tmp_path: Path) -> None:
    options = dict(steps=STEPS, call=PICTURE, progress_file=tmp_path / "progress.json")
    calibrate(tiny_pixart_sigma(), prompts=PROMPTS, **options)
    with pytest.raises(JobError, match="samples 4, not 3; prompt 2 'the dog', not 'a green bird'; "):
        calibrate(tiny_pixart_sigma(), prompts=PROMPTS[:BAD] + PROMPTS[BAD + 1 :], **options)


def test_prompts_are_texts() -> None:
    with pytest.raises(InputError, match="must be a list"):
        calibrate(tiny_pixart_sigma(), prompts=["a cat", 3], steps=STEPS, call=PICTURE)


# ------------------------------------------------------------------------------------------- of the model itself

CALL: dict[str, Any] = dict(samples=CLASSES, steps=8, algorithm=Algorithm1(a=0.002, k=0.02), batch_size=2)


def spoilt(label: int) -> nn.Module:
    """A model whose output is not finite for one label."""
    model = tiny_dit(6)
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[label] = float("inf")
    return model


@pytest.mark.parametrize("row", [0, 1])
def test_an_output_that_is_not_finite_names_the_label(row: int, tmp_path: Path) -> None:
    label = 2 + row
    with pytest.raises(InputError, match=rf"sample {label}, label {label}: .* at step 0 \(NO_CACHE\) is not finite"):
        calibrate(spoilt(label), **CALL, progress_file=tmp_path / "progress.json")
    assert kept(tmp_path / "progress.json") == [2]


@pytest.fixture
def breaking() -> tuple[nn.Module, list[Exception]]:
    """A model that raises what the list holds, at one of its attentions."""
    model, raised, count = tiny_dit(6), [], iter(range(10_000))

    def hook(*_: object) -> None:
        if next(count) == 20 and raised:
            raise raised[0]

    for block in model.blocks:
        block.attn.qkv.register_forward_pre_hook(hook)
    return model, raised


def test_a_model_that_raises_is_one_typed_line(breaking: tuple[nn.Module, list[Exception]], tmp_path: Path) -> None:
    model, raised = breaking
    file = tmp_path / "progress.json"
    raised.append(RuntimeError("out of memory"))
    with pytest.raises(JobError, match=r"^samples? \d.*the model raised RuntimeError at step .*of memory") as caught:
        calibrate(model, **CALL, progress_file=file)
    assert caught.value.__cause__ is raised[0]
    assert kept(file) == [2]
    assert calibrate(model, **CALL, progress_file=file) == calibrate(model, **CALL)


def test_what_a_callback_raises_goes_through() -> None:
    def stop(_: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match=r"^enough$") as caught:
        calibrate(tiny_dit(6), **CALL, on_step=stop)
    assert not isinstance(caught.value, EBCacheError)


def test_a_full_disk_loses_one_batch_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, model = tmp_path / "progress.json", tiny_dit(6)
    dumps, written = json.dumps, []

    def fill(content: object) -> str:
        written.append(content)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return dumps(content)

    monkeypatch.setattr(calibration_progress.json, "dumps", fill)
    with pytest.raises(JobError, match=r"progress.json: can't be written: No space left on device"):
        calibrate(model, **CALL, progress_file=file)
    assert kept(file) == [2]
    heard: list[int] = []
    assert calibrate(model, **CALL, progress_file=file, on_step=heard.append) == calibrate(model, **CALL)
    assert sum(heard) == (CLASSES - 2) * 8
