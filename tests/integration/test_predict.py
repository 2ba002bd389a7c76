"""`pgpo predict` answers a file of prompts, and grades the rows whose answer is known."""

import json

import pytest

from pgpo_lightning import FileQuestions, ToyArithmetic
from pgpo_lightning.commands.main import main
from tests.support.helpers import config


@pytest.fixture
def prompts(tmp_path):
    asked = ToyArithmetic().load("test")[:3]
    rows = [{"prompt": asked[0].prompt, "answer": asked[0].answer}, {"prompt": asked[1].prompt}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": asked[2].prompt, "answer": None}]))
    return path


def test_prompts_of_a_file_are_answered_and_known_answers_graded(tmp_path, prompts, capsys):
    words = ["--data", "FileQuestions", "--data.predict", str(prompts), "--data.eval_batch_size", "2"]
    main(["predict", "--config", config(tmp_path / "run"), *words])
    said = capsys.readouterr().out
    (path,) = (tmp_path / "run" / "predict").iterdir()
    assert f"answers: {path}\n" in said
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert [row["source"] for row in rows] == [f"{prompts}:{number}" for number in (1, 2, 3)]
    assert [[len(row[name]) for name in ("responses", "lengths", "finished")] for row in rows] == [[2, 2, 2]] * 3
    assert [sorted(row.get("rewards", [])) for row in rows][1:] == [[], []]
    gold = f"\\boxed{{{json.loads(prompts.read_text().splitlines()[0])['answer']}}}"
    assert rows[0]["rewards"] == [float(response.endswith(gold)) for response in rows[0]["responses"]]


def test_without_a_file_the_test_questions_are_answered(prompts):
    for data, count in ((ToyArithmetic(), 2_000), (FileQuestions(predict=str(prompts)), 3)):
        data.setup("predict")
        assert list(data.questions) == ["predict"]
        assert len(data.questions["predict"]) >= count
    with pytest.raises(ValueError, match="to have predict questions for the stage `predict`"):
        FileQuestions(train=str(prompts)).setup("predict")
