"""The memory of a trajectory that fits more than one batch."""

import pytest
import torch

from ebcache_fast.engine.buffers import Tail, room_for


@pytest.mark.parametrize(
    ("distinct", "rows", "room"),
    [
        (1, 1, 1),
        (1, 2, 2),
        (2, 2, 2),
        (2, 4, 3),
        (3, 4, 3),
        (4, 4, 4),
        (1, 8, 5),
        (5, 8, 5),
        (6, 8, 8),
        (2, 3, 2),
        (3, 3, 3),
    ],
)
def test_room_for_labels_is_one_of_two_sizes(distinct: int, rows: int, room: int) -> None:
    assert room_for(distinct, rows) == room


@pytest.mark.parametrize("steps", [1, 20])
def test_the_tail_is_told_by_coefficients_and_noise(steps: int) -> None:
    plain, longer = torch.zeros(steps, 6), torch.zeros(steps, 9)
    latents, all_noise = torch.zeros(1, 2, 1, 4, 4), torch.zeros(steps + 1, 2, 1, 4, 4)
    tails = [Tail.of_sampler(rows, noise) for rows in (plain, longer) for noise in (latents, all_noise)]
    assert [(tail.memory, tail.noise) for tail in tails] == [
        (False, False),
        (False, True),
        (True, False),
        (True, True),
    ]
