"""Stochastic rounding to bf16: unbiased, exact where it can be, and the same in every slice and shard."""

import math

import pytest
import torch

from pgpo_lightning.core.seeding import derive_seed, random_bits
from pgpo_lightning.models import rounding
from pgpo_lightning.models.rounding import lerp_rounded_, rounded

CPU = torch.device("cpu")


def bits(n, seed=0):
    return random_bits(derive_seed("test", seed), 0, n, CPU)


@pytest.mark.parametrize("value", [1.003, -1.003, 0.0123456, -3e38 / 7, 1e-40, -1e-39, math.pi * 1e-20])
def test_its_mean_is_the_value_and_its_spread_is_that_of_two_neighbours(value):
    n = 400_000
    exact = torch.full((n,), value)
    got = rounded(exact, bits(n))
    assert got.dtype == torch.bfloat16
    low, high = got.double().min().item(), got.double().max().item()
    inside = exact[0].double().item()
    assert low < inside < high
    assert len(got.unique()) == 2
    up = (inside - low) / (high - low)
    expected_error = (high - low) * math.sqrt(up * (1 - up) / n)
    assert abs(got.double().mean().item() - inside) < 4 * expected_error
    nearest = abs(exact[0].bfloat16().double().item() - inside)
    assert nearest > 20 * expected_error  # so rounding to nearest would not pass


def test_the_mean_over_seeds_is_that_of_every_weight():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    seeds = 400
    got = torch.stack([rounded(values, bits(1000, seed)) for seed in range(seeds)]).double()
    steps = (values.abs().log2().floor() - 7).exp2().double()  # of bf16 at the value
    sizes = (got.mean(0) - values.double()) / (steps / 2 / seeds**0.5)  # in standard errors, or fewer
    assert sizes.abs().max() < 5
    assert abs(sizes.mean()) < 4 / 1000**0.5


def test_what_bf16_represents_stays():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    numbers = patterns[~patterns.isnan()]
    assert numbers.isinf().sum() == 2
    for seed in range(3):
        assert torch.equal(
            rounded(numbers.float(), bits(len(numbers), seed)).view(torch.int16), numbers.view(torch.int16)
        )


def test_nan_stays_nan_with_every_bit_pattern():
    low = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF], dtype=torch.int32)
    patterns = torch.cat([low, low | -(2**31)]).repeat(5000)
    values = patterns.view(torch.float32)
    assert values.isnan().all()
    assert rounded(values, bits(len(values))).isnan().all()


def test_bits_are_uniform_and_their_places_independent_of_the_part_that_is_drawn():
    seed = derive_seed("bits")
    whole = random_bits(seed, 0, 200_000, CPU)
    counts = torch.histc(whole.float(), 64, -(2**15), 2**15)
    assert ((counts - 3125) ** 2 / 3125).sum() < 124  # chi-square with 63 degrees of freedom: above it once in 100,000
    centred = (whole.double() + 0.5) / 2**15 * 3**0.5
    for shift in (1, 2, 3, 4, 128):
        assert abs((centred * centred.roll(shift)).mean()) < 4 / 200_000**0.5
    for first, n in ((0, 1), (1, 2), (3, 6), (4, 4), (999, 1001), (5, 0)):
        assert torch.equal(random_bits(seed, first, n, CPU), whole[first : first + n])
    assert (random_bits(seed + 1, 0, 200_000, CPU) == whole).double().mean() < 1e-3


@pytest.mark.parametrize("shape", [(), (1,), (7,), (13, 5), (4, 3, 6), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_move_is_that_of_the_whole_tensor_in_slices_of_any_size(monkeypatch, shape, dtype):
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator).bfloat16()
    end = torch.randn(shape, generator=generator).to(dtype)
    exact = torch.lerp(start.float(), end.float(), 0.3)
    expected = rounded(exact, random_bits(7, 0, start.numel(), CPU))
    for size in (1, 5, 11, 2**22):
        monkeypatch.setattr(rounding, "SLICE", size)
        moved = start.clone()
        lerp_rounded_(moved, end, 0.3, 7)
        assert torch.equal(moved, expected), size


def test_a_transposed_weight_is_moved_in_place_with_the_numbers_of_its_places():
    start, end = torch.randn(9, 4).bfloat16(), torch.randn(9, 4)
    expected = start.clone()
    lerp_rounded_(expected, end, 0.3, 7)
    other = start.T.contiguous().T
    assert not other.is_contiguous()
    lerp_rounded_(other, end, 0.3, 7)
    assert torch.equal(other, expected)
