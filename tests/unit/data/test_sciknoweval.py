"""SciKnowEval: the reference's prompts, filters and split, from its files and from the Hub's table."""

import json
import os
import re
from pathlib import Path

import datasets
import pytest

from pgpo_lightning.data import SciKnowEval
from pgpo_lightning.data.sciknoweval import ROWS, SYSTEM, is_used, to_question

FOLDER = os.environ.get("PGPO_SCIKNOWEVAL", "")
needs_data = pytest.mark.skipif(
    not (FOLDER and Path(FOLDER).is_dir()), reason="PGPO_SCIKNOWEVAL does not name the folder of the reference's files"
)


def hub_row(number: int = 0, **changes) -> dict:
    """A row in the schema of hicai-zju/SciKnowEval."""
    return {
        "prompt": {"default": "Given a question and four options, please select the right answer."},
        "question": f"Which number is {number}?",
        "answer": "",
        "type": "mcq-4-choices",
        "domain": "Physics",
        "details": {"level": "L3", "task": "counting", "subtask": "numbers", "source": "us"},
        "answerKey": "C",
        "choices": {"text": ["one", "two", str(number), "four"], "label": ["A", "B", "C", "D"]},
    } | changes


def write_domain(folder: Path, answer: str) -> None:
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        (folder / f"{name}.json").write_text(json.dumps({"prompt": name, "answer": answer, "system": SYSTEM}))


def test_row_of_the_hub():
    question = to_question(hub_row(7), "here:1")
    assert question.prompt == "Which number is 7?\n\nA: one\nB: two\nC: 7\nD: four\nPlease reason step by step."
    assert (question.answer, question.system, question.source) == ("C", SYSTEM, "here:1")
    assert question.columns == {
        "labels": ["A", "B", "C", "D"],
        "type": "mcq-4-choices",
        "level": "L3",
        "task": "counting",
        "subtask": "numbers",
        "source": "us",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answerKey": "E"}, r"`answerKey` of here:1 to be one of the options \['A', 'B', 'C', 'D'\], but got 'E'"),
        ({"answerKey": None}, r"`answerKey` of here:1 .* but got None"),
        ({"question": " "}, r"text in the column `question` of here:1, but it is blank"),
    ],
)
def test_faulty_row_of_the_hub(changes, message):
    with pytest.raises(ValueError, match=message):
        to_question(hub_row(**changes), "here:1")


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, True),
        ({"type": "mcq-2-choices"}, True),
        ({"type": "true_or_false"}, False),
        ({"domain": "Biology"}, False),
        ({"details": {"level": "L2"}}, False),
    ],
)
def test_filter(changes, used):
    assert is_used(hub_row(**changes), "physics") is used


def test_hub(monkeypatch):
    rows = [hub_row(number, domain="Physics" if number % 2 else "Biology") for number in range(40)]
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = SciKnowEval("physics")
    with pytest.warns(UserWarning, match="Expected 800 physics rows in hicai-zju/SciKnowEval, but got 20"):
        data.setup()
    assert calls == [(("hicai-zju/SciKnowEval",), {"split": "test"})]
    kept = datasets.Dataset.from_list(rows).filter(lambda row: row["domain"] == "Physics")
    split = kept.train_test_split(test_size=0.1, seed=42)  # what the SDPO repository does
    for name, expected in (("train", split["train"]), ("test", split["test"]), ("validation", split["test"])):
        questions = data.questions[name]
        assert [question.prompt.split("\n")[0] for question in questions] == expected["question"][:]
        assert [question.index for question in questions] == list(range(len(expected)))
    assert data.questions["train"][0].source == f"hicai-zju/SciKnowEval:{int(split['train'][0]['question'][16:-1]) + 1}"


def test_hub_without_the_domain(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([hub_row()]))
    with pytest.raises(ValueError, match="at least two biology rows in hicai-zju/SciKnowEval, but got 0"):
        SciKnowEval("biology").setup("fit")


def test_unknown_domain():
    with pytest.raises(ValueError, match=r"`domain` to be one of biology, .*physics, but got 'history'"):
        SciKnowEval("history")


def test_folder_of_all_domains_or_of_one(tmp_path):
    write_domain(tmp_path / "physics", "A")
    for path in (tmp_path, tmp_path / "physics"):
        data = SciKnowEval("physics", path=str(path))
        data.setup()
        assert [data.questions[split][0].prompt for split in ("train", "validation", "test")] == [
            "train",
            "test",
            "test",
        ]
        assert data.questions["train"][0].answer == "A"


def test_folder_of_another_domain(tmp_path):
    write_domain(tmp_path / "biology", "A")
    with pytest.raises(ValueError, match=r"`path` to hold the domain physics, but got .*biology"):
        SciKnowEval("physics", path=str(tmp_path / "biology")).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"data file at .*train\.json, but there is none"):
        SciKnowEval("physics", path=str(tmp_path)).setup("fit")


@needs_data
@pytest.mark.parametrize(
    ("domain", "train", "test"),
    [("biology", 450, 50), ("chemistry", 1890, 210), ("material", 841, 94), ("physics", 720, 80)],
)
def test_reference_files(domain, train, test):
    data = SciKnowEval(domain, path=FOLDER)
    data.setup()
    assert {split: len(questions) for split, questions in data.questions.items()} == {
        "train": train,
        "validation": test,
        "test": test,
    }
    questions = data.questions["train"] + data.questions["test"]
    assert {question.system for question in questions} == {SYSTEM}
    assert {question.answer for question in questions} == set("ABCD")
    for question in questions:  # the description repeats the question, so the prompt can be built again
        text = question.columns["description"].removesuffix(" The solution will be evaluated in a mcq environment.")
        options = question.prompt.removeprefix(f"{text}\n\n").removesuffix("\nPlease reason step by step.")
        labels = [label for label in "ABCD" if f"\n{label}: " in f"\n{options}"]
        *texts, last = re.split(r"^[A-D]: ", options, flags=re.MULTILINE)[1:]
        choices = {"label": labels, "text": [*(text.removesuffix("\n") for text in texts), last]}
        row = hub_row(question=text, choices=choices, answerKey=question.answer)
        assert to_question(row).prompt == question.prompt
    # The split that is drawn for the Hub's rows puts the reference's row numbers where the reference has them.
    draw = datasets.Dataset.from_dict({"row": range(ROWS[domain])}).train_test_split(test_size=0.1, seed=42)
    for split in ("train", "test"):
        assert [question.columns["idx"] for question in data.questions[split]] == draw[split]["row"][:]
