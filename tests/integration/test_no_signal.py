"""Steps in which no rollout is in the loss: left out, counted and explained."""

import functools
import itertools
import warnings

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import (
    ConstantMultiplier,
    InformationMultiplier,
    MatchedConstantMultiplier,
    RandomMultiplier,
    ReplayedMultiplier,
)
from pgpo_lightning.modules import CEPO, DRIFT, GRPO, HAPO, RLSD, SDPO, SRPO
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.monitoring.summary import before_after, summarise
from pgpo_lightning.training.no_signal import Outcomes, explain
from tests.support.helpers import LIMITS, TOKENIZER, build, loader, questions, tiny_model, trainer
from tests.support.runs import assert_same


class Watched:
    """Counts passes of the update, and remembers the state after every batch."""

    def configure_model(self):
        super().configure_model()
        self.passes_made = 0
        self.states = []
        for name in ("_micro_batch", "_log_probs"):
            setattr(self.learner, name, functools.partial(self.counted, getattr(type(self.learner), name)))

    def counted(self, passes, *args):
        self.passes_made += 1
        return passes(self.learner, *args)

    def on_train_batch_end(self, *_):
        weights = [p.detach().clone() for p in self.model.parameters()]
        teacher = [] if self.teacher is None else [p.detach().clone() for p in self.teacher.parameters()]
        moments = [v.clone() for s in self.optimizers().state.values() for v in s.values()]
        self.states.append((weights, teacher, moments))
        self.reports = [*getattr(self, "reports", []), dict(self.trainer.callback_metrics)]


def made(base, empty, updates=1, **settings):
    """A module whose rollouts all fail in the updates (counted over batches) of `empty`; else every second one succeeds."""
    turn = itertools.cycle((0.0, 1.0))

    def verifier(question, response):
        share = question.index % 2 if updates == 2 else 0
        value = next(turn)
        return 0.0 if module.steps * updates + share in empty else value

    limits = {
        name: value
        for name, value in LIMITS.items()
        if name != "max_reprompt_len" or issubclass(base, SDPO | SRPO | RLSD | CEPO | DRIFT)
    }
    module = build(type(f"Watched{base.__name__}", (Watched, base), {}),
        tiny_model(), verifier, tokenizer=TOKENIZER, num_generations=4, updates_per_batch=updates,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), **limits | settings,
    )  # fmt: skip
    return module


