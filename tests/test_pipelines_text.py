"""Pipelines of prompts with caching enabled: texts that change, transformers of other sizes, other dtypes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from constants import NO
from diffusers_kinds import ALPHA_1024, COG_2B, COG_5B, SIGMA, Kind, ask, drive, table_of, timesteps
from diffusers_oracle import assert_as_exact_as_its_own, by_timestep, drive_replaying, replaying
from diffusers_tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_cogvideox, tiny_pixart
from tiny import assert_all_same, relative_error

from ebcache_fast import enable, stats

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
every_text = pytest.mark.parametrize(
    ("kind", "name"), [(SIGMA, TEXT), (SIGMA, MASK), (COG_2B, TEXT), (COG_5B, TEXT)], ids=str
)
with_conditions = pytest.mark.parametrize("kind", [ALPHA_1024, COG_2B, COG_5B], ids=str)


# -------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("kind", [SIGMA, ALPHA_1024, COG_5B], ids=str)
def test_text_of_another_length_in_the_next_call(kind: Kind, pipe: Any) -> None:
    other = replaying(pipe)
    enable(pipe, table_of(pipe))
    for length in (TEXT_LENGTH, 3, 9, TEXT_LENGTH):
        assert_all_same(*([kind.draw(one, max_sequence_length=length)] for one in (pipe, other)))
    assert not stats(pipe).originals


@every_text
def test_text_that_is_overwritten_in_place_between_runs(kind: Kind, pipe: Any, name: str) -> None:
    ts, call = timesteps(pipe), kind.call(pipe)
    value, other = call[name], replaying(pipe)
    enable(pipe, table_of(pipe))
    for overwrite in (lambda: None, lambda: value.mul_(2), lambda: value.data.neg_(), lambda: value.fill_(1)):
        overwrite()
        assert_all_same(drive(pipe.transformer, call, ts), drive(other.transformer, call, ts))


@every_text
def test_text_that_changes_within_a_run_is_not_taken_from_the_cache(kind: Kind, pipe: Any, name: str) -> None:
    ts, call = timesteps(pipe), kind.call(pipe)
    other = call | {name: kind.call(pipe, rows=(3, 4))[name]}
    calls = (call, call, other, other, other)
    types = by_timestep(pipe) | {ts[2]: NO}  # nothing was kept of the other text
    replayed = replaying(pipe, types).transformer
    enable(pipe, table_of(pipe))
    for i, each in enumerate(calls):
        ours, theirs = (ask(one, each, ts[i], seed=i) for one in (pipe.transformer, replayed))
        assert relative_error(ours, theirs) < 1e-5
    assert sum(stats(pipe).refreshed.values()) == 1


# -------------------------------------------------------------------------------------------------------------- sizes


OF_BOTH: dict[str, dict[str, Any]] = {
    "other heads": dict(num_attention_heads=4, attention_head_dim=4),
    "no biases": dict(attention_bias=False),
    "another epsilon": dict(norm_eps=0.1),
    "geglu": dict(activation_fn="geglu"),
    "dropout": dict(dropout=0.5),
}
OF_PIXART = OF_BOTH | {
    "eps alone": dict(out_channels=4),
    "no projection of captions": dict(caption_channels=None, cross_attention_dim=TEXT_WIDTH),
    "captions of another width": dict(caption_channels=None, cross_attention_dim=TEXT_WIDTH, attention_head_dim=12),
    "3 layers, larger patches": dict(num_layers=3, patch_size=4),
    "stretched positions": dict(interpolation_scale=2),
}
OF_COGVIDEOX = OF_BOTH | {
    "3 layers": dict(num_layers=3),
    "norms without parameters": dict(norm_elementwise_affine=False),
    "frequencies of another kind": dict(flip_sin_to_cos=False, freq_shift=1),
    "another activation in time": dict(timestep_activation_fn="gelu", time_embed_dim=12),
    "other positions": dict(spatial_interpolation_scale=1.0, temporal_interpolation_scale=2.0),
}
SIZES: dict[str, tuple[Kind, Callable[[], Any]]] = {
    f"{kind}, {name}": (kind, partial(make, **sizes))
    for kind, make, table in ((SIGMA, tiny_pixart, OF_PIXART), (COG_2B, tiny_cogvideox, OF_COGVIDEOX))
    for name, sizes in table.items()
}


@pytest.mark.parametrize(("kind", "make"), SIZES.values(), ids=SIZES)
def test_transformers_of_other_sizes(kind: Kind, pipe: Any, make: Callable[[], Any]) -> None:
    pipe.transformer = make()
    replayed = kind.draw(replaying(pipe))
    enable(pipe, table_of(pipe))
    assert relative_error(kind.draw(pipe), replayed) < 1e-5
    assert not stats(pipe).originals


# ------------------------------------------------------------------------------------------------------------- dtypes


@with_conditions
def test_the_module_in_float64_to_its_last_digits(kind: Kind, pipe: Any) -> None:
    ts, call = timesteps(pipe), kind.call(pipe)
    call |= {name: call[name].double() for name in ("hidden_states", TEXT)}
    pipe.transformer.to(torch.float64)
    replayed = drive_replaying(pipe, call, ts)
    enable(pipe, table_of(pipe))
    assert_all_same(drive(pipe.transformer, call, ts), replayed, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@with_conditions
def test_the_module_in_half_precision_is_as_exact_as_its_own(kind: Kind, pipe: Any, dtype: torch.dtype) -> None:
    assert_as_exact_as_its_own(kind, pipe, dtype)
