"""The memory of a trajectory that fits more than one batch."""

import pytest

from ebcache_fast.engine.buffers import room_for


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