def fit(folder, module, steps=4, checkpoint=None, **settings):
    t = trainer(folder, max_steps=steps, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Step .*: no rollout is in the loss")
        t.fit(module, loader(questions(2) * max(8, steps), 2), ckpt_path=checkpoint)  # the same batch again and again
    return t


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("base", [SDPO, GRPO, SRPO, RLSD, CEPO])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_batch_without_signal_moves_nothing_and_costs_no_pass(tmp_path, base, iterations):
    multiplier = ConstantMultiplier(1.5)
    module = made(base, {2}, num_iterations=iterations)
    t = fit(tmp_path, module, 4 * iterations, callbacks=[multiplier])
    assert module.steps == 4
    assert t.global_step == 4 * iterations  # `max_steps` counts what was left out
    assert module.steps_without_signal == iterations
    assert multiplier.history == [1.5] * 3 * iterations
    before, without, after = module.states[1:]
    for kind in range(3 if module.teacher is not None else 1):  # student, teacher, moments
        assert equal(before[kind], without[kind])
    assert not equal(without[0], after[0])
    told = module.reports[2]
    assert (told["actor/grad_norm"], told["actor/pg_loss"]) == (0.0, 0.0)
    assert told["lr/base"] == 1e-2 * 0.5**2
    assert [r["actor/steps_without_signal"] for r in module.reports] == [0, 0, iterations, iterations]
    assert t.optimizers[0].param_groups[0]["lr"] == 1e-2 * 0.5**4  # the schedule goes by batches
    only = made(base, {0}, num_iterations=iterations)
    fit(tmp_path, only, iterations)
    assert only.passes_made == 0


def test_a_run_without_any_signal_ends_and_changes_nothing(tmp_path):
    module = made(SDPO, set(range(30)))
    start = [p.detach().clone() for p in module.student.given.parameters()]
    t = fit(tmp_path, module, 12, callbacks=[InformationMultiplier()])
    assert (module.steps, t.global_step, module.steps_without_signal) == (12, 12, 12)
    assert equal(start, list(module.model.parameters()))
    assert not t.optimizers[0].state


def test_one_of_two_updates_without_signal_is_left_out_alone(tmp_path):
    """The first update of the second batch has none: the second starts from where the first batch ended."""
    module = made(SDPO, {2}, updates=2)
    t = fit(tmp_path, module, 6)
    assert (module.steps, t.global_step, module.steps_without_signal) == (3, 6, 1)
    assert not equal(module.states[0][0], module.states[1][0])
    assert not equal(module.states[0][1], module.states[1][1])  # the teacher follows
    step = t.optimizers[0].state[next(module.model.parameters())]["step"]
    assert step == 5


def test_resume_is_exact(tmp_path):
    empty = {1, 2, 4}
    uninterrupted = made(GRPO, empty)
    t = fit(tmp_path, uninterrupted, 6, callbacks=[RandomMultiplier(0.5, 1.5)])
    for cut in (2, 3, 5):
        first = made(GRPO, empty)
        u = fit(tmp_path, first, cut, callbacks=[RandomMultiplier(0.5, 1.5)])
        u.save_checkpoint(tmp_path / "cut.ckpt")
        second = made(GRPO, empty)
        u = fit(tmp_path, second, 6, tmp_path / "cut.ckpt", callbacks=[RandomMultiplier(0.5, 1.5)])
        assert (second.steps, second.steps_without_signal, u.global_step) == (6, 3, 6)
        assert_same(second.state_dict(), uninterrupted.state_dict())
        assert_same(u.optimizers[0].state_dict(), t.optimizers[0].state_dict())
        assert u.callbacks[0].history == t.callbacks[0].history
        assert len(t.callbacks[0].history) == 3


def test_it_is_told_at_the_first_such_step_and_every_tenth(tmp_path):
    module = made(SDPO, set(range(3, 50)))
    with pytest.warns(UserWarning, match="no rollout is in the loss") as caught:
        trainer(tmp_path, max_steps=25).fit(module, loader(questions(50), 2))
    told = [str(w.message) for w in caught if "no rollout is in the loss" in str(w.message)]
    assert [text.split(":")[0] for text in told] == ["Step 4", "Step 13", "Step 23"]
    assert "so no optimizer step was taken (10 so far). 0 of 8 rollouts were right (rewards 0 to 0)" in told[1]
    assert told[0].endswith("`pgpo probe` measures before training how much the teacher's context helps.")


def outcomes(rewards, cut=0, taught=0, feedback=0, size=2):
    n = len(rewards)
    return Outcomes(
        [i // size for i in range(n)], rewards, [i < cut for i in range(n)], [i < taught for i in range(n)],
        [i < feedback for i in range(n)],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("seen", "siblings", "has_teacher", "said", "unsaid"),
    [
        (outcomes([0.0] * 4, cut=4), 2, True, "All were cut off before they could end: raise `max_resp", "easier"),
        (outcomes([0.0] * 4, cut=3), 2, True, "more lenient grader, raise `max_response_length`. Or give", "All were"),
        (outcomes([0.0] * 4), 2, True, "more lenient grader. Or give feedback", "raise"),
        (outcomes([0.0] * 4), 2, False, "more lenient grader.", "feedback"),
        (outcomes([0.2] * 4, feedback=4), 2, True, "None was right", "Or give feedback"),
        (outcomes([1.0] * 4), 2, False, "All were right: nothing is left to learn", "raise"),
        (outcomes([1.0, 1.0, 0.0, 0.0]), 2, False, "the same reward, so that none is better than its siblings", "lenient"),
        (outcomes([0.0, 1.0], size=1), 1, True, "With `num_generations` 1 no rollout has a sibling", "lenient"),
        (outcomes([0.0, 1.0, 0.0, 0.0]), 2, True, "Some were right, but no other rollout was shown them", "lenient"),
        (outcomes([0.0, 1.0, 0.0, 0.0], taught=1), 2, True, "All weights or advantages were zero", "lenient"),
    ],
)  # fmt: skip
def test_the_cause_follows_from_the_numbers(seen, siblings, has_teacher, said, unsaid):
    text = explain(seen, 0.5, 64, siblings, has_teacher)
    assert f"{sum(r >= 0.5 for r in seen.reward)} of {len(seen.reward)} rollouts were right" in text
    assert f"{sum(seen.cut_off)} were cut off at `max_response_length` (64 tokens)" in text
    assert said in text
    assert unsaid not in text.split("tokens)", 1)[1]
    assert ("`pgpo probe`" in text) == has_teacher


@pytest.mark.parametrize("feedback", [0, 4])
def test_feedback_that_no_teacher_is_shown_is_named(feedback):
    text = explain(outcomes([0.0] * 4, feedback=feedback), 0.5, 64, 2, True, shows_feedback=False)
    assert "set `reprompt.include_environment_feedback` to true" in text
    assert ("the feedback that there is" in text) == bool(feedback)


def test_a_step_without_signal_names_the_feedback_that_is_left_out(tmp_path):
    module = build(SDPO,
        tiny_model(), lambda question, response: (0.0, "No."), tokenizer=TOKENIZER, num_generations=2,
        include_environment_feedback=False, **LIMITS,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="4 had feedback.*set `reprompt.include_environment_feedback` to true"):
        trainer(tmp_path, max_steps=1).fit(module, loader(questions(2)))


def test_demonstrations_of_hapo_are_a_signal(tmp_path):
    """All rollouts fail, but a demonstration stands in for one of them: there is something to learn from."""
    module = made(HAPO, {0})
    given = questions(4)
    for question in given:
        question.columns["solution"] = f"\\boxed{{{question.answer}}}"
    boxed = lambda question, response: float("boxed" in response and question.answer in response)  # noqa: E731
    module.actor.verifier = module.objective.verify.verifier = boxed
    trainer(tmp_path, max_steps=2).fit(module, loader(given, 2))
    assert module.steps_without_signal == 0
    assert module.passes_made > 0


def record(folder, rho, left_out, seed=7):
    curves = {"actor/steps_without_signal": [[1, 2], [0, left_out]]}
    RunRecord("study", "pgpo", seed, len(rho) + left_out, 8, 1.0, 1.0, curves, {}, rho).save(folder / "run.json")
    return str(folder / "run.json")


@pytest.mark.parametrize("make", [MatchedConstantMultiplier, ReplayedMultiplier])
def test_a_control_goes_by_the_steps_that_were_taken(tmp_path, make):
    """The record left out two steps of six; this run leaves out one, another one."""
    control = make(record(tmp_path, [1.2, 1.4, 1.6, 1.8], 2))
    fit(tmp_path, made(GRPO, {1}), 6, callbacks=[control])
    expected = [1.2, 1.4, 1.6, 1.8, 1.5] if make is ReplayedMultiplier else [1.5] * 5
    assert control.history == pytest.approx(expected)


def test_a_control_counts_every_pass_over_a_batch(tmp_path):
    """Two updates on each of two passes over four batches are sixteen optimizer steps."""
    control = MatchedConstantMultiplier(record(tmp_path, [1.5] * 15, 0))
    module = made(GRPO, set(), updates=2, num_iterations=2)
    with pytest.raises(MisconfigurationException, match=r"at most the 15 optimizer steps .* but got 16"):
        trainer(tmp_path, max_epochs=1, callbacks=[control]).fit(module, loader(questions(8), 2))
    assert module.steps == 0


def test_the_summary_counts_them():
    summary = summarise({"actor/steps_without_signal": {1: 0.0, 2: 3.0}}, 2, 9.0, 2)
    assert summary["steps_without_signal"] == 3
    told = before_after(summary | {"last": {"step": 1, "avg@2": 0.5, "standard_error": {}}})
    assert told.endswith("2 steps in 9 s, 3 optimizer steps skipped: no rollout was in the loss")
    assert "left out" not in before_after(summarise({}, 2, 9.0, 2) | {"last": {"step": 1, "standard_error": {}}})
