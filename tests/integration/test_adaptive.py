"""Adaptive multipliers in whole runs: the steps they take, exact resume, what they refuse."""

import math

import bitsandbytes
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import (
    KLAdaptiveMultiplier,
    PolyakMultiplier,
)
from pgpo_lightning.commands.main import main
from pgpo_lightning.losses.step_statistics import StepStatistics
from pgpo_lightning.modules import GRPO, SDPO, SRPO
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.training.learner import Learner, Step
from tests.support.directions import DIRECTIONS
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    build,
    config,
    half_right,
    loader,
    questions,
    tiny_model,
    trainer,
)


class Sometimes(SDPO):
    """The loss of the second batch is not a number."""

    def configure_model(self):
        super().configure_model()
        accumulate = self.learner.accumulate

        def sometimes(*args):
            step = accumulate(*args)
            step.loss = math.nan if self.steps == 1 else step.loss
            return step

        self.learner.accumulate = sometimes


@pytest.mark.parametrize("updates", [1, 2])
def test_a_batch_decides_once_and_a_skipped_one_not_at_all(tmp_path, updates):
    module = build(
        Sometimes, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, updates_per_batch=updates, **LIMITS
    )
    multiplier = KLAdaptiveMultiplier(target=1e3)  # any change is too little
    trainer(tmp_path, max_steps=3 * updates, max_epochs=1, callbacks=[multiplier]).fit(module, loader(questions(12), 2))
    assert multiplier.history == [1.0] * updates + [1.5] * updates + [2.25] * updates
    assert module.steps == 4


class Quadratic(SDPO):
    """Loss (w - 3)^2 / 2 of every weight, through the real update."""

    def configure_model(self):
        self.model = torch.nn.Linear(4, 1)
        with torch.no_grad():
            self.model.weight.zero_()
            self.model.bias.zero_()
        self.learner = Learner(self.model, self.objective, self.update)
        self.losses = []

    def training_step(self, batch, batch_idx):
        self.scalars = {}
        loss = sum((p - 3).square().sum() / 2 for p in self.model.parameters())
        self.manual_backward(loss)
        step = Step(loss.item(), self.step_statistics)
        self.learner.apply(self.optimizers(), step, self.scalars, self._scaler, self.steps)
        self.losses.append(loss.item())
        self.steps += 1


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("c", "optimum"), [(1.0, 0.0), (0.7, 0.0), (2.0, 4.5)])
def test_polyak_takes_the_step_that_its_formula_says(tmp_path, optimizer, clip, c, optimum):
    """All five weights are alike, so that SGD and Adam walk the same line, w: |g|^2 = 5 (w - 3)^2 = 2 L."""
    module = build(
        Quadratic,
        tiny_model(),
        half_right,
        tokenizer=TOKENIZER,
        optimizer=DIRECTIONS[optimizer],
        max_grad_norm=clip,
        **LIMITS,
    )
    multiplier = PolyakMultiplier(c=c, optimum=optimum)
    multiplier.rho_max = 1e9  # the formula itself
    trainer(tmp_path, max_steps=5, callbacks=[multiplier]).fit(module, loader(range(5), 1))
    loss, expected = 22.5, []
    for _ in range(5):
        expected.append(loss)
        length = max(0.0, loss - optimum) / (c * 2 * loss)  # in units of the gradient
        loss *= (1 - length) ** 2
    assert module.losses == pytest.approx(expected, rel=1e-4)


def test_polyak_is_capped_and_one_without_a_gradient(tmp_path):
    multiplier = PolyakMultiplier(rho_max=3.0)
    multiplier.loss, multiplier.slope = 1.0, 1e-12
    assert multiplier.bounded(multiplier.multiplier(StepStatistics.empty(), 0)) == 3.0
    multiplier.loss = multiplier.slope = 0.0
    assert multiplier.multiplier(StepStatistics.empty(), 0) == 1.0


@pytest.mark.parametrize(
    ("kind", "settings"), [(SDPO, {"full_logit_distillation": False, "alpha": 1.0}), (GRPO, {}), (SRPO, {})]
)
def test_polyak_needs_a_divergence(tmp_path, kind, settings):
    limits = {k: v for k, v in LIMITS.items() if kind is not GRPO or k != "max_reprompt_len"}
    module = build(kind, tiny_model(), half_right, tokenizer=TOKENIZER, **limits, **settings)
    with pytest.raises(
        MisconfigurationException,
        match=r"a loss that is a divergence for PolyakMultiplier, .* is not, or not alone, here",
    ):
        trainer(tmp_path, callbacks=[PolyakMultiplier()], max_steps=2).fit(module, loader(range(2), 1))


@pytest.mark.parametrize(
    "optimizer",
    [lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-3), lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True)],
)
def test_polyak_needs_an_optimizer_whose_direction_is_known(tmp_path, optimizer):
    module = build(Quadratic, tiny_model(), half_right, tokenizer=TOKENIZER, optimizer=optimizer, **LIMITS)
    with pytest.raises(MisconfigurationException, match=r"without amsgrad for PolyakMultiplier, but got .*AdamW"):
        trainer(tmp_path, callbacks=[PolyakMultiplier()], max_steps=2).fit(module, loader(range(2), 1))


RUNS = {
    "KLAdaptiveMultiplier": ["--multiplier.target", "0.01"],
    "AdaptiveInformationMultiplier": ["--multiplier.target_mean", "1.4", "--multiplier.warmup", "2"],
    "PolyakMultiplier": ["--multiplier.rho_max", "100"],
    "EffectiveSampleSizeMultiplier": ["--model.update.updates_per_batch", "2", "--seed_everything", "2"],
}


def command(folder, *args, steps=6):
    slow = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}}
    quick = ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
    main(["fit", "--config", config(folder, steps, model=slow), *quick, *args])


def checkpoint(folder, steps=6):
    return torch.load(folder / "checkpoints" / f"step={steps:06d}.ckpt", weights_only=True)


@pytest.mark.parametrize("name", ["KLAdaptiveMultiplier", "AdaptiveInformationMultiplier"])
def test_resume_is_exact(tmp_path, name):
    args = ["--multiplier", name, *RUNS[name]]
    command(tmp_path / "whole", *args)
    command(tmp_path / "run", *args, steps=3)
    command(tmp_path / "run", *args, "--ckpt_path", "last")
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "run")
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())
    assert a["callbacks"][name] == b["callbacks"][name]
    rho = RunRecord.load(tmp_path / "whole").rho
    assert rho == RunRecord.load(tmp_path / "run").rho
    assert len(set(rho)) >= 4
    scalars = read_scalars(tmp_path / "run")
    logged = {"KLAdaptiveMultiplier": "lr/kl", "AdaptiveInformationMultiplier": "information/sensitivity"}[name]
    assert scalars[logged] == read_scalars(tmp_path / "whole")[logged]


@pytest.mark.parametrize("name", ["PolyakMultiplier", "EffectiveSampleSizeMultiplier"])
def test_a_whole_run(tmp_path, name):
    command(tmp_path / "run", "--multiplier", name, *RUNS[name])
    rho = RunRecord.load(tmp_path / "run").rho
    assert len(rho) == 6
    if name == "PolyakMultiplier":
        assert len(set(rho)) == 6
        assert all(0.1 < value < 100 for value in rho), "a step of Adam's own size"
    else:
        assert rho[::2] == pytest.approx([1.0] * 3, abs=1e-6), "the first update of a batch is on-policy"
        assert 0 < min(rho[1::2]) < 0.99
