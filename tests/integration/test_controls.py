"""Controls in runs: the dose of the run that they name, its very steps, exact resume."""

import json
import math
from statistics import fmean

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import (
    CentredMultiplier,
    InverseMultiplier,
    LossScaledMultiplier,
    MatchedConstantMultiplier,
    MatchedRandomMultiplier,
    ReplayedMultiplier,
)
from pgpo_lightning.commands.main import main
from pgpo_lightning.modules import GRPO
from pgpo_lightning.monitoring.run_record import RunRecord
from tests.support.controls import RECORD, record
from tests.support.fixed_gradients import LR, OPTIMIZERS, PARTS, RHO, STEPS, FixedGradients
from tests.support.helpers import LIMITS, TOKENIZER, build, config, half_right, loader, tiny_model, trainer


def fit(folder, multiplier, items=8, **settings):
    updates = settings.pop("updates", 1)
    module = build(FixedGradients, tiny_model(), half_right, tokenizer=TOKENIZER, updates_per_batch=updates, **LIMITS)
    trainer(folder, callbacks=[multiplier], **settings).fit(module, loader(range(items), 1))
    return module


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"max_steps": 7}, 7),
        ({"max_epochs": 1}, 8),
        ({"max_epochs": 2, "max_steps": 10}, 10),
        ({"max_epochs": 1, "updates": 2}, 16),
        ({}, 8000),  # Lightning's own limit of 1000 epochs
    ],
)
@pytest.mark.parametrize("make", [MatchedConstantMultiplier, InverseMultiplier])
def test_a_run_longer_than_its_record_is_refused_at_the_start(tmp_path, monkeypatch, make, settings, got):
    monkeypatch.setattr(FixedGradients, "training_step", lambda *_: pytest.fail("a step was taken"))
    message = f"at most the 6 optimizer steps that .*run.json recorded, but got {got}. Set `trainer.max_steps` to 6"
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, make(record(tmp_path, RECORD[:6])), **settings)


def test_a_run_of_unknown_length_ends_with_its_record(tmp_path):
    multiplier = ReplayedMultiplier(record(tmp_path, RECORD[:6]))
    with pytest.raises(MisconfigurationException, match="at most the 6 optimizer steps"):
        fit(tmp_path, multiplier, max_epochs=-1)
    assert multiplier.history == RECORD[:6]


def test_a_run_shorter_than_its_record_is_told_if_the_dose_differs(tmp_path):
    path = record(tmp_path, [1.0] * 4 + [2.0] * 4)
    with pytest.warns(UserWarning, match=r"over these the dose is 1.5, and the record's 1\."):
        fit(tmp_path, MatchedConstantMultiplier(path), max_steps=4)
    fit(tmp_path, ReplayedMultiplier(path), max_steps=4)  # a warning of ours would be an error


def test_to_replay_the_run_of_the_same_seed_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"of another seed than this run's, but .* has seed 0 too"):
        fit(tmp_path, ReplayedMultiplier(record(tmp_path, seed=0)), max_steps=4)


class ScriptedLoss(LossScaledMultiplier):
    """A given sequence, on the loss."""

    def multiplier(self, statistics, step):
        return RHO[step]


@pytest.mark.parametrize("clip", [None, 0.5, 1e3])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_loss_scaled_equals_a_loop_that_multiplies_the_loss(tmp_path, name, clip):
    """The norm is about 42: a clip at 0.5 always holds, one at 1e3 never."""
    module = build(
        FixedGradients,
        tiny_model(),
        half_right,
        tokenizer=TOKENIZER,
        optimizer=OPTIMIZERS[name],
        max_grad_norm=clip,
        **LIMITS,
    )
    multiplier = ScriptedLoss(rho_min=0.0)
    trainer(tmp_path, max_steps=STEPS, callbacks=[multiplier]).fit(module, loader(range(STEPS), 1))
    expected = loss_scaled_loop(OPTIMIZERS[name], clip)
    torch.testing.assert_close(module.path[-1], expected, rtol=1e-4, atol=1e-6)
    assert module.rates == [LR] * STEPS
    assert multiplier.history == RHO


def test_loss_scaled_is_exact_where_only_some_steps_are_clipped(tmp_path):
    clip = 42.0
    scaled = loss_scaled_loop(OPTIMIZERS["sgd"], clip)
    module = build(
        FixedGradients,
        tiny_model(),
        half_right,
        tokenizer=TOKENIZER,
        optimizer=OPTIMIZERS["sgd"],
        max_grad_norm=clip,
        **LIMITS,
    )
    trainer(tmp_path, max_steps=STEPS, callbacks=[ScriptedLoss(rho_min=0.0)]).fit(module, loader(range(STEPS), 1))
    torch.testing.assert_close(module.path[-1], scaled, rtol=1e-4, atol=1e-5)
    # Both the order of scaling and clipping, and the clipping itself, must matter for that to mean anything.
    assert not torch.allclose(scaled, loss_scaled_loop(OPTIMIZERS["sgd"], clip, after=True), rtol=1e-2)
    assert not torch.allclose(scaled, loss_scaled_loop(OPTIMIZERS["sgd"], None), rtol=1e-2)


