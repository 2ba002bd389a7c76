"""The exact score: the probability that the student writes the worked solution of a held-out question."""

import json
import statistics

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.toy_base import solution_probabilities
from pgpo_lightning.commands.main import main
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.toy import BASE_MODEL, ToyArithmetic
from pgpo_lightning.modules import SDPO
from pgpo_lightning.monitoring.run_record import RunRecord
from tests.support.adapters import disturb, lora
from tests.support.helpers import LIMITS, TOKENIZER, build, config, half_right, loader, questions, tiny_model, trainer


def scored(folder, model, asked, batch=8, **settings):
    """The scores of an evaluation, and the field of every question."""
    given = LIMITS | {"max_response_length": 32, "eval_samples": 1, "evaluation.solution_column": "solution"}
    module = build(SDPO, model, half_right, tokenizer=TOKENIZER, **(given | settings))
    module.configure_model()
    if module.lora is not None:
        disturb(module.model, 0.3)
    t = trainer(folder, logger=TensorBoardLogger(folder, name="", version=""))
    scores = t.validate(module, loader(asked, batch), verbose=False)[0]
    lines = [json.loads(line) for line in module.evaluator.held_out.path.read_text().splitlines()]
    return scores, [line["solution_probability"] for line in lines], module


def test_it_is_that_of_the_toys_reference(tmp_path):
    asked = questions(20)
    expected = solution_probabilities(BASE_MODEL, asked)
    assert expected.min() < 0.1 < 0.5 < expected.max()
    scores, found, _ = scored(tmp_path, "toy", asked, **{"update.micro_batch_tokens": 200, "temperature": 0.7})
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)
    assert scores["validate/solution_probability"] == pytest.approx(statistics.fmean(found))
    error = statistics.stdev(found) / len(found) ** 0.5
    assert scores["validate_standard_error/solution_probability"] == pytest.approx(error)


@pytest.mark.parametrize("adapter", [None, lora()])
def test_it_is_that_of_whole_logits_in_every_batch_and_with_an_adapter(tmp_path, adapter):
    asked = questions(5)
    _, found, module = scored(tmp_path, tiny_model(tie_word_embeddings=False), asked, 2, lora=adapter)
    for question, value in zip(asked, found, strict=True):
        prompt = module.encoder.question(question)
        answer = [*TOKENIZER(question.columns["solution"]).input_ids, TOKENIZER.eos_token_id]
        with torch.no_grad():
            logits = module.model.eval()(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.double().log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).sum()
        assert value == pytest.approx(log_p.exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"column `solution` of rows\.jsonl:7 to hold a worked solution.*got no such column"),
        ({"solution": 3}, r"column `solution` of rows\.jsonl:7.*got 3\."),
        ({"solution": " "}, r"column `solution` of rows\.jsonl:7.*got ' '\."),
        ({"solution": "1" * 40}, r"rows\.jsonl:7 to have at most `max_response_length`=32 tokens.*it has 41"),
    ],
)
def test_a_row_without_a_solution_is_named(tmp_path, columns, message):
    asked = [*questions(1), Question("1+1?", "2", index=1, source="rows.jsonl:7", columns=columns)]
    with pytest.raises(ValueError, match=message):
        scored(tmp_path, tiny_model(), asked)


def test_rows_are_looked_at_before_anything_is_loaded(tmp_path):
    class Without(ToyArithmetic):
        def load(self, split):
            rows = super().load(split)
            if split == "validation":
                del rows[2].columns["solution"]
            return rows

    given = {"max_response_length": 32, "evaluation.solution_column": "solution"}
    module = build(SDPO, "no-such-model", half_right, tokenizer=TOKENIZER, **(LIMITS | given))
    with pytest.raises(ValueError, match=r"`solution` of toy validation:2 .*no such column"):
        trainer(tmp_path, max_steps=1).fit(module, datamodule=Without(limit_val=4))


def test_a_run_records_it_for_every_evaluation_and_changes_in_nothing_else(tmp_path, capsys):
    runs = {}
    for name, column in (("with", "solution"), ("without", None)):
        path = config(tmp_path / name, steps=2, model={"evaluation.solution_column": column, "max_response_length": 32})
        main(["fit", "--config", path])
        runs[name] = RunRecord.load(tmp_path / name)
    exact, plain = runs["with"], runs["without"]
    assert plain.solution_probabilities == {}
    assert [*exact.solution_probabilities] == ["0", "2"]
    expected = solution_probabilities(BASE_MODEL, questions(8))
    torch.testing.assert_close(torch.tensor(exact.solution_probabilities["0"]), expected, atol=1e-5, rtol=0)
    means = [statistics.fmean(values) for values in exact.solution_probabilities.values()]
    assert exact.curves.pop("val/solution_probability") == [[0, 2], pytest.approx(means, abs=1e-5)]
    assert (exact.curves, exact.questions, exact.rho) == (plain.curves, plain.questions, plain.rho)
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith(("held-out ", "avg@2 ", "solution_probability "))]
    assert len({len(line) for line in table[:3]}) == 1, table
