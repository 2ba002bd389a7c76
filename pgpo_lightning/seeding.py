"""Random numbers that depend on where a run is, not on how it got there.

Every random choice is a function of the run's seed and a name such as ("rollout", step, rank). A resumed run therefore draws
what the uninterrupted one would have drawn, and no generator state has to be saved.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*names: int | str) -> int:
    """Return a 63-bit seed for a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(*names: int | str) -> Iterator[random.Random]:
    """Seed Python, NumPy and torch (every device) for the enclosed code, and put their states back afterwards.

    Yields:
        A generator of its own for choices that must not depend on how many numbers others draw.
    """
    seed = derive_seed(*names)
    # Not Lightning's `isolate_rng`, which puts nothing back after an exception.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  (verifiers of users may draw from the global generator)
            torch.manual_seed(seed)
            yield random.Random(seed)
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
