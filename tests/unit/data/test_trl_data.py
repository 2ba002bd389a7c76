"""Data as TRL's users have it: without an answer, as a ``datasets.Dataset``, with tools and turns that call them."""

import json

import datasets
import pytest

from pgpo_lightning.core.identity import training_sha256
from pgpo_lightning.core.types import Question
from pgpo_lightning.data import FileQuestions

TURNS = [{"role": "user", "content": "Name the star."}]
ROW = {"prompt": TURNS, "privileged_context": "It gives light.", "keyword": "sun", "level": {"a": 1}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLED = [
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "user", "content": "And plus 1?"},
]


def load(*rows, name="train.jsonl", folder=None, **settings):
    path = folder / name
    if name.endswith("parquet"):
        datasets.Dataset.from_list(list(rows)).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileQuestions(train=str(path), **settings).load("train")


def test_a_row_of_trl_needs_no_answer_and_keeps_its_columns(tmp_path):
    [question] = load(ROW, folder=tmp_path)
    assert question.answer is None
    assert question.prompt == TURNS
    assert question.privileged_context == "It gives light."
    assert question.columns == {"privileged_context": "It gives light.", "keyword": "sun", "level": {"a": 1}}
    assert question.other_columns() == {"keyword": "sun", "level": {"a": 1}}


def test_the_answer_column_stays_among_the_columns(tmp_path):
    [question] = load(ROW, folder=tmp_path, answer_column="keyword")
    assert question.answer == "sun"
    assert question.columns["keyword"] == "sun"
    [question] = load(ROW | {"answer": ""}, folder=tmp_path, answer_column=None)
    assert question.answer is None
    assert question.columns["answer"] == ""


def test_an_answer_that_some_rows_lack_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"train.jsonl:2 to have the answer in its column `answer`, but there is no"):
        load(ROW | {"answer": "sun"}, ROW, folder=tmp_path)
    with pytest.raises(ValueError, match=r"train.jsonl:1 to have the answer in its column `gold`, but there is no"):
        load(ROW, folder=tmp_path, answer_column="gold")


def test_hashes_are_those_of_questions_whose_columns_did_not_keep_the_answer():
    parts = {"prompt": "1+1?", "answer": "2", "privileged_context": "Add."}
    before = Question(**parts, columns={"level": 3})
    kept = Question(**parts, columns={**parts, "level": 3}, repeated=("answer", "privileged_context", "prompt"))
    assert training_sha256([before]) == training_sha256([kept])
    assert training_sha256([before]) != training_sha256([Question(**parts, columns={"level": 3}, tools=[TOOL])])


def test_a_data_set_object():
    table = datasets.Dataset.from_list([ROW, ROW | {"keyword": "star"}])
    data = FileQuestions(train=table, test=table.select([1]))
    first, second = data.load("train")
    assert (first.prompt, first.source, second.source) == (TURNS, "train[0]", "train[1]")
    assert second.columns["keyword"] == "star"
    assert [question.columns["keyword"] for question in data.load("validation")] == ["star"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda table: datasets.DatasetDict(test=table), "Expected `train` .*Give one of its splits, test"),
        (lambda table: table.to_iterable_dataset(), "Expected `train` to be .*Load it without streaming"),
        (lambda table: table.select([]), "Expected at least one row in `train`"),
        (lambda table: [ROW], "Expected `train` to be the path of a file or a datasets.Dataset, but got"),
        (lambda table: 3, "Expected `train` to be the path of a file or a datasets.Dataset, but got 3"),
    ],
)
def test_what_is_no_data_set_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        FileQuestions(train=make(datasets.Dataset.from_list([ROW])))


def test_a_data_set_and_a_split_of_the_hub():
    with pytest.raises(ValueError, match="one place, but got a data set and the split `train` of `dataset` a/b"):
        FileQuestions(train=datasets.Dataset.from_list([ROW]), dataset="a/b")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_tools_and_turns_that_call_them(tmp_path, name):
    calls = [{"function": {"name": "b", "arguments": {"c": "x"}}}]
    other = [CALLED[0], CALLED[1] | {"tool_calls": calls}, *CALLED[2:]]
    rows = [{"prompt": CALLED, "tools": [TOOL]}, {"prompt": other, "tools": [TOOL]}]
    first, second = load(*rows, folder=tmp_path, name=name)
    if name == "a.jsonl":
        assert first.tools == [TOOL]
    # Parquet gives all calls the keys of all: those that are null are taken out.
    assert first.prompt == [CALLED[0], {**CALLED[1], "content": ""}, *CALLED[2:]]
    assert second.prompt[1]["tool_calls"] == calls


def test_tools_as_text_and_none(tmp_path):
    assert load({"prompt": "1+1?", "tools": json.dumps([TOOL])}, folder=tmp_path)[0].tools == [TOOL]
    assert load({"prompt": "1+1?", "tools": []}, folder=tmp_path)[0].tools is None
    [question] = load({"prompt": "1+1?", "tools": "hammer"}, folder=tmp_path, tools_column="none")
    assert (question.tools, question.columns["tools"]) == (None, "hammer")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tools": "hammer"}, r"Expected JSON in column `tools` of .*train.jsonl:1"),
        ({"tools": ["hammer"]}, r"Expected a list of JSON schemas in column `tools` of .*train.jsonl:1, but got list"),
        ({"prompt": CALLED[:2]}, r"a user turn at the end .*, but got the role `assistant`"),
        ({"prompt": CALLED[:3]}, r"a user turn at the end .*, but got the role `tool`"),
        (
            {"prompt": [{"role": "assistant", "content": "x", "tool_calls": "add"}, *TURNS]},
            r"Expected `tool_calls` to be a list",
        ),
        ({"prompt": [{"role": "assistant", "content": None, "tool_calls": []}, *TURNS]}, r"texts `role` and `content`"),
        ({"prompt": [{"role": "user", "content": "x", "tool_calls": [{"a": 1}]}, *TURNS]}, r"in an assistant turn"),
    ],
)
def test_faulty_tools_are_named(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        load({"prompt": "1+1?"} | changes, folder=tmp_path)
