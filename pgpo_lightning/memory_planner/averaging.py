"""What it takes to move a teacher whose weights are rounded stochastically, counted on tensors without data."""

from functools import cache

import torch

from pgpo_lightning.memory_planner.counter import LiveBytes
from pgpo_lightning.memory_planner.work import Work, WorkCounter
from pgpo_lightning.models import rounding

_WEIGHTS = 2**16


def rounding_bytes(shapes: list[tuple[int, ...]], student: torch.dtype, shards: int) -> int:
    """Return the temporary bytes of the move of a parameter, of which the largest slice takes most.

    Args:
        shapes: Of all parameters.
        student: Type of the student's weights.
        shards: Number of devices over which the rows of a parameter are distributed.
    """
    return max(_slice(shape, shards) for shape in shapes) * _counted(student)[0] // _WEIGHTS


def rounding_work(shapes: list[tuple[int, ...]], student: torch.dtype, shards: int) -> Work:
    """Return the work of the move of all parameters on one device.

    Args:
        shapes: Of all parameters.
        student: Type of the student's weights.
        shards: Number of devices over which the rows of a parameter are distributed.
    """
    work = _counted(student)[1]
    sizes = [-(-torch.Size(shape).numel() // shards) for shape in shapes]
    slices = sum(-(-size // _slice(shape, shards)) for size, shape in zip(sizes, shapes, strict=True))
    return Work(launches=work.launches * slices, other_bytes=work.other_bytes * sum(sizes) / _WEIGHTS)


def _slice(shape: tuple[int, ...], shards: int) -> int:
    row = max(1, torch.Size(shape[1:]).numel())
    return row * min(-(-shape[0] // shards), max(1, rounding.SLICE // row))


@cache
def _counted(student: torch.dtype) -> tuple[int, Work]:
    """Return peak bytes and work of the move of a slice of 2^16 weights."""
    own = torch.empty(_WEIGHTS, dtype=torch.bfloat16, device="meta")
    new = torch.empty(_WEIGHTS, dtype=student, device="meta")
    with torch.no_grad():
        with LiveBytes() as bytes_:
            rounding.lerp_rounded_(own, new, 0.5, 0)
        with WorkCounter() as work:
            rounding.lerp_rounded_(own, new, 0.5, 0)
    return bytes_.peak, work.work
