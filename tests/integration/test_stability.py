"""A monitor sees and tells; a guard stops, or goes back to the best weights. As a program: a worker under DDP.

Usage: test_stability.py OUTPUT RANKS trains with a guard that goes back once.
"""

import copy
import itertools
import math
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import CollapseGuard, ResumeCheckpoint, StabilityMonitor
from pgpo_lightning.commands.main import main
from pgpo_lightning.modules import GRPO, SDPO
from pgpo_lightning.monitoring.collapse_rules import CollapseRules
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.training.lowered_rates import lower_rates
from tests.support.helpers import LIMITS, TOKENIZER, build, config, loader, questions, tiny_model, trainer
from tests.support.processes import finish, start_ranks
from tests.support.runs import assert_same, assert_same_run, final

OFF = dict.fromkeys(
    ("teacher_fall", "score_fall", "entropy_rise", "entropy_vanish", "length_tail", "cut_off_rise", "gradient_vanish",
     "gap_growth", "broken_teacher")
)  # fmt: skip
# Two bad steps of three: a run of a few steps can show what follows from an alarm.
REWARD_ONLY = CollapseRules(window=3, reward_fall=0.6, **OFF)


class Script:
    """Half of the rollouts are right until a step, none after; held-out scores by step."""

    def __init__(self, until=4, scores=None):
        self.until, self.scores, self.turn, self.module = until, scores or {}, itertools.cycle((0.0, 1.0)), None

    def __call__(self, question, response):
        trainer = self.module.trainer
        if trainer.validating or trainer.sanity_checking:
            return self.scores.get(self.module.steps, 0.1)
        return next(self.turn) if self.module.steps < self.until else 0.0


def scripted(script, **settings):
    rate = settings.pop("rate", 1e-2)
    module = build(SDPO,
        tiny_model(), script, tokenizer=TOKENIZER, num_generations=4, eval_samples=2,
        **{"optimizer": lambda p: torch.optim.AdamW(p, lr=rate)} | LIMITS | settings,
    )  # fmt: skip
    script.module = module
    return module


class Recorder(L.Callback):
    """Keeps the whole state after every step and at every evaluation."""

    def __init__(self):
        self.trained, self.evaluated, self.rates = {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained[pl_module.steps] = self.state(trainer, pl_module)
        self.rates[pl_module.steps] = trainer.optimizers[0].param_groups[0]["lr"]

    def on_validation_end(self, trainer, pl_module):
        self.evaluated[pl_module.steps] = self.state(trainer, pl_module)

    @staticmethod
    def state(trainer, module):
        return copy.deepcopy((module.state_dict(), trainer.optimizers[0].state_dict()["state"]))


def run(tmp_path, guard, script=None, steps=8, **settings):
    recorder, fitted = Recorder(), settings.pop("fitted", {})
    module = scripted(script or Script(scores={0: 0.2, 2: 0.8, 4: 0.6}), **settings)
    fit = trainer(
        tmp_path, max_steps=-1, max_epochs=1, limit_train_batches=steps, val_check_interval=2, callbacks=[guard, recorder],
        **{"num_sanity_val_steps": -1} | fitted,
    )  # fmt: skip
    fit.fit(module, loader(questions(2 * steps), 2), loader(questions(2), 2))
    return fit, module, recorder


def same(a, b):
    assert_same(a[0], b[0], "weights")
    assert_same(a[1], b[1], "optimizer")


def different(a, b):
    name = "model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(a[0][name], b[0][name])
    assert not torch.equal(a[1][0]["exp_avg"], b[1][0]["exp_avg"])


# --------------------------------------------------------------------------------------------------------- monitor


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


# ------------------------------------------------------------------------------------------------------------ stop


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


# ------------------------------------------------------------------------------------------------------- roll back


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


# -------------------------------------------------------------------------------------------------------- settings


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


# ------------------------------------------------------------------------------------------------------------- DDP


def worker():
    output, ranks = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    guard, script = CollapseGuard("roll-back", REWARD_ONLY, max_rollbacks=1), Script(scores={2: 0.8})
    module = scripted(script)
    fit = trainer(
        output, devices=ranks, strategy="ddp", max_epochs=1, val_check_interval=2, num_sanity_val_steps=-1,
        callbacks=[guard],
    )  # fmt: skip
    fit.fit(module, loader(questions(40), 2), loader(questions(4), 2))
    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    best = torch.cat([guard.best["weights"][name].flatten() for name, _ in module.named_parameters()])
    state = {
        "weights": weights,
        "best": best,
        "rollbacks": guard.rollbacks,
        "steps": module.steps,
        "curves": guard.curves,
    }
    torch.save(state, f"{output}.{fit.global_rank}")


def test_ranks_decide_alike(tmp_path):
    output = tmp_path / "state"
    finish(*start_ranks([__file__, output, 2], tmp_path / "log", 2), log=tmp_path / "log")
    a, b = (torch.load(f"{output}.{rank}") for rank in (0, 1))
    assert a["rollbacks"] == b["rollbacks"] == [[6, 2], [8, 2]]
    assert a["steps"] == b["steps"] == 8
    assert a["curves"] == b["curves"]
    assert torch.equal(a["weights"], b["weights"])
    assert torch.equal(a["weights"], a["best"])


if __name__ == "__main__":
    worker()
