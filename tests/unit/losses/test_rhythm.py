"""Factors of token advantages against numbers worked by hand, and against a loop over single responses."""

import pytest
import torch

from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.rhythm import exploration_bonus, rhythm_factors, rhythm_gate
from tests.support.rhythm import one_response

SETTINGS = {"strength": 0.7, "sensitivity": 1.3, "maximum": 2.5, "sharpness": 1.5, "gain": 0.8, "bound": 0.4}


def test_factors_are_those_of_every_response_alone():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 1, 8, 2])
    shape = (4, int(lengths.sum()))
    log_s, log_t, h_s, h_t = torch.rand(shape, generator=generator, dtype=torch.float64) * 2
    nothing = torch.zeros_like(log_s)
    tokens = TokenStatistics(nothing, log_s.requires_grad_(), log_t, h_s.requires_grad_(), h_t, nothing, nothing)
    found = rhythm_factors(tokens, lengths, **SETTINGS)
    assert not found.requires_grad
    expected = []
    parts = [values.detach().split(lengths.tolist()) for values in (log_s - log_t, h_s, h_t)]
    for response in zip(*parts, strict=True):
        expected += one_response(*(values.tolist() for values in response), **SETTINGS)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert len({round(value, 6) for value in expected}) > 6
    assert min(expected) == 1


def test_numbers_by_hand():
    lengths = torch.tensor([2])
    # The mean is 0.3: the first token is 0.2 above it, the second below.
    bonus = exploration_bonus(torch.tensor([0.5, 0.1]), lengths, 2.0, 1.4)
    torch.testing.assert_close(bonus, torch.tensor([0.4, 0.0]))  # e^0.4 = 1.49, bounded by 1.4
    # At the second token the teacher's entropy falls by 0.8, the student's by 0.2: D = (0.8 - 0.2) (0.8 - 0.2), D = 0 before.
    # Standardised D is -1 and 1, g = 0 and 2 (sigmoid(1) - 1/2) = 0.4621, m = 1 and 1.4621 over their mean 1.2311.
    gate = rhythm_gate(torch.tensor([1.0, 0.8]), torch.tensor([1.0, 0.2]), lengths, 1.0, 1.0, 0.5)
    torch.testing.assert_close(gate, torch.tensor([0.81231, 1.18769]), rtol=1e-4, atol=0)
    narrow = rhythm_gate(torch.tensor([1.0, 0.8]), torch.tensor([1.0, 0.2]), lengths, 1.0, 1.0, 0.1)
    torch.testing.assert_close(narrow, torch.tensor([0.9, 1.1]))


@pytest.mark.parametrize("off", [{"strength": 0.0}, {"sensitivity": 0.0}, {"maximum": 1.0}])
def test_without_strength_or_bonus_every_factor_is_one(off):
    values = torch.rand(4, 6, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(6)
    tokens = TokenStatistics(nothing, values[0], values[1], values[2], values[3], nothing, nothing)
    assert torch.equal(rhythm_factors(tokens, torch.tensor([4, 2]), **SETTINGS | off), torch.ones(6))


def test_a_response_of_equal_gaps_has_a_flat_gate():
    same = torch.full((3,), 0.7)
    assert torch.equal(rhythm_gate(same, same, torch.tensor([3]), 1.0, 1.0, 0.5), torch.ones(3))
