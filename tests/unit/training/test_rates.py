"""Checks of the optimizer that was built, and of what a schedule makes of its rate."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from pgpo_lightning.training.rates import check_optimizer, check_rates
from tests.support.helpers import tiny_sdpo


def weights():
    return [torch.nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.0), r"`optimizer.lr` to lie in \(0, 10\], but got 0.0"),
        (lambda p: torch.optim.AdamW(p, lr=1e6), r"`optimizer.lr` to lie in \(0, 10\], but got 1000000.0"),
        (lambda p: torch.optim.SGD(p, lr=math.nan), r"`optimizer.lr` to lie in \(0, 10\], but got nan"),
        (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.0)), r"`optimizer.lr` to lie in \(0, 10\], but got 0.0"),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, maximize=True), "`optimizer.maximize` to be false"),
        (
            lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=math.inf),
            r"`optimizer.weight_decay` to lie in \[0, 10\]",
        ),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, eps=0.0), r"`optimizer.eps` to lie in \(0, 1\], but got 0.0"),
        (lambda p: torch.optim.AdamW(p, lr=1e-3, eps=math.inf), r"`optimizer.eps` to lie in \(0, 1\], but got inf"),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=1.5), r"`optimizer.momentum` to lie in \[0, 1\), but got 1.5"),
        (
            lambda p: torch.optim.AdamW([{"params": p, "lr": 1e-3}, {"params": weights(), "lr": 0.0}]),
            r"`optimizer.lr` to lie in \(0, 10\], but got 0.0",
        ),
    ],
)
def test_an_optimizer_that_cannot_learn_is_refused(make, message):
    optimizer = make(weights())
    with pytest.raises(ValueError, match=message):
        check_optimizer(optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-5, eps=1e-15),
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-5)),
        lambda p: torch.optim.SGD(p, lr=10.0, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
        lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.0, 0.9)),
        lambda p: torch.optim.RMSprop(p, lr=1e-3),
    ],
)
def test_others_pass(make):
    check_optimizer(make(weights()))


def test_betas_that_a_lax_optimizer_lets_through_are_refused():
    optimizer = torch.optim.Adam(weights(), lr=1e-3)
    optimizer.param_groups[0]["betas"] = (0.9, 1.0)
    with pytest.raises(ValueError, match=r"`optimizer.betas\[1\]` to lie in \[0, 1\), but got 1.0"):
        check_optimizer(optimizer)


@pytest.mark.parametrize("factor", [math.nan, -1.0, 1e9])
def test_a_schedule_that_leaves_the_range_is_refused(factor):
    optimizer = torch.optim.SGD(weights(), lr=0.1)
    schedule = LambdaLR(optimizer, lambda step: 0.0 if step == 0 else factor)
    check_rates(optimizer)  # a warm-up begins at 0
    optimizer.step()
    schedule.step()
    with pytest.raises(ValueError, match="`scheduler` to make learning rates from 0 to 10, but got"):
        check_rates(optimizer)


def test_settings_that_the_class_does_not_take_are_told_with_what_it_says():
    module = tiny_sdpo(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=None))
    with pytest.raises(ValueError, match="class of `optimizer` takes, but it says: '<=' not supported"):
        module.configure_optimizers()
    module = tiny_sdpo(optimizer=lambda p: torch.optim.AdamW(p, lr=-1.0))
    with pytest.raises(ValueError, match=r"class of `optimizer` takes, but it says: Invalid learning rate: -1.0"):
        module.configure_optimizers()


def test_a_module_checks_what_it_was_given():
    module = tiny_sdpo(optimizer=lambda p: torch.optim.AdamW(p, lr=1e6))
    with pytest.raises(ValueError, match=r"`optimizer\.lr`"):
        module.configure_optimizers()
    module = tiny_sdpo(scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: -1.0))
    with pytest.raises(ValueError, match="`scheduler`"):
        module.configure_optimizers()
