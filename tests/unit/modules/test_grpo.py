"""GRPO's formulas."""

import pytest
import torch

from pgpo_lightning.losses.policy_gradient import clipped_policy_loss, group_advantages
from pgpo_lightning.modules import GRPO
from tests.support.helpers import GRPO_LIMITS, TOKENIZER, build, half_right, tiny_model


def test_group_advantages():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(group_advantages(rewards, False)[0], torch.tensor([0.75, -0.25, -0.25, -0.25]))
    torch.testing.assert_close(
        group_advantages(rewards, True)[0], torch.tensor([1.5, -0.5, -0.5, -0.5]), rtol=1e-5, atol=0
    )
    assert (group_advantages(rewards, True)[1] == 0).all()
    # The mean of seven times 0.1 is not 0.1 in fp32, and dividing by a standard deviation of nothing would blow it up.
    assert (group_advantages(torch.full((1, 7), 0.1), True) == 0).all()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.0),  # inside the clip range above
        (1.5, 2.0, -2.56, 0.0),  # beyond it: 1.28, no gradient
        (0.5, 2.0, -1.0, -2.0),  # moving away from a good response is not clipped
        (0.5, -2.0, 1.6, 0.0),  # beyond the range below: 0.8
        (1.5, -2.0, 3.0, 2.0),
        (5.0, -2.0, 6.0, 0.0),  # dual clip at 3
    ],
)
def test_clipped_loss_and_gradient(ratio, advantage, loss, slope):
    log_p = torch.tensor([ratio]).log().requires_grad_()
    value = clipped_policy_loss(log_p, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.28, 3.0)
    assert value.item() == pytest.approx(loss, rel=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), log_p)
    assert gradient.item() == pytest.approx(slope * ratio, rel=1e-5)


def test_without_dual_clip_the_loss_grows():
    value = clipped_policy_loss(torch.tensor([5.0]).log(), torch.zeros(1), torch.tensor([-2.0]), 0.2, 0.28, None)
    assert value.item() == pytest.approx(10.0, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "`num_generations` of at least 2"),
        ({"clip_ratio_low": -0.1}, r"`policy_gradient.clip_ratio_low` to lie in \[0, 1\]"),
        ({"clip_ratio_low": 1.5}, r"`policy_gradient.clip_ratio_low` to lie in \[0, 1\]"),
        ({"clip_ratio_c": 1.1}, "`policy_gradient.clip_ratio_c` to exceed"),
        ({"updates_per_batch": 0}, "`update.updates_per_batch` to be at least 1"),
    ],
)
def test_bad_settings_name_the_field(settings, message):
    with pytest.raises(ValueError, match=message):
        build(GRPO, tiny_model(), half_right, tokenizer=TOKENIZER, **(GRPO_LIMITS | settings))
