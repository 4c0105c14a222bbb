"""The oracle of the diffusers drop-in by itself: what it leaves alone, and what it changes."""

from typing import Any

import pytest
import torch
from constants import ATTENTION, ATTN_MLP, MLP, NO
from diffusers_kinds import COGS, DIT, PIXARTS, STEPS, Kind, timesteps
from diffusers_oracle import Replaying, replaying, scaled_v
from tiny import relative_error

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

KINDS = (DIT, *PIXARTS, *COGS)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_is_the_pipeline_until_something_is_reused(kind: Kind) -> None:
    pipe = kind.pipeline()
    plain = kind.draw(pipe)
    assert plain.isfinite().all()
    assert torch.equal(kind.draw(replaying(pipe, {})), plain)
    assert relative_error(kind.draw(replaying(pipe)), plain) > 1e-3
    assert torch.equal(kind.draw(pipe), plain)


@pytest.mark.parametrize("kind", [DIT, PIXARTS[0], COGS[0]], ids=str)
@pytest.mark.parametrize(
    ("step_type", "computed"),
    [(NO, "attn1 attn2 ff"), (ATTENTION, "ff"), (ATTN_MLP, ""), (MLP, "attn1 attn2")],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_step_computes_what_its_type_does_not_reuse(kind: Kind, step_type: Any, computed: str) -> None:
    pipe = kind.pipeline()
    ts, counted = timesteps(pipe), dict[str, int]()
    other = replaying(pipe, dict.fromkeys(ts[1:], step_type))
    for name, module in other.transformer.named_modules():
        if isinstance(module, Replaying):
            branch = name.rpartition(".")[2]
            counted[branch] = 0

            def count(*_: Any, branch: str = branch) -> None:
                counted[branch] += 1

            module.inner.register_forward_hook(count)
    kind.draw(other)
    assert counted == {name: 2 * (STEPS if name in computed.split() else 1) for name in counted}
    assert ("attn2" in counted) == (kind is PIXARTS[0])


def test_rows_and_seeds_and_prompts_differ() -> None:
    for kind in KINDS:
        pipe = kind.pipeline()
        first, second = (kind.draw(pipe, rows)[0] for rows in ((0, 1), (2, 1)))
        assert not torch.allclose(first, second)
        assert not torch.allclose(first, kind.draw(pipe, seed=2)[0])


def test_a_scaled_v_stands_for_scaled_noise_of_the_same_x() -> None:
    x, v = torch.randn(2, 5, dtype=torch.float64)
    for squared in (0.9, 0.5, 0.01):
        alpha, sigma = squared**0.5, (1 - squared) ** 0.5
        ours = scaled_v(v, x, squared, 0.8)
        torch.testing.assert_close(alpha * ours + sigma * x, 0.8 * (alpha * v + sigma * x))
        torch.testing.assert_close(ours, v + (0.8 - 1) * (alpha * v + sigma * x) / alpha)
    assert torch.equal(scaled_v(v, x, 0.0024, 0.8), v)
