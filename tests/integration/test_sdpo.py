"""SDPO's training loop: on-policy rollouts, the step times rho, what is refused and what is reported."""

import math

import pytest
import torch

from pgpo_lightning.callbacks import ConstantMultiplier, InformationMultiplier
from pgpo_lightning.core.types import Question, Verdict
from pgpo_lightning.losses.information import information
from pgpo_lightning.modules import SDPO
from pgpo_lightning.training.learner import Learner
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    build,
    half_right,
    loader,
    questions,
    tiny_model,
    tiny_sdpo,
    trainer,
)


def fit(folder, callbacks=(), steps=3, model=None, **settings):
    module = build(SDPO, model or tiny_model(), settings.pop("verifier", half_right), tokenizer=TOKENIZER,
                  optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **({"num_generations": 4} | LIMITS | settings))  # fmt: skip
    t = trainer(folder, max_steps=steps, callbacks=list(callbacks))
    t.fit(module, loader(questions(2 * steps), 2))
    return module, t


def state(module):
    return [p.detach().clone() for p in module.model.parameters()]


def test_no_multiplier_and_a_constant_of_one_are_the_same_run_bit_for_bit(tmp_path):
    plain, _ = fit(tmp_path)
    one, _ = fit(tmp_path, [ConstantMultiplier(1.0)])
    other, _ = fit(tmp_path, [ConstantMultiplier(1.1)])
    assert all(torch.equal(a, b) for a, b in zip(state(plain), state(one), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(state(plain), state(other), strict=True))


def test_pgpo_takes_exactly_the_step_of_sdpo_times_rho(tmp_path):
    """One step on one seed: the same gradients, so the parameters move exp(sensitivity * I) times as far."""
    start = state(tiny_sdpo())
    plain, _ = fit(tmp_path, steps=1, model=tiny_model())
    pgpo, t = fit(
        tmp_path, [InformationMultiplier(sensitivity=30.0, rho_min=None, rho_max=50.0)], steps=1, model=tiny_model()
    )
    rho = math.exp(30.0 * information(pgpo.step_statistics).value)
    assert t.callback_metrics["rho"].item() == pytest.approx(rho, rel=1e-6)
    assert abs(rho - 1) > 0.02
    for a, b, s in zip(state(plain), state(pgpo), start, strict=True):
        torch.testing.assert_close(b - s, rho * (a - s), rtol=2e-3, atol=2e-7)


def test_rollouts_are_on_policy(tmp_path):
    """The sampler's and the trainer's log-probabilities agree at every step, so no sample is older than the weights."""
    ratios = []

    class Recording(SDPO):
        def on_train_batch_end(self, *_):
            ratios.append(self.step_statistics.sampler_log_ratio.abs().max().item())

    module = build(Recording, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4,
                       optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3), **LIMITS)  # fmt: skip
    trainer(tmp_path, max_steps=4).fit(module, loader(questions(8), 2))
    assert len(ratios) == 4
    assert max(ratios) < 1e-4


def test_feedback_per_attempt_reaches_the_teacher_of_that_attempt(tmp_path):
    def verifier(question, response):
        return Verdict(0.0, feedback=f"The final answer {len(response)} is wrong.")

    module, _ = fit(tmp_path, steps=1, verifier=verifier)
    assert len(module.last_samples) == 8
    for row in module.last_samples:
        assert f"earlier attempt:\n\nThe final answer {len(row.rollout.text)} is wrong.\n\nCorrectly" in row.reprompt
        assert module.encoder.text(row.reprompt_ids).count(f"answer {len(row.rollout.text)} is") == 1


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, _ = fit(tmp_path, model=tiny_model())
    checkpointed, _ = fit(tmp_path, model=tiny_model(), gradient_checkpointing=True)
    for a, b in zip(state(plain), state(checkpointed), strict=True):
        # Without checkpoints prompts are run once for several responses, which rounds otherwise; Adam magnifies it.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
        assert (a - b).abs().mean() < 1e-6


def test_one_rollout_per_question_needs_feedback(tmp_path):
    feedback = {"verifier": lambda question, response: (0.0, "Wrong."), "num_generations": 1}
    module, _ = fit(tmp_path, steps=1, **feedback)
    assert all(module.objective.in_loss(row) for row in module.last_samples)
    with pytest.warns(UserWarning, match="Step 1: no rollout is in the loss.* With `num_generations` 1") as caught:
        fit(tmp_path, steps=2, num_generations=1)
    assert len([w for w in caught if "no rollout is in the loss" in str(w.message)]) == 1


def test_gradients_do_not_stay_through_the_next_rollouts(tmp_path):
    held = []

    class Recording(SDPO):
        def sample(self, *args):
            held.append(sum(p.grad is not None for p in self.model.parameters()))
            return super().sample(*args)

    module = build(Recording, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, **LIMITS)
    trainer(tmp_path, max_steps=2).fit(module, loader(questions(4), 2))
    assert held == [0, 0]


def test_questions_that_cannot_be_told_apart_are_refused(tmp_path):
    module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, **LIMITS)
    same = [Question("1+1?", "2"), Question("1+2?", "3")]
    with pytest.raises(ValueError, match="questions with different `index`"):
        trainer(tmp_path, max_steps=1).fit(module, loader(same, 2))


def test_the_information_that_rho_was_made_from_is_reported(tmp_path):
    multiplier = InformationMultiplier(sensitivity=0.01, rho_min=None, estimator="kl", aggregation="sequence-sum")
    module, t = fit(tmp_path, [multiplier], steps=1)
    used = information(module.step_statistics, "kl", "sequence-sum")
    assert t.callback_metrics["information/used"].item() == pytest.approx(used.value, rel=1e-5)
    assert t.callback_metrics["I"].item() == pytest.approx(used.value, rel=1e-5)
    assert t.callback_metrics["lr/multiplier"].item() == pytest.approx(math.exp(0.01 * used.value), rel=1e-6)
    assert abs(used.value - information(module.step_statistics).value) > 1e-3


@pytest.mark.parametrize(
    ("kind", "rereads"), [("ema", False), ("frozen", False), ("live", True), ("trust-region", True)]
)
def test_a_teacher_that_stands_still_is_run_in_the_first_pass_over_a_batch_only(tmp_path, monkeypatch, kind, rereads):
    def run(again):
        sizes = []
        sources = Learner.teacher_sources
        teacher = type(tiny_sdpo(teacher_regularization=kind).teacher)
        counted = teacher.sources
        monkeypatch.setattr(teacher, "sources", lambda *a: sizes.append(1) or counted(*a))
        if again:  # as if every pass were the first
            monkeypatch.setattr(Learner, "teacher_sources", lambda self, rows: [forget(rows), sources(self, rows)][1])
        fitted, t = fit(tmp_path, model=tiny_model(), teacher_regularization=kind, num_iterations=3, steps=3)
        monkeypatch.undo()
        assert (t.global_step, fitted.steps) == (3, 1)
        assert all(row.teacher_hidden is None for row in fitted.last_samples)
        return len(sizes), state(fitted)

    def forget(rows):
        for row in rows:
            row.teacher_hidden = None

    (once, weights), (always, expected) = run(again=False), run(again=True)
    assert always == 3 * once if not rereads else always == once
    for a, b in zip(weights, expected, strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(weights, tiny_model().parameters(), strict=False))
