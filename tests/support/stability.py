"""Runs whose rewards and held-out scores follow a script."""

import copy
import itertools

import lightning as L
import torch

from pgpo_lightning.modules import SDPO
from pgpo_lightning.monitoring.collapse_rules import CollapseRules
from tests.support.helpers import LIMITS, TOKENIZER, build, loader, questions, tiny_model, trainer

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
