"""A guard against collapse warns or stops, and refuses settings that it cannot use."""

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import CollapseGuard, StabilityMonitor
from pgpo_lightning.monitoring.collapse_rules import CollapseRules
from tests.support.helpers import loader, questions, trainer
from tests.support.stability import OFF, REWARD_ONLY, Script, run, scripted


def test_a_guard_warns_and_goes_on(tmp_path):
    with pytest.warns(UserWarning, match="the reward of rollouts fell to 0"):
        _, module, _ = run(tmp_path, CollapseGuard("warn", REWARD_ONLY))
    assert module.steps == 8


@pytest.mark.parametrize(
    ("rules", "last", "share"),
    # Steps without a reward: two of three, of which one would not do; by default four of seven.
    [(REWARD_ONLY, 5, 0.6), (CollapseRules(**OFF), 7, 0.3)],
)
def test_a_guard_stops_the_run_with_a_last_evaluation(tmp_path, rules, last, share):
    guard = CollapseGuard("stop", rules)
    with pytest.warns(UserWarning, match=f"Stopped after step {last}, because of reward"):
        _, module, recorder = run(tmp_path, guard, Script(until=3))
    assert module.steps == last
    assert guard.warned["reward"].endswith(f"below {share} of its best 0.5")
    assert list(recorder.evaluated) == [*range(0, last, 2), last]


def test_the_default_thresholds():
    assert StabilityMonitor().rules == CollapseGuard().rules == CollapseRules()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "pray"}, "Expected `action` to be one of warn, stop, roll-back, but got 'pray'"),
        ({"lr_factor": 0.0}, r"Expected `lr_factor` to lie in \(0, 1\], but got 0.0"),
        ({"max_rollbacks": 0}, "Expected `max_rollbacks` to be at least 1, but got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CollapseGuard(**settings)


@pytest.mark.parametrize(
    ("settings", "validation", "message"),
    [
        ({}, False, "Expected a validation for `action: roll-back`"),
        ({"limit_val_batches": 0}, True, "Expected a validation for `action: roll-back`"),
        ({"num_sanity_val_steps": 2}, True, "Expected `trainer.num_sanity_val_steps` to be -1 .* but got 2"),
    ],
)
def test_a_roll_back_to_nothing_is_refused(tmp_path, settings, validation, message):
    data = [loader(questions(2), 2)] * (1 + validation)
    with pytest.raises(MisconfigurationException, match=message):
        trainer(tmp_path, **{"num_sanity_val_steps": -1} | settings, callbacks=[CollapseGuard("roll-back")]).fit(
            scripted(Script()), *data
        )
