"""Data modules: rows become questions or clear errors, splits become batches."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from lightning.pytorch.cli import LightningArgumentParser

from pgpo_lightning.core.types import Question
from pgpo_lightning.data import FileQuestions, QuestionData

ROWS = [
    {"prompt": "1+1?", "answer": "2", "system": "Be brief.", "privileged_context": None, "level": 3},
    {"prompt": "Zwei\u2028drei?", "answer": "5", "system": None, "privileged_context": "Add.", "level": 1},
    {"prompt": "0+0?", "answer": "0", "system": " ", "privileged_context": "", "level": 0},
]


def write(path: Path, rows: list, array: bool = False) -> str:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("[" + ",\n".join(lines) + "]" if array else "\n".join(lines), encoding="utf-8")
    return str(path)


def load(split: str = "train", **kwargs) -> list[Question]:
    data = FileQuestions(**kwargs)
    data.setup("test" if split == "test" else "fit")
    return data.questions[split]


class Numbers(QuestionData):
    """Questions 0, 1, 2, ... in splits of given sizes."""

    def __init__(self, train: int = 7, validation: int = 0, test: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.sizes = {"train": train, "validation": validation, "test": test}
        self.loaded = []

    def load(self, split):
        self.loaded.append(split)
        return [Question(str(number), number, source=f"{split}:{number}") for number in range(self.sizes[split])]


# --- rows ---


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "array.json"])
def test_formats_give_the_same_questions(tmp_path, name):
    path = write(tmp_path / name, ROWS, array=name == "array.json")
    given = load(train=path)
    assert all(question.columns["answer"] == question.answer for question in given)
    assert [dataclasses.replace(question, columns=question.other_columns(), repeated=()) for question in given] == [
        Question("1+1?", "2", "Be brief.", None, 0, f"{path}:1", {"level": 3}),
        Question("Zwei\u2028drei?", "5", None, "Add.", 1, f"{path}:2", {"level": 1}),
        Question("0+0?", "0", None, None, 2, f"{path}:3", {"level": 0}),
    ]


def test_source_is_the_line_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r\n\r\n{"prompt": "b", "answer": 0}\r\n')
    assert [question.source for question in load(train=str(path))] == [f"{path}:1", f"{path}:3"]


def test_column_names(tmp_path):
    row = {"q": "1+1?", "a": 2, "s": "Be brief.", "hint": "Add.", "prompt": "other"}
    [question] = load(
        train=write(tmp_path / "a.jsonl", [row]),
        prompt_column="q",
        answer_column="a",
        system_column="s",
        privileged_context_column="hint",
    )
    assert (question.prompt, question.answer, question.system, question.privileged_context) == tuple(row.values())[:4]
    assert question.columns == {"a": 2, "s": "Be brief.", "hint": "Add.", "prompt": "other"}
    assert question.other_columns() == {"prompt": "other"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_messages_and_suffix(tmp_path, name):
    turns = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2", "name": "bot"},
        {"role": "user", "content": "2+2?"},
    ]
    rows = [{"prompt": turns, "answer": "4"}]
    [question] = load(train=write(tmp_path / name, rows), prompt_suffix="\nUse \\boxed{}.")
    assert question.prompt == [*turns[:2], {"role": "user", "content": "2+2?\nUse \\boxed{}."}]
    [question] = load(train=write(tmp_path / "text.jsonl", [{"prompt": "1+1?", "answer": "2"}]), prompt_suffix="!")
    assert question.prompt == "1+1?!"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompt": None},
            r"a\.jsonl:2 to have the prompt in its column `prompt`, but it is None.*prompt, answer, level",
        ),
        ({"prompt": " \n"}, r"a\.jsonl:2 to have the prompt .* but it is ' \\n'"),
        ({"prompt": []}, r"a\.jsonl:2 to have the prompt .* but it is \[\]"),
        ({"answer": None}, r"a\.jsonl:2 to have the answer .* but it is None.*set `answer_column`"),
        ({"answer": ""}, r"a\.jsonl:2 to have the answer .* but it is ''"),
        ({"prompt": 3}, r"text or a list of chat messages in column `prompt` of .*a\.jsonl:2, but got int 3"),
        (
            {"prompt": ["x" * 99]},
            r"texts `role` and `content` in column `prompt` of .*:2, but got str 'x+\.\.\. \(101 characters\)\.",
        ),
        ({"prompt": [{"role": "user", "content": None}]}, r"texts `role` and `content` .*:2, but got dict"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}]},
            r"user turn at the end .*:2, but got the role `assistant`",
        ),
        ({"system": 3}, r"Expected a text in column `system` of .*a\.jsonl:2, but got int 3"),
        ({"privileged_context": ["x"]}, r"Expected a text in column `privileged_context` of .*:2, but got list"),
    ],
)
def test_faulty_row(tmp_path, changes, message):
    rows = [{"prompt": "1+1?", "answer": "2", "level": 3}, {"prompt": "2+2?", "answer": "4", "level": 3} | changes]
    with pytest.raises(ValueError, match=message):
        load(train=write(tmp_path / "a.jsonl", rows))


def test_missing_column(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "2"}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1 .* no such column. The row has the columns question, answer"):
        load(train=path)


def test_two_system_messages(tmp_path):
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    path = write(tmp_path / "a.jsonl", [{"prompt": turns, "answer": 1, "system": "c"}])
    with pytest.raises(
        ValueError, match=r"one system message at .*a\.jsonl:1, but there is one in the column `system`"
    ):
        load(train=path)
    assert load(train=path, system_column="none")[0].messages() == turns


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"at least one row in .*a\.jsonl, but it is empty"),
        ("a.json", b"[]", r"at least one row in .*a\.json, but it is empty"),
        ("a.csv", b"x", r"ends in \.json, \.jsonl, \.parquet, but got .*a\.csv"),
        (
            "a.json",
            b'{"prompt": "a", "answer": 1}\nnonsense',
            r"a\.json to be a JSON array, or JSON Lines.*line 2 is no",
        ),
        ("a.json", b'[{"prompt": "a"},\n\n{"answer"]', r"a\.json to be a JSON array, but line 3 says"),
        ("a.json", b'[["a", 1]]', r"Expected a JSON object \(column: value\) at .*a\.json:1, but got list \['a', 1\]"),
        ("a.jsonl", b'{"prompt": "\xff"}', r"a\.jsonl to be UTF-8 text, but got: .*0xff"),
        ("a.parquet", b"x", r"a\.parquet to be a parquet file"),
    ],
)
def test_faulty_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(train=str(tmp_path / name))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data file at .*a\.json, but there is none"):
        load(train=str(tmp_path / "a.json"))


# --- which data ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"data file .* or a `dataset`, but got none"),
        ({"train": "a.json", "dataset": "x/y"}, r"train split from one place, but got the file a\.json and the split"),
        (
            {"dataset": "x/y", "test": "a.json", "test_split": "test"},
            r"test split from one place.*a\.json.*`test`.*x/y",
        ),
        ({"train": "a.json", "test_split": "test"}, r"Expected `dataset` beside `validation_split` or `test_split`"),
        ({"train": "a.json", "batch_size": 0}, r"`batch_size` to be at least 1, but got 0"),
        ({"train": "a.json", "eval_batch_size": 0}, r"`eval_batch_size` to be at least 1, but got 0"),
        ({"train": "a.json", "limit_train": 0}, r"`limit_train` to be at least 1, but got 0"),
        ({"train": "a.json", "limit_val": -1}, r"`limit_val` to be at least 1, but got -1"),
    ],
)
def test_contradictory_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FileQuestions(**arguments)


def test_hub_data_set(monkeypatch):
    calls = []

    def load_dataset(*args, split):
        calls.append((*args, split))
        return datasets.Dataset.from_list(ROWS[:1] if split == "train" else [])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"at least one row in x/y \[dev\], but it is empty"):
        load(dataset="x/y", dataset_config="main", validation_split="dev")
    assert calls == [("x/y", "main", "train"), ("x/y", "main", "dev")]
    columns = {name: value for name, value in ROWS[0].items() if name != "prompt"}
    repeated = ("answer", "system", "privileged_context")
    wanted = Question("1+1?", "2", "Be brief.", None, 0, "x/y[train]:1", columns, repeated=repeated)
    assert load(dataset="x/y") == [wanted]


def test_test_data_serves_as_validation_data(tmp_path):
    train, test = write(tmp_path / "train.json", ROWS), write(tmp_path / "test.json", ROWS[:2])
    assert [question.source for question in load("validation", train=train, test=test)] == [f"{test}:1", f"{test}:2"]
    assert load("validation", train=train) == []
    data = FileQuestions(train=train, validation=test)
    with pytest.raises(ValueError, match=r"FileQuestions to have test questions for the stage `test`, but it has none"):
        data.setup("test")


def test_arguments_of_the_base_are_on_the_command_line():
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(FileQuestions, "data")
    config = parser.parse_args(["--data.train=a.json", "--data.batch_size=3", "--data.limit_val=5"])
    data = parser.instantiate_classes(config).data
    assert (data.files["train"], data.batch_size, data.limits["validation"]) == ("a.json", 3, 5)


# --- splits and loaders ---


def test_splits_are_loaded_once_and_limited():
    data = Numbers(train=9, validation=8, test=6, limit_train=4, limit_val=3)
    data.setup("fit")
    data.setup("validate")
    assert data.loaded == ["train", "validation"]
    data.setup()
    assert data.loaded == ["train", "validation", "test"]
    assert {split: len(questions) for split, questions in data.questions.items()} == {
        "train": 4,
        "validation": 3,
        "test": 6,
    }


def test_base_cannot_load():
    with pytest.raises(NotImplementedError, match=r"QuestionData must implement `load\(split\)`"):
        QuestionData().setup("fit")


def test_evaluation_is_in_order_and_complete():
    data = Numbers(validation=5, test=3, eval_batch_size=2)
    data.setup()
    assert [[q.index for q in batch] for batch in data.val_dataloader()] == [[0, 1], [2, 3], [4]]
    assert [[q.index for q in batch] for batch in data.test_dataloader()] == [[0, 1], [2]]


def test_training_batches_follow_the_sampler():
    data = Numbers(batch_size=2)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch == [data.questions["train"][index] for index in data.sampler.order(0)[:2]]


def each(reason):
    return lambda questions: [reason(question) for question in questions]


def test_drop_prompts():
    data = Numbers(train=6, validation=4, batch_size=1)
    data.setup("fit")
    with pytest.warns(UserWarning, match="Dropped") as caught:
        data.drop_prompts(each(lambda question: "2100 tokens, limit 2048" if question.answer in (1, 4, 5) else None))
    assert [str(warning.message) for warning in caught] == [
        "Dropped 3 of 6 train questions; the first is train:1: 2100 tokens, limit 2048.",
        "Dropped 1 of 4 validation questions; the first is validation:1: 2100 tokens, limit 2048.",
    ]
    assert data.dropped == {"train": 3, "validation": 1}
    assert [question.index for question in data.questions["train"]] == [0, 2, 3]
    with pytest.warns(UserWarning, match="Dropped 1 of 3 train"):
        data.drop_prompts(each(lambda question: "odd" if question.source == "train:3" else None))
    assert data.dropped == {"train": 4, "validation": 1}


def test_drop_all_prompts():
    data = Numbers(train=2, validation=2)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"keep at least one validation question.* 2 of 2 .*validation:0: too long"):
        data.drop_prompts(each(lambda question: "too long" if question.source.startswith("validation") else None))


def test_too_few_questions():
    data = Numbers(train=8, batch_size=4)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2, global_step=0)
    data.setup("fit")
    assert len(data.train_dataloader()) == 1
    message = r"questions, 8 \(`batch_size` 4 x 2 devices\), but got 7 \(1 were dropped\)"
    with pytest.warns(UserWarning, match="Dropped 1"), pytest.raises(ValueError, match=message):
        data.drop_prompts(each(lambda question: "too long" if question.index == 0 else None))
    with pytest.raises(ValueError, match=message):
        data.train_dataloader()
