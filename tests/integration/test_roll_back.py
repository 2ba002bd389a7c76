"""A guard that rolls back: weights, teacher, optimizer and rate; interrupted runs roll back alike."""

from pathlib import Path

import pytest
import torch
import yaml

from pgpo_lightning.callbacks import CollapseGuard, ResumeCheckpoint
from pgpo_lightning.commands.main import main
from pgpo_lightning.modules import SDPO
from pgpo_lightning.monitoring.collapse_rules import CollapseRules
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.helpers import LIMITS, TOKENIZER, build, config, loader, questions, tiny_model, trainer
from tests.support.runs import assert_same, assert_same_run, final
from tests.support.stability import OFF, REWARD_ONLY, Recorder, Script, run, scripted


def same(a, b):
    assert_same(a[0], b[0], "weights")
    assert_same(a[1], b[1], "optimizer")


def different(a, b):
    name = "model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(a[0][name], b[0][name])
    assert not torch.equal(a[1][0]["exp_avg"], b[1][0]["exp_avg"])


@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_weights_teacher_and_optimizer_return_and_the_rate_is_lowered(tmp_path, teacher):
    guard = CollapseGuard("roll-back", REWARD_ONLY, lr_factor=0.25)
    with pytest.warns(
        UserWarning, match=r"Back to the weights of step 2 \(held-out score 0.8\), learning rate times 0.25"
    ):
        _, module, recorder = run(
            tmp_path, guard, steps=7, teacher_regularization=teacher,
            scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        )  # fmt: skip
    assert guard.rollbacks == [[6, 2]]
    different(recorder.trained[4], recorder.evaluated[2])
    same(recorder.trained[6], recorder.evaluated[2])
    rates = [1e-2 * 0.9**step * (0.25 if step >= 6 else 1.0) for step in range(1, 8)]
    assert list(recorder.rates.values()) == pytest.approx(rates, rel=1e-12)
    assert module.steps == 7
    # Rules start again from where the weights are.
    assert list(guard.curves["critic/score/mean"]) == [1, 2, 7]
    assert guard.curves["val/avg@2"] == pytest.approx({0: 0.2, 2: 0.8, 6: 0.1})


def test_the_base_model_can_be_the_best(tmp_path):
    guard = CollapseGuard("roll-back", REWARD_ONLY)
    with pytest.warns(UserWarning, match=r"Back to the weights of step 0 \(held-out score 0.9\)"):
        _, _, recorder = run(tmp_path, guard, Script(until=2, scores={0: 0.9, 2: 0.8}), steps=5)
    assert guard.rollbacks == [[4, 0]]
    same(recorder.trained[4], recorder.evaluated[0])
    assert recorder.evaluated[0][1] == {}  # an optimizer that has not taken a step


def test_going_back_twice_finds_the_same_weights_and_the_last_time_stops(tmp_path):
    """The rewards never return, so it goes back to step 2 as often as it may, and once more to end there."""
    guard = CollapseGuard("roll-back", REWARD_ONLY, max_rollbacks=2)
    with pytest.warns(UserWarning, match="Back to") as caught:
        _, module, recorder = run(tmp_path, guard, Script(until=4, scores={2: 0.8}), steps=30, num_iterations=2)
    told = [str(w.message) for w in caught if "Back to" in str(w.message)]
    assert [("learning rate times 0.5" in text, "and stopped after" in text) for text in told] == [
        (True, False), (True, False), (False, True)
    ]  # fmt: skip
    steps = [step for step, _ in guard.rollbacks]
    assert steps == [6, 8, 10]
    assert module.steps == 10
    for step in steps:
        same(recorder.trained[step], recorder.evaluated[2])
    assert recorder.rates[10] == pytest.approx(1e-2 / 4)
    assert recorder.evaluated[10][0].keys() == recorder.evaluated[2][0].keys()


def test_training_goes_on_from_the_best_weights(tmp_path):
    """After going back the rewards are there again: weights move, and the kept ones do not."""

    class Recovering(Script):
        def __call__(self, question, response):
            script = self.until
            self.until = 4 if self.module.steps < 6 else 99
            value = super().__call__(question, response)
            self.until = script
            return value

    guard = CollapseGuard("roll-back", REWARD_ONLY)
    with pytest.warns(UserWarning, match="Back to"):
        _, _, recorder = run(tmp_path, guard, Recovering(scores={2: 0.8}), steps=9)
    assert guard.rollbacks == [[6, 2]]
    different(recorder.trained[9], recorder.evaluated[2])
    assert_same(guard.best["weights"], recorder.evaluated[2][0], "best")
    assert_same(guard.best["optimizers"][0], recorder.evaluated[2][1], "best")
    assert not any(torch.is_tensor(w) and w.is_inference() for w in guard.best["weights"].values())


