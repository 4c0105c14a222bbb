"""A text that is not finite is blamed for itself, and not the latents that it spoils a step later."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers_tiny import TEXT_LENGTH, tiny_cogvideox_2b, tiny_pixart_sigma

from ebcache_fast import CacheTable, StepType, enable
from ebcache_fast.dropin import signatures
from ebcache_fast.errors import InputError

STEPS = 4
PICTURE = dict(height=8, width=8, use_resolution_binning=False, clean_caption=False)
VIDEO = dict(height=16, width=16, num_frames=5)
PIPES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "PixArt": (tiny_pixart_sigma, PICTURE),
    "CogVideoX": (tiny_cogvideox_2b, VIDEO),
}


def enabled(pipe: Any, in_order: bool) -> Any:
    pipe.scheduler.set_timesteps(STEPS)
    types = [StepType.NO_CACHE, StepType.ATTN_MLP] * 2
    return enable(pipe, CacheTable(pipe.scheduler.timesteps.tolist(), types), in_order=in_order)


def draw(pipe: Any, **call: Any) -> torch.Tensor:
    call |= dict(num_inference_steps=STEPS, max_sequence_length=TEXT_LENGTH, output_type="latent")
    return pipe(prompt="the dog", generator=torch.Generator().manual_seed(0), **call, return_dict=False)[0]


@pytest.mark.parametrize("in_order", [False, True], ids=["", "in_order"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("make", "call"), PIPES.values(), ids=PIPES)
def test_the_text_is_blamed_and_the_next_run_is_answered(
    make: Callable[[], Any], call: dict[str, Any], which: int, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = enabled(make(), in_order)
    good = draw(pipe, **call)
    encode = type(pipe).encode_prompt

    def spoilt(*args: Any, **named: Any) -> Any:
        out = encode(pipe, *args, **named)
        texts = [one for one in out if one.is_floating_point()]
        texts[which][0, 0, 0] = float("inf")
        return out

    monkeypatch.setattr(pipe, "encode_prompt", spoilt, raising=False)
    with pytest.raises(InputError, match=f"the text of row {1 - which} holds a number that is not finite.*bfloat16"):
        draw(pipe, **call)
    monkeypatch.undo()
    assert torch.equal(draw(pipe, **call), good)


def test_it_is_looked_at_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[object] = []
    look = signatures.ForwardCall.row_not_finite
    monkeypatch.setattr(signatures.ForwardCall, "row_not_finite", lambda call: looks.append(call) or look(call))
    pipe = enabled(tiny_pixart_sigma(), in_order=False)
    for runs in (1, 2):
        draw(pipe, **PICTURE)
        assert len(looks) == runs


def test_latents_are_blamed_where_the_text_is_finite() -> None:
    pipe = enabled(tiny_pixart_sigma(), in_order=False)
    with pytest.raises(InputError, match="x holds a number that is not finite"):
        draw(pipe, **PICTURE, latents=torch.full((1, 4, 8, 8), float("nan")))
