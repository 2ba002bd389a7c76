"""Schedules by two keys have the rates of transformers' formulas, compose with a multiplier, and go on exactly."""

import math

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import ConstantMultiplier, ResumeCheckpoint
from pgpo_lightning.modules import GRPO
from pgpo_lightning.training.configs import UpdateConfig
from tests.support.helpers import GRPO_LIMITS, TOKENIZER, build, half_right, loader, questions, tiny_model, trainer

RATE, STEPS = 1e-3, 6


def decayed(kind, step, warmup):
    """The factor of a batch, by the formulas of transformers' documentation."""
    if step < warmup:
        return step / warmup
    past = (step - warmup) / (STEPS - warmup)
    return {"linear": 1 - past, "cosine": 0.5 * (1 + math.cos(math.pi * past))}.get(kind, 1.0)


class Rates(L.Callback):
    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, *args):
        self.seen[module.steps] = module.reported["lr/base"], module.reported.get("lr/effective")


def fit(folder, steps=STEPS, callbacks=(), resume=None, max_epochs=None, **settings):
    module = build(GRPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4,
                   optimizer=lambda p: torch.optim.AdamW(p, lr=RATE), **GRPO_LIMITS | settings)  # fmt: skip
    rates = Rates()
    made = trainer(
        folder,
        max_steps=steps,
        max_epochs=max_epochs,
        callbacks=[rates, *callbacks],
        enable_checkpointing=any(isinstance(each, ResumeCheckpoint) for each in callbacks),
    )
    made.fit(module, loader(questions(2), 2), ckpt_path=resume)
    return module, rates.seen


@pytest.mark.parametrize(
    ("kind", "warmup"), [("constant", 0), ("constant_with_warmup", 3), ("linear", 2), ("cosine", 2)]
)
def test_the_rates_are_those_of_the_formula_and_rho_scales_them_for_one_step(tmp_path, kind, warmup):
    _, seen = fit(tmp_path, callbacks=[ConstantMultiplier(1.5)], lr_scheduler_type=kind, warmup_steps=warmup)
    wanted = [RATE * decayed(kind, step, warmup) for step in range(STEPS)]
    assert [base for base, _ in seen.values()] == pytest.approx(wanted, rel=1e-9)
    assert [rate for _, rate in seen.values()] == pytest.approx([1.5 * rate for rate in wanted], rel=1e-9)


def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path):
    settings = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    whole, rates = fit(tmp_path / "whole", callbacks=[ResumeCheckpoint(every_n_train_steps=1, keep=None)], **settings)
    (third,) = (tmp_path / "whole").rglob("step=000003.ckpt")
    resumed, later = fit(tmp_path / "resumed", resume=third, **settings)
    assert later == {step: rate for step, rate in rates.items() if step > 3}
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, resumed.model.state_dict()[name]), name
    # A longer run has another schedule, as if it had had it from the start.
    _, longer = fit(tmp_path / "longer", steps=8, resume=third, **settings)
    past = (torch.arange(3, 8) - 2) / 6
    assert [base for base, _ in longer.values()] == pytest.approx((RATE * 0.5 * (1 + (math.pi * past).cos())).tolist())
    with pytest.raises(MisconfigurationException, match="Expected the `scheduler` that the run began with"):
        fit(tmp_path / "none", resume=third)


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"one schedule .*`scheduler` and `update.lr_scheduler_type` cosine. Remove one"
    ):
        fit(tmp_path, scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o), lr_scheduler_type="cosine")
    with pytest.raises(ValueError, match=r"linear or cosine with `update.warmup_steps` 3, but got null"):
        UpdateConfig(warmup_steps=3)
    with pytest.raises(ValueError, match=r"with `update.warmup_steps` 3, but got constant, which has no warm-up"):
        UpdateConfig(lr_scheduler_type="constant", warmup_steps=3)
    with pytest.raises(ValueError, match=r"`update.warmup_steps` of at least 1 .*constant_with_warmup, but got 0"):
        UpdateConfig(lr_scheduler_type="constant_with_warmup")
    with pytest.raises(ValueError, match=r"`update.lr_scheduler_type` to be one of constant, .*cosine"):
        UpdateConfig(lr_scheduler_type="polynomial")
    with pytest.raises(
        MisconfigurationException, match=r"known length for `update.lr_scheduler_type` linear, but it has none"
    ):
        fit(tmp_path, steps=-1, lr_scheduler_type="linear", callbacks=[], max_epochs=-1)
