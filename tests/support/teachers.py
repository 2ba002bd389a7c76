"""Teachers of the tiny model."""

import torch

from tests.support.helpers import random_rows


def weights(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def outcome(module, reward, lengths=(10, 10)):
    """Show the teacher a step of some responses with that reward, and take the step."""
    rows = random_rows(len(lengths))
    for row, length in zip(rows, lengths, strict=True):
        row.rollout.response_ids = [7] * length
        row.verdict.reward = reward
    module.teacher.observe(rows)
    generator = torch.Generator().manual_seed(round(100 * reward))
    with torch.no_grad():
        for p in module.model.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn(p.shape, generator=generator))
    module.learner.move_teacher()


GATE = {"min_steps": 3, "window": 2, "reward_gain": 0.1, "max_length_ratio": 2.0, "check_every": 1}
