"""Size of a checkpoint, and host memory while it is written."""

from dataclasses import dataclass

from pgpo_lightning.core.devices import is_gpu

MOVING = ("ema", "restart", "gated")
"""Teachers whose weights are saved. Other teachers have the weights of the student, or those of the start of the run.

Of an adapter every copy is saved.
"""


@dataclass(frozen=True)
class Saving:
    """A checkpoint of a run.

    Attributes:
        size: Bytes of its tensors, on all devices together.
        host: Bytes of host memory of the first process while the checkpoint is written as a stream. Tensors on a device are
            copied one after the other. Sharded weights are gathered first, unless every rank writes its own.
        disk: Peak bytes of the folder: the checkpoints that are kept and the one being written. None if all are kept.
    """

    size: int
    host: int
    disk: int | None


def saving(
    weights: int, teacher: int, state: int, largest: int, device: str, gathered: bool, keep: int | None
) -> Saving:
    """Return the size and the host memory of a checkpoint.

    Args:
        weights: Bytes of the student's weights, or of its adapter.
        teacher: Bytes of a moving teacher.
        state: Bytes of the optimizer's state.
        largest: Bytes of the largest tensor.
        device: cuda or cpu.
        gathered: Whether sharded weights are written as one file.
        keep: Number of checkpoints that are kept; None for all.
    """
    size = weights + teacher + state
    host = size if gathered else largest if is_gpu(device) else 0
    return Saving(size, host, None if keep is None else (keep + 1) * size)
