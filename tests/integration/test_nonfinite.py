"""A loss or gradient that is not finite: the step is skipped and counted, and too many in a row end the run."""

import pytest
import torch

from pgpo_lightning.callbacks import ConstantMultiplier
from pgpo_lightning.modules import SDPO
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, questions, tiny_model, trainer


class Poisoned(SDPO):
    """Some steps' losses are not numbers."""

    def configure_model(self):
        super().configure_model()
        self.states = []
        sound = type(self.objective).token_loss
        self.objective.token_loss = lambda tokens, given: self.spoil(sound(self.objective, tokens, given))

    def spoil(self, loss):
        return loss * torch.nan if self.steps in self.poisoned else loss

    def on_train_batch_end(self, *_):
        self.states.append(
            (
                [p.detach().clone() for p in self.model.parameters()],
                [p.detach().clone() for p in self.teacher.parameters()],
                self.optimizers().param_groups[0]["lr"],
            )
        )


def fit(folder, poisoned, max_skipped_steps=5, steps=4):
    module = build(
        Poisoned,
        tiny_model(),
        half_right,
        tokenizer=TOKENIZER,
        num_generations=4,
        max_skipped_steps=max_skipped_steps,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        **LIMITS,
    )
    module.poisoned = poisoned
    t = trainer(folder, max_steps=steps, max_epochs=1, callbacks=[ConstantMultiplier(1.5)])
    t.fit(module, loader(questions(12), 2))
    return module, t


def test_a_poisoned_step_changes_nothing_but_the_counters(tmp_path):
    module, t = fit(tmp_path, {1})
    before, skipped, after = module.states[0], module.states[1], module.states[2]
    for kind in (0, 1):  # student, teacher
        assert all(torch.equal(a, b) for a, b in zip(before[kind], skipped[kind], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(skipped[kind], after[kind], strict=True))
    assert module.learner.skipped == 1
    assert module.learner.skipped_in_a_row == 0
    assert t.global_step == 4
    assert module.steps == 5
    # The schedule goes by batches; the multiplier of no step is left in the rate.
    assert [rate for *_, rate in module.states] == [1e-3 * 0.5**k for k in range(1, 6)]
    assert all(p.isfinite().all() for p in module.model.parameters())


def test_too_many_in_a_row_end_the_run(tmp_path):
    with pytest.raises(RuntimeError, match=r"3 optimizer steps in a row had none .* The last checkpoint is good"):
        fit(tmp_path, {1, 2, 3}, max_skipped_steps=2)


def test_as_many_as_allowed_do_not(tmp_path):
    module, _ = fit(tmp_path, {1, 2, 4}, max_skipped_steps=2, steps=3)
    assert module.learner.skipped == 3


def test_a_gradient_that_overflows_is_skipped_too(tmp_path):
    class Exploding(Poisoned):
        def spoil(self, loss):
            if self.steps in self.poisoned and loss.requires_grad:
                loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss

    module = build(Exploding, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, **LIMITS)
    module.poisoned = {0}
    trainer(tmp_path, max_steps=1, max_epochs=1).fit(module, loader(questions(8), 2))
    assert module.learner.skipped == 1
    assert all(p.isfinite().all() for p in module.model.parameters())
