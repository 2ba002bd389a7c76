"""Weights in bf16 that move by less than a bf16 step: computed in fp32, and rounded stochastically."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from pgpo_lightning.core.seeding import random_bits
from pgpo_lightning.distributed.fsdp import first_row, local_tensor

SLICE = 2**22
"""Most weights that are in fp32 at the same time, unless a row has more."""

_LOW = 0xFFFF  # the bits of fp32 that bf16 does not have


def rounded(values: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 to one of the two neighbours in bf16, each with the probability that makes the mean exact.

    Adding a uniform number to the bits that bf16 does not have carries into the others with that probability. This is the
    stochastic rounding of torchao's optimizers (``torchao.optim.quant_utils``), with random bits of the caller's. What bf16
    represents exactly, infinities and NaN stay as they are.

    Args:
        values: fp32, of any shape.
        bits: int16, uniform, as many.

    Returns:
        bf16, of the shape of `values`.
    """
    carried = bits.to(torch.int32).bitwise_and_(_LOW).view(values.shape).add_(values.view(torch.int32))
    carried.bitwise_and_(~_LOW)
    # In a NaN the carry may reach the sign, and leave a zero.
    return torch.where(values.isnan(), values, carried.view(torch.float32)).to(torch.bfloat16)


def lerp_rounded_(start: Tensor, end: Tensor, weight: float, seed: int) -> None:
    """Move a bf16 tensor towards another one, in place: ``start <- rounded(lerp(start, end, weight))``, computed in fp32.

    It is computed on the device of `end`, a slice after the other, without waiting for it where `start` is there too. The random
    numbers belong to the seed and to the place of a weight in the whole tensor: shards get what the whole tensor would.

    Args:
        start: bf16, on any device; a whole tensor, or a shard of rows (``DTensor``), of which each rank moves its own.
        end: Of the same shape and sharding, of any floating dtype.
        weight: Of `end`.
        seed: Fresh for every move: the same numbers in every move would be as biased as rounding to nearest.
    """
    shape = start.shape
    place = first_row(start) * (shape.numel() // max(1, shape[0])) if isinstance(start, DTensor) else 0
    for own, new in _slices(local_tensor(start), local_tensor(end)):
        # Copied first and widened afterwards, because the device converts faster than the host.
        exact = own.to(new.device).to(torch.float32).lerp_(new.to(torch.float32), weight)
        own.copy_(rounded(exact, random_bits(seed, place, own.numel(), new.device)))
        place += own.numel()


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of a few rows of each tensor, of at most :data:`SLICE` elements if a row has no more."""
    tensors = tuple(torch.atleast_1d(tensor) for tensor in tensors)
    row = max(1, tensors[0][:1].numel())
    yield from zip(*(tensor.split(max(1, SLICE // row)) for tensor in tensors), strict=True)
