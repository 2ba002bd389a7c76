"""Reading responses and tests, comparing, feedback and its levels, rewards, and what is remembered."""

import json

import pytest

from pgpo_lightning.core.types import Question, Rollout
from pgpo_lightning.rewards import CodeExecution
from pgpo_lightning.rewards.code.answers import program
from pgpo_lightning.rewards.code.comparison import same_text, same_values
from pgpo_lightning.rewards.code.pool import Pool
from tests.support.programs import asked, fenced, functional, run, tested

ADD = asked(["1 2", "2 2", "10 20"], ["3", "4", "30"])


@pytest.mark.parametrize(
    ("response", "reference", "livecodebench", "strict"),
    [
        ("```python\na\n```", "a\n", "a", "a\n"),
        ("```\na\n```", "a\n", "a", "a\n"),
        ("```python\nlonger\n```\n```python\na\n```", "longer\n", "a", "a\n"),
        ("```python\na\n```\nprints\n```text\nmuch longer\n```", "much longer\n", "much longer", "a\n"),
        ("```python\na\n```\n```python\nb", "a\n", "", "a\n"),
        ("no block", None, None, None),
        ("```python\na", None, None, None),
        ("```c++\na\n```", None, "a", None),
    ],
)
def test_the_program_of_a_response(response, reference, livecodebench, strict):
    found = [program(response, variant) for variant in ("reference", "livecodebench", "strict")]
    assert found == [reference, livecodebench, strict]


@pytest.mark.parametrize(
    ("expected", "output", "official", "ours"),
    [
        ("1", "1.0", True, True),
        ("1", "1.0000000001", False, True),
        ("1", "1.001", False, False),
        ("3", "4", False, False),
        ("100000000000000000000", "100000000000000000001", False, False),
        ("a 0.5", "a  0.50", False, True),
        ("a", "A", False, False),
        ("1\n2", "1 2", False, False),
        ("1\n2", " 1 \n2\n\n", True, True),
        ("nan", "nan", True, True),
        ("1e5", "100000", True, True),
    ],
)
def test_outputs(expected, output, official, ours):
    assert (same_text(expected, output, None), same_text(expected, output, 1e-9)) == (official, ours)


def test_values():
    pairs = [
        (1, 1.0),
        (0.3, 0.1 + 0.2),
        ([1, [2]], (1, (2,))),
        ({"1": 2}, {1: 2}),
        (None, None),
        ("a", "a"),
        (10**400, 10**400),
    ]
    assert all(same_values(a, b, 1e-9) for a, b in pairs)
    others = [
        (1, True),
        (True, 1),
        (0, None),
        ("1", 1),
        ([1], [1, 2]),
        ([1], {1}),
        (0.3, 0.301),
        (1.0, 10**400),
        ({"a": 1}, {}),
    ]
    assert not any(same_values(a, b, 1e-9) for a, b in others)


WRONG = "print(5)"
ALL = (
    "Test Case 1: Wrong Answer\n\nInput\n1 2\n\nOutput\n5\n\nExpected\n3\n\n"
    "Test Case 2: Wrong Answer\n\nInput\n2 2\n\nOutput\n5\n\nExpected\n4"
)
ERROR = "def f(a):\n    return 1 / (a - 2)\nx = int(input().split()[0])\nprint(f(x))"


def test_feedback_levels():
    assert run(ADD, WRONG).feedback == ALL
    assert run(ADD, WRONG, feedback="no_expected").feedback == ALL.replace("\n\nExpected\n3", "").replace(
        "\n\nExpected\n4", ""
    )
    assert run(ADD, WRONG, feedback="verdict").feedback == "Test Case 1: Wrong Answer\n\nTest Case 2: Wrong Answer"
    assert run(ADD, WRONG, feedback="none").feedback is None
    assert run(ADD, ERROR).feedback == (
        "Runtime Error\nZeroDivisionError: division by zero\n  print(f(x))\nLine 4 in <module> (Solution.py)\n"
        "  return 1 / (a - 2)\nLine 2 in f (Solution.py)\n\nLast Executed Input\n2 2"
    )
    assert run(ADD, ERROR, feedback="verdict").feedback == "Runtime Error"


def test_the_kinds_of_failure_are_curves():
    kinds = ("no_program", "wrong_answer", "runtime_error", "time_limit")
    for code, kind in (
        (WRONG, "wrong_answer"),
        ("1/0", "runtime_error"),
        ("print(sum(map(int, input().split())))", None),
    ):
        assert run(ADD, code).curves == {name: float(name == kind) for name in kinds}
    assert CodeExecution()(ADD, "no program").curves["no_program"] == 1


def test_a_missing_program_and_a_response_that_was_cut():
    verifier = CodeExecution()
    assert verifier(ADD, "print(3)").feedback.startswith("Incorrect Format: no program was found.")
    assert verifier(ADD, "```python\nprint(3)").feedback.startswith("Incorrect Format: the response ends within")
    rollout = Rollout(ADD, [1], [2], None, "so", finished=False)
    assert verifier.grade_batch([rollout], 0)[0].feedback.startswith("Incorrect Format: the response ends within")


