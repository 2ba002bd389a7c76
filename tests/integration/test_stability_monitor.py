"""A monitor of stability sees, warns and changes nothing."""

import math

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import CollapseGuard, StabilityMonitor
from pgpo_lightning.commands.main import main
from pgpo_lightning.modules import GRPO
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.helpers import LIMITS, TOKENIZER, build, config, loader, questions, tiny_model, trainer
from tests.support.runs import final
from tests.support.stability import REWARD_ONLY, Script, run, scripted


def test_a_monitor_warns_once_and_changes_nothing(tmp_path):
    monitor = StabilityMonitor(REWARD_ONLY)
    with pytest.warns(UserWarning, match="reward of rollouts") as caught:
        _, module, _ = run(tmp_path, monitor)
    told = [str(w.message) for w in caught if "reward of rollouts" in str(w.message)]
    assert told == ["Step 6, reward: the reward of rollouts fell to 0, below 0.6 of its best 0.5."]
    assert module.steps == 8
    assert monitor.curves["critic/score/mean"] == {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5, 5: 0.0, 6: 0.0, 7: 0.0, 8: 0.0}
    assert monitor.curves["val/avg@2"] == pytest.approx({0: 0.2, 2: 0.8, 4: 0.6, 6: 0.1, 8: 0.1})
    # Steps without a teacher have no divergence, though Lightning goes on reporting the last one.
    assert list(monitor.curves["self_distillation/divergence"]) == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:Step")  # the run is at the edge
def test_the_monitor_logs_its_signs_and_agrees_with_the_log(tmp_path):
    folder = tmp_path / "run"
    callbacks = [{"class_path": "StabilityMonitor"}]
    path = config(folder, steps=4)
    main(["fit", "--config", path, f"--trainer.callbacks={callbacks}"])
    scalars = read_scalars(folder)
    signs = {tag for tag in scalars if tag.startswith("stability/")}
    assert {
        "stability/alarms",
        "stability/reward_of_best",
        "stability/entropy_of_start",
        "stability/length_tail",
    } <= signs
    assert sorted(scalars["stability/alarms"]) == [1, 2, 3, 4]
    assert sorted(scalars["stability/pass_of_first"]) == [0, 2, 4]
    assert scalars["stability/divergence_of_bound"][4] == pytest.approx(
        scalars["self_distillation/divergence"][1] / math.log(2), rel=1e-5
    )
    seen = final(folder, 4)["callbacks"]["StabilityMonitor"]["curves"]
    for tag, points in seen.items():
        assert points == pytest.approx(scalars[tag], rel=1e-5), tag
    assert {"critic/score/mean", "actor/grad_norm", "val/avg@2"} <= set(seen)


def test_a_module_without_a_teacher_is_watched_too(tmp_path):
    monitor, script = StabilityMonitor(REWARD_ONLY), Script(scores={2: 0.8})
    limits = {name: value for name, value in LIMITS.items() if name != "max_reprompt_len"}
    script.module = build(GRPO, tiny_model(), script, tokenizer=TOKENIZER, num_generations=4, eval_samples=2, **limits)
    with pytest.warns(UserWarning, match="Step 6, reward"):
        trainer(tmp_path, max_epochs=1, callbacks=[monitor]).fit(script.module, loader(questions(12), 2))
    assert not any(tag.startswith("self_distillation") for tag in monitor.curves)
    assert len(monitor.curves["rollout/neg_log_prob"]) == 6


def test_two_monitors_are_refused(tmp_path):
    with pytest.raises(
        MisconfigurationException, match="Expected one StabilityMonitor, but got StabilityMonitor and Collapse"
    ):
        trainer(tmp_path, callbacks=[StabilityMonitor(), CollapseGuard()]).fit(scripted(Script()), loader(questions(2)))


def test_a_part_of_the_evaluation_is_no_score(tmp_path):
    monitor = StabilityMonitor(REWARD_ONLY)
    run(tmp_path, monitor, steps=2, fitted={"num_sanity_val_steps": 1})
    assert list(monitor.curves["val/avg@2"]) == [2]
