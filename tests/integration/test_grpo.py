"""GRPO's step, with one update and with several on one batch."""

import pytest
import torch

from pgpo_lightning.modules import GRPO
from tests.support.helpers import GRPO_LIMITS, TOKENIZER, build, half_right, loader, questions, tiny_model, trainer


def fit(folder, steps=2, **settings):
    module = build(GRPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4,
                  **({"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2)} | GRPO_LIMITS | settings))  # fmt: skip
    t = trainer(folder, max_steps=steps)
    t.fit(module, loader(questions(8), 4))
    return module, t


def test_one_update_is_reinforce_with_the_group_mean_as_baseline(tmp_path):
    """Ratio 1, clipping inert: the gradient of -1/B sum_i A_i 1/L_i sum_t log p."""
    module, _ = fit(tmp_path, steps=1, max_grad_norm=None)
    start = tiny_model()
    loss = 0.0
    for row in module.last_samples:
        prompt, y = row.rollout.prompt_ids, row.rollout.response_ids
        log_p = start(torch.tensor([[*prompt, *y]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        loss = loss - row.advantage * log_p[torch.arange(len(y)), torch.tensor(y)].mean() / len(module.last_samples)
    loss.backward()
    assert {row.advantage for row in module.last_samples} - {0.0}
    for before, after in zip(start.parameters(), module.model.parameters(), strict=True):
        torch.testing.assert_close(after - before, -1e-2 * before.grad, rtol=1e-3, atol=1e-7)


def test_several_updates_use_the_policy_that_sampled_as_reference(tmp_path):
    """Two shares of a batch: on the second the ratio is no longer 1, because the weights have moved."""
    ratios = []

    class Recording(GRPO):
        def configure_model(self):
            super().configure_model()
            clipped = self.objective.token_loss

            def recorded(tokens, given):
                ratios.append((tokens.log_p_student - given.old_log_probs(tokens)).abs().max().item())
                return clipped(tokens, given)

            self.objective.token_loss = recorded

    module = build(Recording, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, updates_per_batch=2,
                       optimizer=lambda p: torch.optim.SGD(p, lr=0.5), **GRPO_LIMITS)  # fmt: skip
    t = trainer(tmp_path, max_steps=2)
    t.fit(module, loader(questions(4), 4))
    assert t.global_step == 2
    assert module.steps == 1
    assert ratios[0] < 1e-5
    assert ratios[-1] > 1e-3
    assert all((row.old_log_probs is not None) == (row.advantage != 0) for row in module.last_samples)


def test_rows_without_advantage_cost_no_forward_pass(tmp_path):
    module, _ = fit(tmp_path, steps=1)
    informative = sum(row.advantage != 0 for row in module.last_samples)
    assert len(module.step_statistics) == informative
    assert 0 < informative <= len(module.last_samples)


def test_more_updates_than_questions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="one question for each of 8 updates, but the batch has 4"):
        fit(tmp_path, updates_per_batch=8)
