"""The order of the training questions: a function of (seed, epoch), so that one number is the position in it."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data.distributed import DistributedSampler


# A DistributedSampler, because Lightning replaces every other sampler when it trains on several devices.
class ResumableSampler(DistributedSampler[int]):
    """Shuffled, sharded order of questions that resumes exactly at the position of a checkpoint.

    The order of epoch ``e`` is a permutation that depends on ``(seed, e)`` only. One step takes the next
    ``batch_size * world_size`` questions of it, of which rank ``r`` gets the ``r``-th slice of ``batch_size``, so the
    questions of a step do not depend on how many devices share them. An incomplete last batch is dropped.

    Every iterator yields ``len(self)`` indices from the present position on, and crosses into the next permutation
    where the present one ends. A loop that stops earlier (``limit_train_batches``, or the rest of an epoch after a
    resume) therefore just leaves the remaining questions to its next epoch.

    Args:
        size: Number of questions.
        batch_size: Questions per process and step.
        seed: Seed of the permutations.
        rank: Number of this process.
        world_size: Number of processes.
        consumed: Questions that this rank has handed out since the start of training, over all epochs.

    Raises:
        ValueError: If ``size`` is less than one step needs.

    Example:
        >>> sampler = ResumableSampler(size=7, batch_size=2)
        >>> first = list(sampler)
        >>> len(first), sampler.consumed
        (6, 6)
        >>> resumed = ResumableSampler(size=7, batch_size=2, consumed=4)
        >>> list(resumed)[:2] == first[4:]
        True
    """

    def __init__(
        self, size: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, consumed: int = 0
    ) -> None:
        if size < batch_size * world_size:
            raise ValueError(
                f"Expected at least one batch of questions, {batch_size * world_size} (batch_size {batch_size} x "
                f"{world_size} processes), but got {size}."
            )
        dataset: Any = range(size)  # only its length is used
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed, drop_last=True)
        self.size = size
        self.batch_size = batch_size
        self.consumed = consumed

    @property
    def per_epoch(self) -> int:
        """Questions that this rank sees in one epoch."""
        return self.size // (self.batch_size * self.num_replicas) * self.batch_size

    def order(self, epoch: int) -> list[int]:
        """Return this rank's question indices of one epoch."""
        # (seed 0, epoch 1) and (seed 1, epoch 0) must differ, so not `seed + epoch`. Python guarantees the same draw in all
        # versions.
        generator = torch.Generator().manual_seed(random.Random(f"{self.seed} {epoch}").getrandbits(63))
        steps = self.per_epoch // self.batch_size
        permutation = torch.randperm(self.size, generator=generator)[: steps * self.batch_size * self.num_replicas]
        return permutation.view(steps, self.num_replicas, self.batch_size)[:, self.rank].flatten().tolist()

    def __iter__(self) -> Iterator[int]:
        # The position is read with the first index, because Lightning creates the iterator earlier.
        order, current = [], None
        for _ in range(self.per_epoch):
            epoch, offset = divmod(self.consumed, self.per_epoch)
            if epoch != current:
                order, current = self.order(epoch), epoch
            self.consumed += 1  # before the yield, so that a checkpoint during the step counts its questions as used
            yield order[offset]

    def __len__(self) -> int:
        return self.per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the epoch follows from ``consumed``. Lightning calls this before every epoch."""