def test_a_broken_teacher_stops_at_once(tmp_path):
    guard = CollapseGuard("roll-back", CollapseRules(**OFF | {"broken_teacher": 0.0}))
    with pytest.warns(
        UserWarning, match=r"Back to the weights of step 0 .*and stopped after step 1, because of broken-teacher"
    ):
        _, module, recorder = run(tmp_path, guard)
    assert module.steps == 1
    assert recorder.rates[1] == 1e-2


def test_frozen_weights_under_an_adapter_are_not_kept(tmp_path):
    guard = CollapseGuard("roll-back", REWARD_ONLY)
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name)
    script = Script(scores={2: 0.8})
    module = build(SDPO, model, script, tokenizer=TOKENIZER, num_generations=4, eval_samples=2, teacher_regularization="frozen",
                  optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **LIMITS)  # fmt: skip
    script.module, recorder = module, Recorder()
    with pytest.warns(UserWarning, match="Back to"):
        trainer(tmp_path, max_epochs=1, val_check_interval=2, num_sanity_val_steps=-1, callbacks=[guard, recorder]).fit(
            module, loader(questions(14), 2), loader(questions(2), 2)
        )
    kept = {name for name in guard.best["weights"] if name.startswith("model.")}
    assert kept == {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}
    same(recorder.trained[6], recorder.evaluated[2])


def guarded(folder, steps=6):
    """Every rise of the entropy is an alarm here: the run goes back again and again."""
    rules = dict.fromkeys(OFF) | {"window": 1, "warm_up": 1, "reward_fall": None, "entropy_rise": 1.0}
    init = {"action": "roll-back", "max_rollbacks": 9, "lr_factor": 0.5, "rules": rules}
    path = Path(config(folder, steps=steps))
    settings = yaml.safe_load(path.read_text())
    settings["trainer"] |= {"callbacks": [{"class_path": "CollapseGuard", "init_args": init}]}
    path.write_text(yaml.safe_dump(settings))
    return str(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded") / "whole"
    with pytest.warns(UserWarning, match="Back to"):
        main(["fit", "--config", guarded(folder)])
    return folder


@pytest.mark.parametrize("cut", [2, 3, 5])
def test_a_resumed_run_goes_back_as_the_uninterrupted_one(whole, tmp_path, cut):
    resumed = tmp_path / "resumed"
    with pytest.warns(UserWarning, match="Back to"):  # noqa: PT031
        main(["fit", "--config", guarded(resumed, steps=cut)])
        main(["fit", "--config", guarded(resumed), "--ckpt_path", "last"])
    a, b = (final(folder)["callbacks"]["CollapseGuard"] for folder in (whole, resumed))
    assert any(step > cut for step, _ in a["rollbacks"])
    assert_same(a, b, "guard")
    assert_same_run(whole, resumed)
    rate = final(whole)["optimizer_states"][0]["param_groups"][0]["lr"]
    assert rate == pytest.approx(1e-3 * 0.9**6 * 0.5 ** len(a["rollbacks"]), rel=1e-12)
    logged = read_scalars(whole)["stability/rollbacks"]
    assert logged == {step: i for i, (step, _) in enumerate(a["rollbacks"], start=1)}


def test_a_checkpoint_of_the_step_holds_the_weights_that_it_went_back_to(tmp_path):
    guard, saving = CollapseGuard("roll-back", REWARD_ONLY), ResumeCheckpoint(1, keep=None, dirpath=str(tmp_path / "c"))
    recorder, script = Recorder(), Script(scores={2: 0.8})
    module = scripted(script)
    with pytest.warns(UserWarning, match="Back to"):
        trainer(
            tmp_path, max_epochs=1, val_check_interval=2, num_sanity_val_steps=-1, enable_checkpointing=True,
            callbacks=[saving, guard, recorder],
        ).fit(module, loader(questions(14), 2), loader(questions(2), 2))  # fmt: skip
    saved = torch.load(tmp_path / "c" / "step=000006.ckpt", weights_only=True)
    same((saved["state_dict"], saved["optimizer_states"][0]["state"]), recorder.evaluated[2])


def test_a_run_that_was_started_without_a_guard_has_nothing_to_go_back_to(tmp_path):
    guard = CollapseGuard("roll-back", REWARD_ONLY)
    guard.on_validation_end = lambda *_: None
    with pytest.warns(UserWarning, match="Stopped after step 6"):
        _, module, _ = run(tmp_path, guard)
    assert module.steps == 6
