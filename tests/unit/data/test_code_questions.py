"""Programming questions: LiveCodeBench's payload, the halves of the tests, the other formats, and faulty rows."""

import base64
import json
import os
import pickle
import zlib

import numpy as np
import pytest

from pgpo_lightning.data import CodeQuestions
from pgpo_lightning.data.code import private_tests
from pgpo_lightning.rewards import CodeExecution
from tests.support.programs import fenced


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def lcb(number, count=5, day="2025-03-01T00:00:00", **changes):
    tests = [{"input": f"{i}\n{number}", "output": str(i + number), "testtype": "functional"} for i in range(count)]
    return {
        "question_content": f"Add {number}.",
        "question_id": f"q{number}",
        "starter_code": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        ",
        "metadata": json.dumps({"func_name": "add"}),
        "private_test_cases": packed(json.dumps(tests)),
        "contest_date": day,
        "difficulty": "easy",
        "platform": "leetcode",
    } | changes


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pgpo-evil-pickle",)


def test_the_payload_is_read_as_text_alone():
    tests = [{"input": "1", "output": "2", "testtype": "stdin"}]
    assert private_tests(packed(json.dumps(tests))) == private_tests(json.dumps(tests)) == tests
    for value, message in ((Evil(), "wants to load"), (b"x", "holds bytes|wants to load"), ({"a": 1}, "holds dict")):
        with pytest.raises(ValueError, match=message):
            private_tests(packed(value))
    assert not os.path.exists("/tmp/pgpo-evil-pickle")
    for text in ("?", packed("[]")[:-9], packed("[]"), packed("x"), base64.b64encode(zlib.compress(b"")).decode()):
        with pytest.raises(ValueError):  # noqa: PT011  (each says something else)
            private_tests(text)


def test_halves_of_the_tests_are_drawn_as_the_reference_draws_them(tmp_path):
    data = CodeQuestions(written(tmp_path, lcb(1), lcb(2, 8), lcb(3, 1), lcb(4, day="2025-05-01T00:00:00")))
    train, test = data.load("train"), data.load("test")
    assert [q.answer for q in train] == [q.answer for q in test] == ["q1", "q2", "q3"]
    stream = np.random.RandomState(0)
    for half, whole, count in zip(train, test, (5, 8, 1), strict=True):
        seen, full = json.loads(half.columns["tests"]), json.loads(whole.columns["tests"])
        kept = np.sort(stream.choice(count, size=max(1, count // 2), replace=False)).tolist()
        assert seen["inputs"] == [full["inputs"][i] for i in kept]
        assert seen["outputs"] == [full["outputs"][i] for i in kept]
        assert [i for i, public in enumerate(full["public"]) if public] == kept
        assert (len(full["inputs"]), "public" in seen) == (count, False)
    assert (seen["testtype"], seen["fn_name"], seen["time_limit"]) == ("functional", "add", 6)
    assert test[0].columns["difficulty"] == "easy"


def test_the_prompt_asks_for_a_plain_function_and_both_forms_pass(tmp_path):
    path = written(tmp_path, lcb(2))
    (question,) = CodeQuestions(path, instruction="Do: {problem}").load("train")
    assert (
        question.prompt
        == "Do: Add 2.\n\nThe solution must have this signature:\n```python\ndef add(a: int, b: int) -> int:\n```"
    )
    (method,) = CodeQuestions(path, plain_function=False).load("test")
    assert "def add(self, a: int" in method.prompt
    verifier = CodeExecution()
    verifier.check_question(method)
    for code in ("def add(a, b): return a + b", "class Solution:\n    def add(self, a, b): return a + b"):
        assert verifier(method, fenced(code)).reward == 1


def test_other_formats(tmp_path):
    human = {
        "prompt": "def f(a):\n",
        "test": "def check(c):\n    assert c(1) == 2",
        "entry_point": "f",
        "task_id": "H/0",
    }
    mbpp = {
        "prompt": "Add one.",
        "code": "def f(a):\n    return a + 1",
        "test": "assert f(1) == 2",
        "test_imports": ["import math"],
        "task_id": 7,
    }
    own = {
        "prompt": "Add one.",
        "tests": {"inputs": ["1", "2"], "outputs": ["2", "3"], "testtype": "stdin", "public": [False, True]},
    }
    for kind, row, code in (
        ("humanevalplus", human, "def f(a): return a + 1"),
        ("mbppplus", mbpp, "def f(a): return a + 1"),
        ("tests", own, "print(int(input()) + 1)"),
    ):
        data = CodeQuestions(written(tmp_path, row), kind)
        for split in ("train", "validation"):
            (question,) = data.load(split)
            CodeExecution().check_question(question)
            assert CodeExecution()(question, fenced(code)).reward == 1
            assert CodeExecution()(question, fenced("def f(a): return 1")).reward == 0
    assert json.loads(data.load("train")[0].columns["tests"])["inputs"] == ["2"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": "x"}, "Expected a date in the column `contest_date` of .*rows.jsonl:1, but got None"),
        (lcb(1, private_test_cases="?"), "Expected a row in the format livecodebench at .*rows.jsonl:1"),
        ({k: v for k, v in lcb(1).items() if k != "starter_code"}, "no 'starter_code'"),
        (lcb(1, day="2024-01-01"), "Expected questions from 2025-02-01 to 2025-05-01, but there are none"),
    ],
)
def test_faulty_rows_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        CodeQuestions(written(tmp_path, row)).load("train")


def test_settings():
    with pytest.raises(ValueError, match="Expected `path` with `format` tests"):
        CodeQuestions(format="tests")
    with pytest.raises(ValueError, match="Expected `instruction` to contain"):
        CodeQuestions(instruction="Do it.")
    with pytest.raises(ValueError, match="Expected `since` to be before `until`"):
        CodeQuestions(since="2025-06-01")
    with pytest.raises(ValueError, match="Expected `until` to be a date"):
        CodeQuestions(until="May")
