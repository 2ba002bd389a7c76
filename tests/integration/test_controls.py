"""Controls in runs: the dose of the run that they name, its very steps, exact resume."""

import json
from statistics import fmean

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import (
    CentredMultiplier,
    InverseMultiplier,
    MatchedConstantMultiplier,
    MatchedRandomMultiplier,
    ReplayedMultiplier,
)
from pgpo_lightning.commands.main import main
from pgpo_lightning.modules import GRPO
from pgpo_lightning.monitoring.run_record import RunRecord
from tests.support.controls import RECORD, record
from tests.support.fixed_gradients import FixedGradients
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


@pytest.mark.parametrize("make", [CentredMultiplier, InverseMultiplier])
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
