"""The command line with a real pretrained model of 135 M parameters: `make test-llm`.

What a random or a toy model cannot show: a real tokenizer and chat template, a tied head of 49,152 rows, answers that are seldom
right.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgpo_lightning.commands.main import main
from pgpo_lightning.core.types import Question
from pgpo_lightning.rollout.engine import Sampling
from pgpo_lightning.rollout.transformers_engine import TransformersEngine
from tests.support.helpers import grouped

HERE = Path(__file__).parent
MODEL = HERE.parent.parent / ".models" / "smollm2-135m-instruct"


def config(folder, **changes):
    """Two steps of two questions with three rollouts of 24 tokens."""
    model = {
        "model": str(MODEL),
        "verifier": {
            "class_path": "pgpo_lightning.rewards.MultipleChoice",
            "init_args": {"variant": "lenient"},
        },
        "num_generations": 3,
        "max_prompt_length": 96,
        "max_reprompt_len": 256,
        "max_response_length": 24,
        "eval_samples": 2,
    }
    data = {"train": str(HERE / "questions.jsonl"), "validation": str(HERE / "questions.jsonl")}
    settings = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        },
        "model": {"class_path": "SDPO", "init_args": grouped(model | changes.pop("model", {}))},
        "data": {
            "class_path": "FileQuestions",
            "init_args": data | {"batch_size": 2, "eval_batch_size": 4, "limit_val": 4},
        },
        "multiplier": {"class_path": "InformationMultiplier"},
        "checkpoint": {"every_n_train_steps": 1, "keep": None},
    }
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings | changes))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("llm") / "run"
    path = config(folder)
    main(["fit", "--config", path])
    return folder, path


def test_prompts_are_those_of_the_chat_template():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.tokenize("in 1492") == ["in", "Ġ", "1", "4", "9", "2"]
    text = tokenizer.decode(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_fit_learns_evaluates_and_leaves_a_summary(run):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert 0 <= summary["final"]["avg@2"] <= 1
    answers = [json.loads(line) for line in (folder / "validation" / "step=000002.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    assert all(text.strip() for row in answers for text in row["responses"])  # it speaks


def test_the_sampler_has_the_models_own_log_probabilities():
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32),
        AutoTokenizer.from_pretrained(MODEL),
    )
    prompts = [tokenizer(text)["input_ids"] for text in ("Water boils at", "The heart of an adult human beats about")]
    asked = [Question("?", "", index=i) for i in range(2)]
    rollouts = TransformersEngine().generate(model, tokenizer, asked, prompts, 2, Sampling(12))
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])
        with torch.no_grad():
            log_p = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        own = log_p.gather(-1, torch.tensor(rollout.response_ids).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(rollout.log_probs, own, atol=1e-3, rtol=0)


def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path):
    folder, path = run
    again = tmp_path / "again"
    main(["fit", "--config", path, "--trainer.default_root_dir", str(again), "--trainer.max_steps", "1"])
    main(["fit", "--config", path, "--trainer.default_root_dir", str(again), "--ckpt_path", "last"])
    ours, theirs = (
        torch.load(each / "checkpoints" / "step=000002.ckpt", weights_only=True)["state_dict"]
        for each in (again, folder)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_validate_and_export_and_reload(run, tmp_path, capsys):
    folder, path = run
    main(["validate", "--config", path, "--ckpt_path", "last"])
    assert "avg@2 " in capsys.readouterr().out  # the line below the table, whose columns may be cut
    main(["export", str(folder), str(tmp_path / "out")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    trained = torch.load(folder / "checkpoints" / "step=000002.ckpt", weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        if f"model.{name}" in trained:
            torch.testing.assert_close(value, trained[f"model.{name}"], atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").tokenize("12") == ["1", "2"]


def test_an_adapter_trains(tmp_path):
    folder = tmp_path / "lora"
    main(["fit", "--config", config(folder, model={"lora": {"r": 4}})])
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2
    size = sum(path.stat().st_size for path in (folder / "checkpoints").glob("step=000002.ckpt"))
    assert size < 30e6  # adapters, their optimizer states and nothing of the base


def test_programs_are_run_and_their_failures_are_read_by_the_teacher(tmp_path):
    folder = tmp_path / "code"
    model = {
        "verifier": {"class_path": "pgpo_lightning.rewards.CodeExecution"},
        "max_response_length": 48,
        "temperature": 0.5,
        "max_prompt_length": 128,
    }
    model |= {"demonstration_source": "none", "max_reprompt_len": 400}
    data = {
        "class_path": "CodeQuestions",
        "init_args": {"path": str(HERE / "code.jsonl"), "format": "tests", "batch_size": 4, "limit_val": 4},
    }
    path = config(folder, model=model, data=data)
    main(["fit", "--config", path, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0"])
    rows = [json.loads(line) for line in (folder / "rollouts" / "step=000001.jsonl").read_text().splitlines()]
    failed = [row for row in rows if row["reward"] == 0]
    assert failed  # a program that reads and doubles is too much for it
    assert all("feedback from your unsuccessful earlier attempt" in row["what the teacher sees"] for row in failed)


def test_the_probe_measures_a_gap(tmp_path):
    path = config(tmp_path / "probe")
    main(["probe", "--config", path, "--questions", "4", "--samples", "2", "--output", str(tmp_path / "out")])
    content = json.loads((tmp_path / "out" / "probe.json").read_text())
    gaps = {row["name"]: row["gap"]["value"] for row in content["contexts"]}
    assert {"none", "sibling", "configured"} <= gaps.keys()
    assert all(math.isfinite(gap) for gap in gaps.values())
