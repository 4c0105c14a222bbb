"""What users of today's caches ran into, from their trackers, beside runs that go wrong: a test for each."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from constants import MLP, NO
from depth import deep
from diffusers_kinds import (
    COG_2B,
    DIT,
    SIGMA,
    STEPS,
    TYPES,
    Kind,
    drive,
    families,
    table_of,
    timesteps,
    uncached,
)
from diffusers_oracle import drive_replaying, replaying
from fake_graphs import FakeGraphs
from fake_runs import enable_over, over
from tiny import assert_same, relative_error
from torch import Tensor

from ebcache_fast import disable, enable, stats
from ebcache_fast.models import as_denoiser

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

three = families(DIT)


# ----------------------------------------------------------------------------------- compilers, graphs, off switch


@three
def test_graphs_or_none_give_the_same_bits(kind: Kind, pipe: Any) -> None:
    """cache-dit#76, unsloth#10537."""
    ts = timesteps(pipe)
    first, second = kind.call(pipe), kind.call(pipe, rows=(3, 1))
    enable(pipe, table_of(pipe))
    eager = [drive(pipe.transformer, call, ts) for call in (first, first, second)]
    graphs = FakeGraphs()
    model = enable_over(over(graphs), disable(pipe).transformer, table_of(pipe))  # type: ignore[arg-type]
    for call, expected in zip((first, first, second), eager, strict=True):
        assert all(map(torch.equal, drive(model, call, ts), expected))
    assert graphs.replays == stats(model).replays == 3 * STEPS
    assert not stats(model).eager


@pytest.mark.parametrize("kind", [deep(DIT), deep(SIGMA), deep(COG_2B)], ids=str)
def test_torch_compile_gives_the_same_bits(kind: Kind, pipe: Any) -> None:
    """cache-dit#76, xDiT#719: compiled before it is enabled, or after."""
    ts, call = timesteps(pipe), kind.call(pipe)
    enable(pipe, table_of(pipe))
    expected = drive(pipe.transformer, call, ts)
    pipe.transformer.compile(backend="eager")
    assert all(map(torch.equal, drive(pipe.transformer, call, ts), expected))
    enable(disable(pipe), table_of(pipe))
    assert all(map(torch.equal, drive(pipe.transformer, call, ts), expected))
    assert not stats(pipe).originals


