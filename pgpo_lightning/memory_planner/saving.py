"""What saving a checkpoint takes: bytes of the file, and of the host's memory while it is written."""

from dataclasses import dataclass

MOVING = ("ema", "restart", "gated")
"""Teachers whose weights are saved; those of others are the student's, or those that the run started from.

Of an adapter every copy is saved."""


@dataclass(frozen=True)
class Saving:
    """A checkpoint of a run.

    Attributes:
        size: Bytes of its tensors, on all devices together.
        host: Bytes of the first process' host memory while it is written. It is written as a stream: from the CPU as it is,
            from a device one tensor after the other. Sharded weights are gathered first, unless every rank writes its own.
        disk: Bytes of the folder at the highest: those that are kept, and the one that is being written; null if all are kept.
    """

    size: int
    host: int
    disk: int | None


def saving(
    weights: int, teacher: int, state: int, largest: int, device: str, gathered: bool, keep: int | None
) -> Saving:
    """Return what saving a checkpoint takes.

    Args:
        weights: Bytes of the student's weights, or of its adapter, in all.
        teacher: Bytes of a moving teacher.
        state: Bytes of the optimizer's state.
        largest: Bytes of the largest tensor.
        device: cuda or cpu.
        gathered: Whether sharded weights are written as one file.
        keep: Checkpoints that are kept; null for all.
    """
    size = weights + teacher + state
    host = size if gathered else largest if device == "cuda" else 0
    return Saving(size, host, None if keep is None else (keep + 1) * size)