def loss_scaled_loop(make, clip, after=False):
    """The final weights of a hand-written loop; `after`: gradients are multiplied after clipping instead."""
    weights = torch.nn.Linear(64, 80)
    with torch.no_grad():
        weights.weight.zero_()
        weights.bias.zero_()
    optimizer = make(weights.parameters())
    for k in range(STEPS):
        generator = torch.Generator().manual_seed(k)
        optimizer.zero_grad()
        for _ in range(PARTS):
            loss = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in weights.parameters())
            (loss * (1.0 if after else RHO[k]) / PARTS).backward()
        torch.nn.utils.clip_grad_norm_(weights.parameters(), math.inf if clip is None else clip)
        for p in weights.parameters():
            p.grad.mul_(RHO[k] if after else 1.0)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in weights.parameters()])


@pytest.mark.parametrize("make", [CentredMultiplier, LossScaledMultiplier, InverseMultiplier])
def test_what_needs_information_needs_a_teacher(tmp_path, make):
    limits = {k: v for k, v in LIMITS.items() if k != "max_reprompt_len"}
    module = build(GRPO, tiny_model(), half_right, tokenizer=TOKENIZER, **limits)
    multiplier = make(record(tmp_path)) if make is InverseMultiplier else make()
    with pytest.raises(MisconfigurationException, match=r"a module with a teacher .* but GRPO has none"):
        trainer(tmp_path, callbacks=[multiplier], max_steps=2).fit(module, loader(range(2), 1))


NO_EVALUATION = ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]


def command(folder, *args, steps=6):
    slow = {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}}}
    main(["fit", "--config", config(folder, steps, model=slow), *NO_EVALUATION, *args])


def weights(folder, steps=6):
    return torch.load(folder / "checkpoints" / f"step={steps:06d}.ckpt", weights_only=True)


def history(folder):
    return RunRecord.load(folder).rho


def assert_same_end(a, b):
    for name, value in weights(a)["state_dict"].items():
        assert torch.equal(value, weights(b)["state_dict"][name]), name
    assert history(a) == history(b)


@pytest.fixture(scope="module")
def pgpo(tmp_path_factory):
    """A recorded PGPO run whose multiplier moves."""
    folder = tmp_path_factory.mktemp("pgpo") / "run"
    command(folder, "--multiplier", "InformationMultiplier", "--multiplier.sensitivity", "5")
    assert len(set(history(folder))) == 6
    return folder


@pytest.mark.parametrize("make", [MatchedRandomMultiplier, InverseMultiplier])
def test_a_matched_arm_has_the_dose_of_the_run_that_it_names(pgpo, tmp_path, make):
    alpha = ["--multiplier.sensitivity", "5"] if make is InverseMultiplier else []
    command(tmp_path / "run", "--multiplier", make.__name__, "--multiplier.run", str(pgpo), *alpha)
    assert len(history(tmp_path / "run")) == 6
    # Six steps are few for the inverse: it ends within the last step's surprise.
    assert fmean(history(tmp_path / "run")) == pytest.approx(fmean(history(pgpo)), rel=0.01 if not alpha else 0.02)
    assert history(tmp_path / "run") != history(pgpo)


def test_a_replayed_run_takes_the_very_same_steps(pgpo, tmp_path):
    """The record is passed off as another seed's: of the same seed it gives the same run, which is why that is refused."""
    content = json.loads((pgpo / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(content | {"seed": 99}))
    command(tmp_path / "run", "--multiplier", "ReplayedMultiplier", "--multiplier.run", str(tmp_path / "run.json"))
    assert_same_end(pgpo, tmp_path / "run")


@pytest.mark.parametrize("make", [InverseMultiplier, CentredMultiplier])
def test_resume_is_exact(pgpo, tmp_path, make):
    args = ["--multiplier", make.__name__, "--multiplier.sensitivity", "5"]
    args += ["--multiplier.run", str(pgpo)] if make is InverseMultiplier else []
    command(tmp_path / "whole", *args)
    command(tmp_path / "run", *args, steps=3)
    command(tmp_path / "run", *args, "--ckpt_path", "last")
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    assert len(set(history(tmp_path / "run"))) > 3
    callbacks = [weights(tmp_path / run)["callbacks"][make.__name__] for run in ("whole", "run")]
    assert callbacks[0] == callbacks[1]
