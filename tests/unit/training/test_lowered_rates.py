"""A lowered learning rate stays lowered under every schedule."""

import pytest
import torch

from pgpo_lightning.training.lowered_rates import lower_rates

SCHEDULES = {
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20),
    "one-cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=20),
    "warm-up": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=8),
            torch.optim.lr_scheduler.LambdaLR(o, lambda s: 0.8**s),
        ],
        milestones=[8],
    ),
}


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_lowered_rate_stays_lowered(name, tensor):
    def rates(lowered):
        start = torch.tensor(1.0) if tensor else 1.0
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=start)
        schedule, seen = SCHEDULES[name](optimizer), []
        for step in range(18):
            optimizer.step()
            schedule.step()
            if lowered and step == 4:
                lower_rates([optimizer], [schedule], 0.5)
            seen.append(float(optimizer.param_groups[0]["lr"]))
        return seen

    expected = [rate * (0.5 if step >= 4 else 1.0) for step, rate in enumerate(rates(False))]
    assert rates(True) == pytest.approx(expected, rel=1e-5)