@three
def test_the_kill_switch(kind: Kind, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """unsloth#10537: without a line of code, in the middle of a run too."""
    ts, call = timesteps(pipe), kind.call(pipe)
    plain = drive(pipe.transformer, call, ts)
    enable(pipe, table_of(pipe), strict=True)
    drive(pipe.transformer, call, ts[:2])
    monkeypatch.setenv("EBCACHE_DISABLE", "1")
    assert all(map(torch.equal, drive(pipe.transformer, call, ts), plain))
    assert stats(pipe).originals == {"EBCACHE_DISABLE": STEPS}


def test_the_kill_switch_for_arguments_that_the_method_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = SIGMA.pipeline()
    ts, call = timesteps(pipe), SIGMA.call(pipe) | dict(cross_attention_kwargs={"scale": 1.0})
    plain = drive(pipe.transformer, call, ts)
    enable(pipe, table_of(pipe), strict=True)
    monkeypatch.setenv("EBCACHE_DISABLE", "1")
    assert all(map(torch.equal, drive(pipe.transformer, call, ts), plain))


# --------------------------------------------------------------------------------------------------------- weights


@three
def test_weights_that_are_fused_loaded_and_unloaded(kind: Kind, pipe: Any) -> None:
    """diffusers#9279, cache-dit#601: as LoRA does it, in place and past every counter of versions."""
    ts, call = timesteps(pipe), kind.call(pipe)
    weight = pipe.transformer.transformer_blocks[1].attn1.to_v.weight
    state = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    delta = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    def fuse(model: Any, factor: float) -> None:
        model.transformer_blocks[1].attn1.to_v.weight.data.add_(delta, alpha=factor)

    changes: list[Callable[[Any], Any]] = [
        lambda model: None,
        lambda model: fuse(model, 0.5),
        lambda model: fuse(model, -0.5),
        lambda model: model.load_state_dict({name: 1.1 * value for name, value in state.items()}),
        lambda model: model.load_state_dict(state, assign=True),
        lambda model: model.load_state_dict(state),
    ]
    plain, drawn = copy.deepcopy(pipe), []
    enable(pipe, table_of(pipe))
    for change in changes:
        for each in (pipe, plain):
            change(each.transformer)
        drawn.append(drive(pipe.transformer, call, ts)[-1])
        assert_same(drawn[-1], drive_replaying(plain, call, ts)[-1])
    assert relative_error(drawn[1], drawn[0]) > 1e-4
    assert torch.equal(drawn[-1], drawn[-2])
    assert not stats(pipe).originals


@three
def test_conversion_after_enabling(kind: Kind, pipe: Any) -> None:
    """cache-dit#601: to bfloat16 and back again."""
    ts, call = timesteps(pipe), kind.call(pipe)
    low = {n: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in call.items()}
    other = replaying(pipe)
    enable(pipe, table_of(pipe))
    before = drive(pipe.transformer, call, ts)[0]
    for each in (pipe, other):
        each.transformer.to(torch.bfloat16)
    for ours, theirs in zip(drive(pipe.transformer, low, ts), drive(other.transformer, low, ts), strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, theirs) < 0.1
    pipe.transformer.to(torch.float32)
    assert relative_error(drive(pipe.transformer, call, ts)[0], before) < 0.1
    assert not stats(pipe).originals


# ------------------------------------------------------------------------------------ what nobody would be told


@three
def test_a_cache_that_is_never_hit_says_so(kind: Kind, pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Comfy-WaveSpeed#149: a warning, and a count, once for each reason."""
    enable(pipe, table_of(pipe))
    kind.draw(pipe)
    ours = [record for record in caplog.records if record.name.startswith("ebcache_fast")]
    assert not ours
    assert stats(pipe).hits
    enable(pipe, table_of(pipe))
    for _ in range(2):
        kind.draw(pipe, steps=3)
    assert not stats(pipe).hits
    ours = [record for record in caplog.records if record.name.startswith("ebcache_fast")]
    assert all(record.levelname == "WARNING" for record in ours)
    said = [record.getMessage() for record in ours]
    assert len(said) == len(set(said)) == len(stats(pipe).refreshed) + 1
    assert sum("nothing was reused in a whole run" in message for message in said) == 1
    assert any("table.retime(pipe.scheduler.timesteps.tolist())" in message for message in said)
    assert any("a timestep is not in the plan" in message for message in said)


@three
def test_a_sample_is_its_seeds_in_whatever_batch(kind: Kind, pipe: Any) -> None:
    """learning-to-cache#1, ToCa#19, DiT#12, DiT#108: the same on any number of devices, which share a batch."""

    def seeds(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    enable(pipe, table_of(pipe))
    together = kind.draw(pipe, rows=(0, 1, 2), generator=seeds(5, 6, 7))
    for row, seed in ((0, 5), (2, 7)):
        alone = kind.draw(pipe, rows=(row,), generator=seeds(seed))
        assert relative_error(alone[0], together[row]) < 1e-4
    pair = kind.draw(pipe, rows=(2, 1), generator=seeds(7, 6))
    assert relative_error(pair.flip(0), together[1:]) < 1e-4


@pytest.mark.parametrize("types", [TYPES, (NO, MLP, MLP, NO, MLP), (NO,) * STEPS])
@three
def test_what_the_caches_take_is_said_before_it_is_taken(kind: Kind, pipe: Any, types: tuple[Any, ...]) -> None:
    """ToCa#24."""
    shape, table = as_denoiser(pipe.transformer).shape, table_of(pipe, types)
    plan = table.plan(shape)
    said = [plan.cache_bytes(shape, rows, itemsize=4) for rows in (4, 2)]
    enable(pipe, table)
    assert stats(pipe).cache_bytes == 0
    kind.draw(pipe, rows=(0, 1), guidance_scale=4.0)
    assert stats(pipe).cache_bytes == said[0]
    kind.draw(pipe, rows=(0, 1), guidance_scale=1.0)
    assert stats(pipe).cache_bytes == sum(said)
    disable(pipe)
    enable(pipe, uncached(pipe))
    assert stats(pipe).cache_bytes == 0


def tokens_of(kind: Kind) -> Iterator[tuple[dict[str, int], int]]:
    """Sizes to ask for, and how many tokens such a call has."""
    if kind is DIT:
        yield {}, (8 // 4) ** 2
    elif kind.other_sizes and "num_frames" in kind.other_sizes[0]:
        yield {}, 6 + 3 * 16
        yield dict(height=16, width=24, num_frames=3), 6 + 2 * 24
    else:
        yield {}, 4 * 4
        yield dict(height=24, width=24), 12 * 12


@three
def test_what_the_caches_take_is_slots_of_tokens_of_the_size_that_runs(kind: Kind, pipe: Any) -> None:
    """ToCa#24: by hand, for other sizes too."""
    for size, tokens in tokens_of(kind):
        enable(pipe, table_of(pipe))
        kind.draw(pipe, rows=(0,), guidance_scale=4.0, **size)
        slots = 2 * (3 if hasattr(pipe.transformer.transformer_blocks[0], "norm_type") and kind is not DIT else 2)
        assert stats(pipe).cache_bytes == slots * 2 * tokens * 16 * 4  # rows, width, bytes of a float
