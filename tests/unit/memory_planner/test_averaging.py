"""Memory and work of a stochastically rounded average, against real moves."""

import pytest
import torch

from pgpo_lightning.memory_planner.averaging import rounding_bytes, rounding_work
from pgpo_lightning.memory_planner.counter import LiveBytes
from pgpo_lightning.memory_planner.work import WorkCounter
from pgpo_lightning.models.rounding import lerp_rounded_

SHAPES = [(70_000, 96), (300, 2048), (7,)]  # the first has two slices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_move_takes_what_is_planned(dtype):
    own, new = ([torch.zeros(shape, dtype=kind) for shape in SHAPES] for kind in (torch.bfloat16, dtype))

    def move():
        for start, end in zip(own, new, strict=True):
            lerp_rounded_(start, end, 0.5, 0)

    with LiveBytes() as bytes_:
        move()
    assert rounding_bytes(SHAPES, dtype, 1) == pytest.approx(bytes_.peak, rel=1e-3)
    with WorkCounter() as work:
        move()
    planned = rounding_work(SHAPES, dtype, 1)
    assert planned.launches == work.work.launches
    assert planned.other_bytes == pytest.approx(work.work.other_bytes, rel=1e-3)
    assert planned.flops == work.work.flops == 0


def test_sharded_rows_are_moved_where_they_are():
    one, two = (rounding_work(SHAPES, torch.float32, shards) for shards in (1, 2))
    assert two.other_bytes == pytest.approx(one.other_bytes / 2, rel=1e-6)
    assert rounding_bytes([(300, 2048)], torch.float32, 2) == rounding_bytes([(150, 2048)], torch.float32, 1)
