"""One seed decides a run, from Python as on the command line; what was given a seed of its own keeps it."""

import json
import os
import re

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.callbacks import RandomMultiplier, ResumeCheckpoint
from pgpo_lightning.commands.main import main
from pgpo_lightning.data import ToyArithmetic
from pgpo_lightning.models.lora import LoRA
from pgpo_lightning.modules import SDPO
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.rewards import BoxedAnswer
from pgpo_lightning.teachers.configs import RepromptConfig
from pgpo_lightning.training.configs import EvaluationConfig
from tests.support import ROOT
from tests.support.helpers import LIMITS, TOKENIZER, build, config, half_right, tiny_model, trainer


class Kept(L.Callback):
    """What a run did: its questions and responses."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append([(row.rollout.question.index, *row.rollout.response_ids) for row in pl_module.last_samples])


def fit(folder, everything=None, steps=2, ckpt_path=None, data=None, callbacks=(), **settings):
    """A run as in a notebook: everything is made anew, and the seed set before."""
    if everything is not None:
        L.seed_everything(everything, verbose=False)
    module = build(
        SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, eval_samples=2, **(LIMITS | settings)
    )
    kept, multiplier = Kept(), RandomMultiplier()
    t = trainer(
        folder, max_steps=steps, callbacks=[kept, multiplier, *callbacks], limit_val_batches=0,
        enable_checkpointing=any(isinstance(callback, ResumeCheckpoint) for callback in callbacks),
    )  # fmt: skip
    t.fit(module, datamodule=ToyArithmetic(batch_size=3, limit_train=40, **(data or {})), ckpt_path=ckpt_path)
    return kept.seen, multiplier.history, torch.cat([p.detach().flatten() for p in module.model.parameters()])


def test_five_seeds_in_a_notebook_are_five_runs(tmp_path):
    runs = [fit(tmp_path, seed) for seed in range(5)]
    for what in (0, 1):
        assert len({json.dumps(run[what]) for run in runs}) == 5
    assert len({json.dumps([row[0] for step in run[0] for row in step]) for run in runs}) == 5, "other questions"
    assert len({run[2].sum().item() for run in runs}) == 5
    again = fit(tmp_path, 3)
    assert again[:2] == runs[3][:2]
    assert torch.equal(again[2], runs[3][2])


def test_without_a_seed_a_run_has_seed_0_and_an_own_seed_comes_first(tmp_path):
    plain = fit(tmp_path)
    assert "PL_GLOBAL_SEED" not in os.environ
    assert fit(tmp_path, 0)[:2] == plain[:2]
    assert fit(tmp_path, 7, seed=0, data={"seed": 0})[0] == plain[0]
    mixed = fit(tmp_path, 7, data={"seed": 0})
    assert [[row[0] for row in step] for step in mixed[0]] == [[row[0] for row in step] for step in plain[0]]
    assert mixed[0] != plain[0]
    of_module = fit(tmp_path, 7, seed=0)  # from which data and multiplier take theirs
    assert of_module[:2] == plain[:2]


def test_a_seed_is_taken_when_a_trainer_starts(tmp_path):
    L.seed_everything(1, verbose=False)
    module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, eval_samples=2, **LIMITS)
    L.seed_everything(2, verbose=False)

    class Meddling(L.Callback):
        def on_train_start(self, *_):
            L.seed_everything(5, verbose=False)

    kept = Kept()
    t = trainer(tmp_path, max_steps=2, callbacks=[kept, Meddling()], limit_val_batches=0)
    t.fit(module, datamodule=ToyArithmetic(batch_size=3, limit_train=40))
    assert module.seed == 2
    assert kept.seen == fit(tmp_path, 2)[0]


def test_a_resumed_run_goes_on_with_its_seed(tmp_path):
    whole = fit(tmp_path / "whole", 4, steps=4)
    fit(tmp_path / "cut", 4, callbacks=[ResumeCheckpoint()])
    checkpoint = tmp_path / "cut" / "checkpoints" / "step=000002.ckpt"
    assert torch.load(checkpoint, weights_only=True)["pgpo_lightning"]["seed"] == 4
    del os.environ["PL_GLOBAL_SEED"]  # a new process, in which nobody set a seed
    seen, history, weights = fit(tmp_path / "cut", steps=4, ckpt_path=checkpoint)
    assert seen == whole[0][2:]
    assert history == whole[1]
    assert torch.equal(weights, whole[2])
    for another in ({"seed": 5}, {"everything": 5}):
        with pytest.raises(
            MisconfigurationException, match=r"seed of the checkpoint, 4, but got 5.* `seed_everything` to 4"
        ):
            fit(tmp_path / "other", steps=4, ckpt_path=checkpoint, **another)


def test_an_adapter_begins_with_the_seed(tmp_path):
    pytest.importorskip("peft")
    halves = []
    for seed in (1, 2, 1):
        L.seed_everything(seed, verbose=False)
        module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, lora=LoRA(r=2), eval_samples=2, **LIMITS)
        trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(
            module, datamodule=ToyArithmetic(batch_size=2, limit_train=4)
        )
        halves.append(next(p.detach() for n, p in module.model.named_parameters() if "lora_A" in n))
    assert torch.equal(halves[0], halves[2])
    assert not torch.allclose(halves[0], halves[1], atol=1e-2)


def test_the_command_line_and_python_make_the_same_run(tmp_path):
    quick = ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
    settings = config(tmp_path / "run", steps=2)
    main(["fit", "--config", settings, *quick, "--seed_everything", "4"])
    command = torch.load(tmp_path / "run" / "checkpoints" / "step=000002.ckpt", weights_only=True)
    L.seed_everything(4, verbose=False)
    module = build(SDPO,
        "toy", BoxedAnswer(), num_generations=4, max_prompt_length=64, max_reprompt_len=160, max_response_length=24,
        eval_samples=2, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.9),
    )  # fmt: skip
    multiplier = RandomMultiplier(0.5, 1.5)
    trainer(tmp_path, max_steps=2, callbacks=[multiplier], limit_val_batches=0).fit(
        module, datamodule=ToyArithmetic(batch_size=4, eval_batch_size=8, limit_train=13, limit_val=8)
    )
    theirs = {name.removeprefix("model."): w for name, w in command["state_dict"].items() if name.startswith("model.")}
    assert all(torch.equal(weight, theirs[name]) for name, weight in module.model.state_dict().items())
    own = ["--model.seed", "11", "--data.seed", "9", "--trainer.max_steps", "1"]
    main(["fit", "--config", settings, *quick, "--trainer.default_root_dir", str(tmp_path / "own"), *own])
    saved = torch.load(tmp_path / "own" / "checkpoints" / "step=000001.ckpt", weights_only=True)
    assert (saved["pgpo_lightning"]["seed"], saved["ToyArithmetic"]["seed"]) == (11, 9)


def test_the_example_in_the_readme_runs_and_leaves_a_summary(tmp_path, monkeypatch):
    """To the letter, but for a model, lengths and a number of steps that are smaller."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (verifier,), (example,) = ([block for block in blocks if word in block] for word in ("def check", "L.Trainer("))
    for big, small in {
        '"Qwen/Qwen3-0.6B"': '"toy"', "num_generations=8": "num_generations=2, evaluation=EvaluationConfig(samples=2)",
        "max_response_length=1024": "max_response_length=8, max_prompt_length=64, reprompt=RepromptConfig(max_reprompt_len=128)",
        "max_steps=100": "max_steps=2", "val_check_interval=20": "val_check_interval=1",
        'FileQuestions(train="train.jsonl"': 'FileQuestions(batch_size=2, train="train.jsonl"',
    }.items():  # fmt: skip
        assert example.count(big) == 1, big
        example = example.replace(big, small)
    row = {"prompt": "Speed 8 m/s for 6 s from 31 m. Place?", "answer": "79", "keywords": ["79"]}
    for name, count in (("train", 4), ("test", 2)):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * count)
    monkeypatch.chdir(tmp_path)
    names = {"EvaluationConfig": EvaluationConfig, "RepromptConfig": RepromptConfig}
    exec(verifier + example, names)
    folder = tmp_path / "runs" / "mine" / "lightning_logs" / "version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["base"]["step"], summary["final"]["step"]) == (2, 0, 2)
    assert sorted(read_scalars(folder)["critic/score/mean"]) == [1, 2]
    assert (folder / "checkpoints" / "step=000002.ckpt").exists()
    assert names["module"].seed == 0
