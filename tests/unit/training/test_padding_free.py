"""Losses and gradients without padding are those of padded sequences, for student and teacher, whatever the loss."""

import pytest
import torch

from pgpo_lightning.modules import GRPO, SDPO
from pgpo_lightning.training.configs import UpdateConfig
from tests.support.helpers import GRPO_LIMITS, LIMITS, TOKENIZER, build, half_right, random_rows, tiny_model


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (SDPO, {}),
        (SDPO, {"distillation_topk": 5, "alpha": 1.0}),
        (SDPO, {"gradient_checkpointing": True}),
        (SDPO, {"teacher_regularization": "live"}),
        (GRPO, {}),
    ],
    ids=["jsd", "top-k", "checkpointing", "live", "grpo"],
)
def test_it_changes_neither_loss_nor_gradient(cls, settings):
    found = []
    limits = LIMITS if cls is SDPO else GRPO_LIMITS
    for free in (False, True):
        update = UpdateConfig(padding_free=free, micro_batch_tokens=90)
        module = build(cls, tiny_model(), half_right, tokenizer=TOKENIZER, update=update, **limits | settings)
        module.configure_model()
        rows = random_rows(8, longest=20)
        for i, row in enumerate(rows):
            row.advantage = 0.5 if i % 2 else -0.5
        step = module.learner.accumulate(rows)
        found.append(
            [torch.tensor(step.loss), step.statistics.table().sum(0), *(p.grad for p in module.model.parameters())]
        )
        assert all(packing.padding_free == free for packing in module.learner.packings)
    for padded, concatenated in zip(*found, strict=True):
        torch.testing.assert_close(concatenated, padded, rtol=1e-4, atol=1e-6, equal_nan=True)  # without a teacher
    assert float(found[0][0]) != 0
