"""The weight of each batch under a multiplier of the update, against sums written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgpo_lightning.callbacks.batch_weights import KNOWN, batch_weights, lag, momentum_of

WEIGHT = torch.nn.Parameter(torch.zeros(2))


@given(
    rho=st.lists(st.floats(0, 10), min_size=1, max_size=40),
    momentum=st.floats(0, 0.99),
)
def test_it_is_the_sum_over_later_steps_by_the_share_that_is_known(rho, momentum):
    for batch, weight in enumerate(batch_weights(rho, momentum)):
        shares = [(1 - momentum) * momentum**i for i in range(len(rho) - batch)]
        expected = sum(share * value for share, value in zip(shares, rho[batch:], strict=True)) / sum(shares)
        assert weight == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_it_is_what_sgd_with_momentum_moves_by():
    """Gradients of one batch at a time: what a batch adds to the weights, over all later steps, by 1 / (1 - b) lr."""
    momentum, rho, steps = 0.8, [0.5, 2.0, 1.0, 3.0], 60
    for batch in range(len(rho)):
        weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.SGD([weight], lr=1.0, momentum=momentum)
        factors = rho + [1.0] * (steps - len(rho))
        for k, factor in enumerate(factors):
            weight.grad = torch.full_like(weight, float(k == batch))
            optimizer.param_groups[0]["lr"] = factor
            optimizer.step()
        assert -weight.item() * (1 - momentum) == pytest.approx(batch_weights(factors, momentum)[batch], abs=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_after_the_lag_the_weight_is_known(momentum):
    share = lambda steps: 1 - momentum**steps  # noqa: E731
    assert share(lag(momentum) + 1) >= KNOWN
    assert lag(momentum) == 0 or share(lag(momentum)) < KNOWN


@pytest.mark.parametrize(
    ("make", "momentum"),
    [
        (lambda p: torch.optim.SGD(p, lr=1.0), 0.0),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5), 0.5),
        (lambda p: torch.optim.AdamW(p, betas=(0.8, 0.99)), 0.8),
        (lambda p: torch.optim.Adagrad(p), 0.0),
    ],
)
def test_the_momentum_of_an_optimizer(make, momentum):
    assert momentum_of(make([WEIGHT])) == momentum
