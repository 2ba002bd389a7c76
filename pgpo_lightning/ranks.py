"""The one place where ranks exchange what they saw."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather(mine: T) -> list[T]:
    """Return every rank's object, in the order of ranks; ``[mine]`` in a single process.

    Takes whatever sizes the ranks happen to have, which a tensor collective does not.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    everyone: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
