"""Random numbers that depend on the seed and the position in a run only.

Every random choice is a function of the run's seed and a name such as ("rollout", step, rank). A resumed run therefore draws the
same numbers as an uninterrupted one, and no generator state is saved.
"""

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_GLOBAL_SEED = "PL_GLOBAL_SEED"
_GAMMA, _MIX, _MIX_AGAIN = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's constants


def global_seed() -> int:
    """Return the last seed of ``lightning.seed_everything``, in this process or the one that started it, else 0.

    Raises:
        ValueError: If ``PL_GLOBAL_SEED``, where Lightning stores the seed, is not a whole number.
    """
    text = os.environ.get(_GLOBAL_SEED, "0")
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"Expected a whole number in the variable {_GLOBAL_SEED}, but got {text!r}. Unset it."
        ) from None


def has_global_seed() -> bool:
    """Whether ``lightning.seed_everything`` was called."""
    return _GLOBAL_SEED in os.environ


def derive_seed(*names: int | str) -> int:
    """Return a 63-bit seed for a name, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "big") >> 1


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the generators of Python, NumPy and torch (every device) after the enclosed code."""
    # Not Lightning's `isolate_rng`, which does not restore them after an exception.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def seeded(*names: int | str) -> Iterator[random.Random]:
    """Seed Python, NumPy and torch (every device) for the enclosed code, and restore their states afterwards.

    Yields:
        A separate generator, for choices that must not depend on how many numbers other code draws.
    """
    seed = derive_seed(*names)
    with generators_kept():
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002  (verifiers of users may draw from the global generator)
        torch.manual_seed(seed)
        yield random.Random(seed)


def uniform(seeds: Tensor, step: int | Tensor) -> Tensor:
    """Return one random number in [0, 1) per seed: a function of (seed, step) alone, bit-identical on every device.

    SplitMix64 is counter-based: its n-th number does not need the earlier ones. 24 bits, like ``torch.rand`` in fp32.

    Args:
        seeds: int64, from :func:`derive_seed`; similar seeds would give overlapping streams.
        step: Position in each stream, from 0 on; one for all, or int64 of the shape of `seeds`.

    Returns:
        fp32, of the shape of `seeds`.
    """
    # int64 wraps around, which is the arithmetic modulo 2^64 that is wanted.
    state = seeds + (_signed(_GAMMA * (step + 1)) if isinstance(step, int) else (step + 1) * _signed(_GAMMA))
    return _shifted(_mixed(state), 40).to(torch.float32) / 2**24


def random_bits(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return 16 random bits for each of some positions: a function of (seed, position) alone, bit-identical on every device.

    Four positions share a number of SplitMix64. Whoever holds a part of a tensor can draw the numbers of that part.

    Args:
        seed: From :func:`derive_seed`.
        first: The first position.
        count: Number of positions, n.
        device: Where they are needed. The host does not wait for it.

    Returns:
        int16, ``(n,)``: uniform over all its 65,536 values.
    """
    start = first // 4
    numbers = torch.arange(start + 1, -(-(first + count) // 4) + 1, dtype=torch.int64, device=device)
    numbers.mul_(_signed(_GAMMA)).add_(seed)
    return _mixed(numbers).view(torch.int16)[first - 4 * start :][:count]


def _mixed(state: Tensor) -> Tensor:
    """Return the numbers of SplitMix64 for its states."""
    state = (state ^ _shifted(state, 30)) * _signed(_MIX)
    state = (state ^ _shifted(state, 27)) * _signed(_MIX_AGAIN)
    return state ^ _shifted(state, 31)


def _signed(number: int) -> int:
    """Return the int64 with the lowest 64 bits of a number."""
    return (number + 2**63) % 2**64 - 2**63


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift right as an unsigned number."""
    return (state >> bits) & (2 ** (64 - bits) - 1)
