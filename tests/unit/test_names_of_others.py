"""The names table of TRL and verl names settings of ours that exist."""

import dataclasses
import inspect
import re

import lightning as L

from pgpo_lightning.callbacks import ResumeCheckpoint
from pgpo_lightning.commands.fit import PGPOCommand
from pgpo_lightning.core.run_settings import parameters_of
from pgpo_lightning.data import FileQuestions
from pgpo_lightning.modules import GRPO, HAPO, RLSD, SDPO, SRPO
from tests.support import ROOT

PAGE = ROOT / "docs" / "coming_from_trl.md"
ROW = re.compile(r"^\| `([\w.]+)` \|([^|]*)\|([^|]*)\|([^|]*)\|$", re.MULTILINE)


def settings():
    """Every setting of the command line that a row may name."""
    found = {"ckpt_path"} | {f"trainer.{name}" for name in inspect.signature(L.Trainer).parameters}
    found |= {f"data.{name}" for name in parameters_of(FileQuestions)}
    found |= {f"checkpoint.{name}" for name in inspect.signature(ResumeCheckpoint).parameters}
    for module in (SDPO, GRPO, HAPO, RLSD, SRPO):
        for name, parameter in inspect.signature(module).parameters.items():
            found.add(f"model.{name}")
            if dataclasses.is_dataclass(parameter.annotation):
                found |= {f"model.{name}.{field.name}" for field in dataclasses.fields(parameter.annotation)}
    return found | ({"seed_everything"} if "seed_everything_default" in inspect.getsource(PGPOCommand) else set())


def test_every_setting_of_ours_in_the_table_exists():
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    named = [row[0] for row in rows]
    assert len(named) == len(set(named)) >= 25
    assert [name for name in named if name not in settings()] == []
    assert "model.update.micro_batch_token" not in settings()


def test_rows_have_a_name_of_trl_or_verl():
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert all(trl.strip() or verl.strip() for _, trl, verl, _ in rows)
    there = {name for _, trl, verl, _ in rows for name in re.findall(r"`([\w.]+)`", trl + verl)}
    asked = {
        "num_iterations",
        "beta",
        "epsilon",
        "actor.ppo_mini_batch_size",
        "logging_steps",
        "save_steps",
        "eval_steps",
    }
    assert asked <= there
