"""A reward file and a data set as TRL's users have them run through ``pgpo fit`` unchanged."""

import json

import pytest
import yaml

from pgpo_lightning.data import ToyArithmetic
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.commands import program
from tests.support.helpers import config

REWARDS = """
import asyncio
import re


def accuracy(completions, solution, log_metric=None, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    boxes = [re.findall(r"boxed\\{(.*?)\\}", content) for content in contents]
    if log_metric:
        log_metric("boxed", sum(map(bool, boxes)) / len(boxes))
    return [float(bool(box) and box[-1] == gold) for box, gold in zip(boxes, solution, strict=True)]


async def brevity(prompts, completions, completion_ids, trainer_state, **kwargs):
    await asyncio.sleep(0.01)
    assert len(prompts) == len(kwargs["level"]) == 16 and prompts[0][-1]["role"] == "user"
    assert trainer_state.global_step in (0, 1)
    return [None if level == 0 else 1 / len(ids) for ids, level in zip(completion_ids, kwargs["level"], strict=True)]


class Ended:
    __name__ = "ended"

    def __call__(self, completions, **kwargs):
        return [0.0] * len(completions)


ended = Ended()
"""


@pytest.fixture
def rows():
    return [
        {
            "prompt": [{"role": "user", "content": question.prompt}],
            "privileged_context": f"It is {question.answer}.",
            "solution": question.answer,
            "level": i % 2,
        }
        for i, question in enumerate(ToyArithmetic().load("train")[:8])
    ]


def test_they_run_unchanged(tmp_path, rows):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = config(tmp_path / "run", steps=2)
    settings = yaml.safe_load((tmp_path / "run.yaml").read_text())
    settings["data"] = {"class_path": "FileQuestions", "init_args": {"train": "train.jsonl", "batch_size": 4}}
    settings["trainer"] |= {"limit_val_batches": 0, "val_check_interval": None}
    model = settings["model"]["init_args"]
    model["verifier"] = {
        "class_path": "pgpo_lightning.TRLReward",
        "init_args": {
            "funcs": ["my_rewards.accuracy", "my_rewards.brevity", "my_rewards.ended"],
            "weights": [1.0, 0.5, 1.0],
        },
    }
    del model["scheduler"]
    model["update"] = {"lr_scheduler_type": "cosine", "warmup_steps": 1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    result = program(tmp_path, "fit", "--config", path)
    assert result.returncode == 0, result.stderr
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["init_args"]["verifier"]
    assert written["init_args"] == model["verifier"]["init_args"]
    curves = {
        name: [value for _, value in sorted(points.items())] for name, points in read_scalars(tmp_path / "run").items()
    }
    accuracy, brevity, score = (
        curves[name] for name in ("rewards/accuracy/mean", "rewards/brevity/mean", "critic/score/mean")
    )
    assert len(accuracy) == len(brevity) == len(curves["rewards/boxed"]) == 2
    assert all(0 < value < 1 for value in brevity)
    assert curves["rewards/ended/mean"] == [0, 0]
    for step in range(2):  # brevity has a reward for some of the responses alone
        assert accuracy[step] < score[step] < accuracy[step] + 0.5 * brevity[step]
    assert curves["self_distillation/feedback_available_fraction"] == [1, 1]
    assert curves["lr/base"] == pytest.approx([0, 1e-3])
