"""A file is whole or not there; a table is Markdown; JSON is strict."""

import json
import math
import os

import pytest

from pgpo_lightning.core.files import PARTIAL, markdown_table, plain, replacing, write_bytes, write_json, write_text


def test_a_file_appears_with_its_folder_and_replaces_an_earlier_one(tmp_path):
    path = tmp_path / "a" / "b" / "run.json"
    write_json(path, {"ρ": 1.5}, ensure_ascii=False)
    assert path.read_bytes() == '{"ρ": 1.5}\n'.encode()
    write_text(path, "later")
    write_bytes(path, b"last")
    assert path.read_bytes() == b"last"
    assert os.listdir(path.parent) == ["run.json"]


def test_after_an_error_the_earlier_file_stays_and_nothing_else(tmp_path):
    path = tmp_path / "run.json"
    write_text(path, "whole")

    def fail():
        with replacing(path) as file:
            file.stream.write(b"half")
            file.stream.flush()
            assert path.read_text() == "whole"
            assert [name for name in os.listdir(tmp_path) if name.endswith(PARTIAL)]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "whole"
    assert os.listdir(tmp_path) == ["run.json"]


def test_the_name_may_follow_from_the_content(tmp_path):
    with replacing(tmp_path / "answers.jsonl") as file:
        file.stream.write(b"text")
        file.path = tmp_path / "answers-1.jsonl"
    assert os.listdir(tmp_path) == ["answers-1.jsonl"]


def test_numbers_that_are_not_finite_become_null():
    content = {"a": (1.0, math.inf), "b": [math.nan, {"c": 1 / 3}], "d": 10**20, "e": "text", "f": None}
    assert plain(content) == {"a": [1.0, None], "b": [None, {"c": 1 / 3}], "d": 10**20, "e": "text", "f": None}
    assert plain(content, digits=2)["b"] == [None, {"c": 0.33}]
    json.dumps(plain(content), allow_nan=False)


def test_a_table_has_a_rule_for_every_column():
    assert markdown_table(["", "a"], [["b", ""], ["c", "1"]], align="lr") == "|  | a |\n|---|---:|\n| b |  |\n| c | 1 |"
    assert markdown_table(["a", "b"], []) == "| a | b |\n|---|---|"
