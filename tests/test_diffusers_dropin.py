"""diffusers' DiTPipeline with caching enabled: unmodified, in place, and back again bit for bit."""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_tiny import tiny_pipeline
from tiny import relative_error
from torch import Tensor, nn

from ebcache_fast import CacheTable, disable, enable, enabled, stats
from ebcache_fast.errors import InputError, TrajectoryError
from ebcache_fast.plan import Branch, StepType

diffusers = pytest.importorskip("diffusers")

NO, ATTENTION, ATTN_MLP, MLP, *_ = StepType
TYPES = (NO, ATTN_MLP, ATTENTION, NO, MLP)
TIMESTEPS = tuple(range(800, -1, -200))
TABLE = CacheTable(TIMESTEPS, TYPES)
UNCACHED = CacheTable(TIMESTEPS, [NO] * len(TIMESTEPS))


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline()


def draw(pipe: Any, labels: tuple[int, ...] = (3, 7), steps: int = 5, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    arguments = dict(num_inference_steps=steps, generator=generator, output_type="pt") | options
    images: Tensor = pipe(list(labels), **arguments).images
    return images


class Replaying(nn.Module):
    """A branch that keeps what it computed last, and gives it again in steps that reuse it."""

    def __init__(self, inner: nn.Module, branch: Branch) -> None:
        super().__init__()
        self.inner, self.branch, self.kept = inner, branch, torch.tensor(math.nan)
        self.step_type = NO

    def forward(self, hidden_states: Tensor, *others: Any, **named: Any) -> Tensor:
        if self.branch not in self.step_type.reuses:
            self.kept = self.inner(hidden_states, *others, **named)
        return self.kept


def draw_with_replays(pipe: Any, **options: Any) -> Tensor:
    """The method written around diffusers' own blocks, without any of ours."""
    pipe = copy.deepcopy(pipe)
    found: list[Replaying] = []
    for block in pipe.transformer.transformer_blocks:
        block.attn1, block.ff = Replaying(block.attn1, Branch.SELF_ATTN), Replaying(block.ff, Branch.MLP)
        found += [block.attn1, block.ff]

    def set_step(module: nn.Module, args: Any, named: dict[str, Any]) -> None:
        for each in found:
            each.step_type = TYPES[TIMESTEPS.index(int(named["timestep"][0]))]

    pipe.transformer.register_forward_pre_hook(set_step, with_kwargs=True)
    return draw(pipe, **options)


@pytest.mark.parametrize("options", [{}, {"in_order": True}], ids=["", "in_order"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_uncached_it_is_the_pipeline_and_cached_the_method(
    pipe: Any, guidance_scale: float, options: dict[str, bool]
) -> None:
    plain, replayed = (run(pipe, guidance_scale=guidance_scale) for run in (draw, draw_with_replays))
    assert relative_error(replayed, plain) > 1e-3
    assert enable(pipe, UNCACHED, **options) is pipe
    assert relative_error(draw(pipe, guidance_scale=guidance_scale), plain) < 1e-5
    enable(pipe, TABLE, **options)
    for _ in range(2):
        assert relative_error(draw(pipe, guidance_scale=guidance_scale), replayed) < 1e-5
    counted = stats(pipe)
    assert counted == stats(pipe.transformer)
    assert counted.steps == {"NO_CACHE": 4, "ATTN_MLP": 2, "ATTENTION": 2, "MLP": 2}
    assert not counted.originals
    assert not counted.refreshed


def test_disable_gives_the_pipeline_back(pipe: Any, tmp_path: Path) -> None:
    plain, keys = draw(pipe), list(pipe.transformer.state_dict())
    enable(pipe.transformer, TABLE)
    draw(pipe)
    assert list(pipe.transformer.state_dict()) == keys
    assert disable(pipe) is pipe
    assert "forward" not in vars(pipe.transformer)
    assert torch.equal(draw(pipe), plain)
    with enabled(pipe, TABLE) as inner:
        assert inner is pipe
        assert not torch.equal(draw(pipe), plain)
    assert torch.equal(draw(pipe), plain)


def test_an_enabled_pipeline_is_saved_as_it_was(pipe: Any, tmp_path: Path) -> None:
    plain = draw(pipe)
    enable(pipe, TABLE).save_pretrained(tmp_path)
    again = diffusers.DiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), plain)


def test_a_copy_is_enabled_by_itself(pipe: Any) -> None:
    plain = draw(pipe)
    cached = draw(enable(pipe, TABLE))
    other = copy.deepcopy(pipe)
    disable(pipe)
    assert torch.equal(draw(pipe), plain)
    assert torch.equal(draw(other), cached)


def test_other_step_counts_compute_everything_and_are_counted(pipe: Any) -> None:
    plain = draw(pipe, steps=3)
    enable(pipe, TABLE)
    assert relative_error(draw(pipe, steps=3), plain) < 1e-5
    assert sum(stats(pipe).refreshed.values()) == 3
    enable(pipe, TABLE, strict=True)
    with pytest.raises(TrajectoryError, match="t=666 was not expected: a timestep is not in the plan"):
        draw(pipe, steps=3)


def test_a_run_after_one_that_was_cancelled_and_one_of_another_batch(pipe: Any) -> None:
    class CancelledError(Exception):
        pass

    def cancel(*_: Any) -> Iterator[None]:
        raise CancelledError

    cached = draw(enable(pipe, TABLE))
    step, pipe.scheduler.step = pipe.scheduler.step, cancel
    with pytest.raises(CancelledError):
        draw(pipe)
    pipe.scheduler.step = step
    draw(pipe, labels=(1,))
    assert torch.equal(draw(pipe), cached)


@torch.no_grad()
def test_the_forward_returns_what_it_did(pipe: Any) -> None:
    model, x, y = pipe.transformer, torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    t = torch.tensor([800, 800])
    plain = model(x, t, y)
    enable(model, TABLE)
    for out in (model(x, timestep=t, class_labels=y), model(x, t, y)):
        assert type(out) is type(plain)
        assert relative_error(out.sample, plain.sample) < 1e-5
    (alone,) = model(x, t, y, return_dict=False)
    assert torch.equal(alone, model(x, t, y)[0])
    assert type(model(x, t, y, cross_attention_kwargs={"scale": 1.0})) is type(plain)
    assert stats(model).originals == {"arguments that the engine does not know": 1}
    with pytest.raises(AttributeError):  # what it says itself
        model(x)


def broadcast_attention(model: Any) -> None:
    config = diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    diffusers.hooks.apply_pyramid_attention_broadcast(model, config)


def cast_layerwise(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("apply", "what"),
    [
        (broadcast_attention, "transformer_blocks.0.attn1 has diffusers' hook 'pyramid_attention_broadcast'"),
        (cast_layerwise, "DiTTransformer2DModel.proj_out_1 has diffusers' hook 'layerwise_casting'"),
    ],
)
def test_what_diffusers_does_by_hooks_is_refused_and_later_left_to_it(pipe: Any, apply: Any, what: str) -> None:
    other = copy.deepcopy(pipe)
    enable(pipe, TABLE)
    for transformer in (pipe.transformer, other.transformer):
        apply(transformer)
    with pytest.raises(InputError, match=what):
        enable(other, TABLE)
    assert torch.equal(draw(pipe), draw(other))
    ((why, calls),) = stats(pipe).originals.items()
    assert what in why
    assert calls == 5


class Counting(diffusers.hooks.ModelHook):
    """Changes nothing."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **named: Any) -> Any:
        self.calls += 1
        return args, named


class Wrapping(Counting):
    """The same with a forward of its own."""

    def new_forward(self, module: nn.Module, *args: Any, **named: Any) -> Any:
        return self.fn_ref.original_forward(*args, **named)


@pytest.mark.parametrize("kind", [Counting, Wrapping])
@pytest.mark.parametrize("enabled_first", [True, False])
def test_a_hook_of_somebodys_own_stays_around_it(pipe: Any, kind: type[Counting], enabled_first: bool) -> None:
    plain, cached = draw(pipe), draw(enable(copy.deepcopy(pipe), TABLE))
    registry, hook = diffusers.hooks.HookRegistry.check_if_exists_or_initialize(pipe.transformer), kind()
    changes = (lambda: enable(pipe, TABLE), lambda: registry.register_hook(hook, "counting"))
    for change in changes if enabled_first else reversed(changes):
        change()
    assert hook.calls == 0, "enabling is no call of the model"
    assert torch.equal(draw(pipe), cached)
    assert torch.equal(draw(disable(pipe)), plain)
    assert torch.equal(draw(enable(pipe, TABLE)), cached)
    assert hook.calls == 15
    registry.remove_hook("counting")
    assert torch.equal(draw(pipe), cached)
    assert torch.equal(draw(disable(pipe)), plain)
    assert hook.calls == 15


def of_another_class(model: Any) -> None:
    """As token merging does it."""
    block = model.transformer_blocks[0]

    class Doubled(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **named: Any) -> Tensor:
            return 2 * super().forward(*args, **named)

    block.__class__ = Doubled


def with_a_layer_twice(model: Any) -> None:
    model.transformer_blocks.append(model.transformer_blocks[0])


def without_projections(model: Any) -> None:
    class Flipped(nn.Module):
        def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:
            return hidden_states.flip(1)

    model.transformer_blocks[0].attn1 = Flipped()


@pytest.mark.parametrize("change", [of_another_class, with_a_layer_twice, without_projections])
def test_a_model_that_became_another_answers_itself(pipe: Any, change: Any) -> None:
    other = copy.deepcopy(pipe)
    draw(enable(pipe, TABLE))
    for each in (pipe, other):
        change(each.transformer)
    assert torch.equal(draw(pipe), draw(other))
    assert [*stats(pipe).originals.values()] == [5]


def test_whoever_compiles_it_gets_the_same(pipe: Any) -> None:
    plain, cached = draw(pipe), draw(enable(pipe, TABLE))
    pipe.transformer.compile(backend="eager")
    assert torch.equal(draw(pipe), cached)
    assert not stats(pipe).originals
    disable(pipe)
    assert relative_error(draw(pipe), plain) < 1e-5


def test_what_is_neither_a_module_nor_a_pipeline() -> None:
    for refused in (object(), "facebook/DiT-XL-2-256"):
        with pytest.raises(InputError, match="is no module and has no transformer; pass a model or its pipeline"):
            enable(refused, TABLE)


def test_it_has_no_float8_products(pipe: Any) -> None:
    with pytest.raises(InputError, match=r"fp8=True needs a DiT of the original layout.* DiffusersDiTDenoiser sees"):
        enable(pipe, TABLE, fp8=True)
    assert "forward" not in vars(pipe.transformer)