def test_hidden_tests_are_not_shown_but_count():
    code = "a, b = map(int, input().split())\nprint(a + b if a < 9 else 0)"
    hidden = asked(["1 2", "10 20"], ["3", "30"], public=[True, False])
    assert run(hidden, code).feedback == "Hidden Test Case: Wrong Answer"
    assert (run(hidden, code).reward, run(hidden, code, tests="public").reward) == (0, 1)
    both = run(asked(["2 2", "10 20"], ["5", "30"], public=[True, False]), code).feedback
    assert both.startswith("Test Case 1: Wrong Answer\n\nInput\n2 2\n")
    assert "10 20" not in both
    with pytest.raises(ValueError, match=r"Expected question 3 of train\.json:4 to have public tests"):
        run(asked(["1"], ["1"], public=[False]), code, tests="public")


def test_fraction():
    assert run(ADD, "print(4)", reward="fraction").reward == pytest.approx(1 / 3)
    assert run(ADD, ERROR, reward="fraction").reward == 0


def test_functions_by_name_and_context():
    question = functional([{"a": 2, "b": 3}, [5, 1]], [8, 5], context="def power(a, b): return a ** b")
    assert run(question, "def f(a: int, b: Nothing) -> int: return power(a, b)").reward == 1
    assert run(functional(["[1,\n2]"], ["[2,1]"]), "def f(a: List[int]): return a[::-1]").reward == 1
    assert "a = 2\nb = 3" in run(question, "def f(a, b): return 0").feedback


def test_test_programs():
    question = tested("assert f(1) == 2, 'one'\nassert f(2) == 3", "import math\nassert f(math.inf) == math.inf")
    assert run(question, "def f(a): return a + 1").reward == 1
    assert "AssertionError: one\n" in run(question, "def f(a): return a").feedback
    assert run(tested("assert f(1) == 2"), "def f(a): return a + 1", variant="reference").reward == 1
    with pytest.raises(ValueError, match=r"Expected question 3 of train\.json:4 to have tests of the `testtype` stdin"):
        run(question, "def f(a): return a", variant="livecodebench")


def test_the_same_answer_has_the_same_text():
    code = "import random\nclass A: pass\nprint(random.random(), {'a', 'b', 'c', 'd'}, A(), hash('x'))"
    texts = set()
    for number in range(3):
        question = asked(["1"], ["1"], time_limit=1 + number / 10)  # another question: nothing is remembered
        texts.add(run(question, code, workers=1 + number).feedback)
    assert len(texts) == 1
    assert "0x..." in texts.pop()


def test_many_at_once_are_judged_as_one_by_one_and_remembered(monkeypatch):
    codes = [WRONG, ERROR, "print(sum(map(int, input().split())))", "while True: pass", WRONG]
    question = asked(["1 2", "2 2"], ["3", "4"], time_limit=0.1)
    rollouts = [Rollout(question, [1], [2], None, fenced(code), True) for code in codes]
    verifier = CodeExecution()
    together = verifier.grade_batch(rollouts, 0)
    assert together == [CodeExecution()(question, fenced(code)) for code in codes]
    assert [each.reward for each in together] == [0, 0, 1, 0, 0]
    monkeypatch.setattr(Pool, "run", None)
    assert verifier.grade_batch(rollouts, 1) == together


def test_a_limit_of_time_is_one_of_cpu():
    question = asked(["1"], ["1"], time_limit=0.2)
    assert run(question, "import time\ntime.sleep(0.5)\nprint(1)").reward == 1
    slow = "import time\nwhile time.process_time() < 0.4: pass\nprint(1)"
    assert run(question, slow).feedback.startswith("Time Limit Exceeded")
    assert run(question, slow, time_limit=5.0).reward == 1


RECORD = {"inputs": ["1"], "outputs": ["1"], "testtype": "stdin", "fn_name": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no", "they are no JSON"),
        ("[]", "they are list"),
        ({"testtype": "x"}, "`testtype` is 'x'"),
        ({"inputs": []}, "`inputs` is"),
        ({"outputs": []}, r"`outputs` is \[\], not a list of 1"),
        ({"inputs": [1]}, "not all texts"),
        ({"time_limit": -1}, "`time_limit` is -1"),
        ({"public": [1]}, "`public` is"),
        ({"fn_name": 3}, "`fn_name` or `context` is no text"),
    ],
)
def test_faulty_tests_name_the_row(change, message):
    tests = change if isinstance(change, str) else json.dumps(RECORD | change)
    with pytest.raises(ValueError, match=f"Expected question 3 of train.json:4 to have tests .* but .*{message}"):
        CodeExecution().check_question(Question("x", tests, index=3, source="train.json:4"))


def test_faulty_arguments_name_the_test():
    verifier = CodeExecution()
    with pytest.raises(ValueError, match="to name the function that its tests call"):
        verifier.check_question(asked(["1"], ["1"], "functional"))
    with pytest.raises(
        ValueError, match=r"Expected test 2 of question 3 of train\.json:4 to have arguments and a value in JSON"
    ):
        verifier.check_question(functional(["1", "x"], ["1", "1"]))
    verifier.check_question(Question("x", "a name", columns={"tests": json.dumps(RECORD)}))
