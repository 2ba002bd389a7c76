"""Runs that share the answers of the base model are bit for bit the runs that do not."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from pgpo_lightning.commands.main import main
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.adapters import lora
from tests.support.helpers import LIMITS, TOKENIZER, build, config, half_right, loader, questions, tiny_model, trainer


@pytest.fixture
def sampled(monkeypatch):
    """The numbers of questions that the engine was asked, call by call."""
    calls, generate = [], TransformersEngine.generate

    def counted(self, model, tokenizer, asked, *args):
        calls.append(len(asked))
        return generate(self, model, tokenizer, asked, *args)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    return calls


def assert_equal(one, other):
    """All that a user may compare: answers, curves without seconds, record, weights and optimizer."""
    found = []
    for folder in (one, other):
        record = json.loads((folder / "run.json").read_text())
        record = {key: value for key, value in record.items() if key not in ("seconds", "cpu_seconds", "arm", "study")}
        record["curves"] = {tag: v for tag, v in record["curves"].items() if not tag.startswith(("timing", "perf"))}
        answers = {path.name: path.read_bytes() for path in sorted((folder / "validation").iterdir())}
        saved = torch.load(folder / "checkpoints" / "step=000002.ckpt", weights_only=True)
        found.append((answers, record, saved))
    (answers, record, saved), (answers2, record2, saved2) = found
    assert answers.keys() == {"step=000000.jsonl", "step=000002.jsonl"}
    assert answers == answers2
    assert record == record2
    assert len(record["curves"]) > 20
    torch.testing.assert_close(saved["state_dict"], saved2["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(
        saved["optimizer_states"][0]["state"], saved2["optimizer_states"][0]["state"], rtol=0, atol=0
    )


def fit(folder, shared=None, **changes):
    model = {"max_response_length": 40, "evaluation.solution_column": "solution"} | changes.pop("model", {})
    if shared:
        model["evaluation.base_answers"] = str(shared)
    main(["fit", "--config", config(folder, steps=2, model=model, **changes)])


def test_a_run_that_shares_is_the_run_that_does_not(tmp_path, sampled):
    shared = tmp_path / "base"
    fit(tmp_path / "alone")
    calls = list(sampled)
    assert calls == [8, 4, 4, 8], "base model, two steps, trained model"
    fit(tmp_path / "first", shared)
    fit(tmp_path / "second", shared)
    assert sampled == [*calls, *calls, *calls[1:]], "one evaluation fewer"
    assert_equal(tmp_path / "first", tmp_path / "alone")
    assert_equal(tmp_path / "second", tmp_path / "alone")
    assert len(list(shared.iterdir())) == 1


def always(question, response):
    return 0.25


def evaluated(folder, shared, sampled, step=0, verifier=half_right, **settings):
    """The answers of the file, and the number of batches that were sampled."""
    module = build(SDPO, tiny_model(), verifier, tokenizer=TOKENIZER,
                   **(LIMITS | {"eval_samples": 2, "evaluation.base_answers": str(shared)} | settings))  # fmt: skip
    module.steps = step
    sampled.clear()
    trainer(folder, logger=TensorBoardLogger(folder, name="", version="")).validate(
        module, loader(questions(4), 2), verbose=False
    )
    return [json.loads(line) for line in module.evaluator.held_out.path.read_text().splitlines()], len(sampled)


def test_another_verifier_judges_the_same_answers_anew(tmp_path, sampled):
    first, _ = evaluated(tmp_path, tmp_path / "base", sampled)
    other, batches = evaluated(tmp_path, tmp_path / "base", sampled, verifier=always)
    assert batches == 0
    assert [line["responses"] for line in first] == [line["responses"] for line in other]
    assert {line["avg"] for line in other} == {0.25}
    assert {line["avg"] for line in first} != {0.25}


@pytest.mark.parametrize(
    "changes", [{"seed": 4}, {"eval_samples": 3}, {"evaluation.temperature": 0.7}, {"max_response_length": 11}]
)
def test_a_run_with_another_setting_evaluates_by_itself(tmp_path, sampled, changes):
    assert evaluated(tmp_path, tmp_path / "base", sampled)[1] == 2
    assert evaluated(tmp_path, tmp_path / "base", sampled, **changes)[1] == 2
    assert evaluated(tmp_path, tmp_path / "base", sampled)[1] == 0


def test_only_the_model_before_its_first_step_and_an_adapter_apart(tmp_path, sampled):
    shared = tmp_path / "base"
    assert evaluated(tmp_path, shared, sampled)[1] == 2
    assert evaluated(tmp_path, shared, sampled)[1] == 0
    assert evaluated(tmp_path, shared, sampled, step=1)[1] == 2
    assert evaluated(tmp_path, shared, sampled, lora=lora())[1] == 2, "a fresh adapter adds weights"
    assert evaluated(tmp_path, shared, sampled, lora=lora())[1] == 0


def test_a_damaged_file_costs_one_evaluation(tmp_path, sampled):
    shared = tmp_path / "base"
    evaluated(tmp_path, shared, sampled)
    damaged = sorted(Path(shared).iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.warns(UserWarning, match=f"{damaged.name} is ignored and written anew"):
        assert evaluated(tmp_path, shared, sampled)[1] == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*written anew")
        assert evaluated(tmp_path, shared, sampled)[1] == 0
