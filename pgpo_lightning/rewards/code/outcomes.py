"""From what came out of a test's process to the outcome of the test."""

import json
import re
import signal
from dataclasses import dataclass, field
from typing import Any, Literal

from pgpo_lightning.core.texts import shown
from pgpo_lightning.rewards.code.comparison import decoded, json_key, parsed, same_text, same_to_python, same_values
from pgpo_lightning.rewards.code.process.reference import ERROR
from pgpo_lightning.rewards.code.records import Tests

Kind = Literal["passed", "wrong", "error", "timeout", "memory", "output"]
Variant = Literal["strict", "livecodebench", "reference"]

_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,16}\b")
_FOLDER = re.compile(r"/\S*pgpo-code-\w+|/answer\b")


@dataclass
class Outcome:
    """The outcome of one test.

    Args:
        index: Number of the test, from 0.
        kind: What happened.
        actual: What the answer gave, as text.
        expected: What it should give, as text; null if there is nothing to show.
        given: The input, as it is shown: a text, or named arguments.
        error: Lines about an error, the first ones its type and message.
        debug: What was printed for debugging (``reference``).
    """

    index: int
    kind: Kind
    actual: str = ""
    expected: str | None = None
    given: Any = None
    error: list[str] = field(default_factory=list)
    debug: str = ""


def outcome(tests: Tests, index: int, code: str, variant: Variant, reply: dict[str, Any], tolerance: float) -> Outcome:
    """Return the outcome of one test.

    Args:
        tests: Of the question.
        index: Number of the test.
        code: The program, whose lines an error shows.
        variant: Whose rules.
        reply: What came out of the test's process.
        tolerance: For numbers, see :func:`same_values`.
    """
    given, expected = tests.inputs[index], tests.outputs[index]
    shown_expected = None if tests.kind == "code" else expected if isinstance(expected, str) else as_text(expected)
    found = Outcome(index, "error", expected=shown_expected, given=given)
    report = parsed(reply["result"])
    if reply["exceeded"]:
        found.kind = "output" if reply["exceeded"] == "output" else "timeout"
        if variant == "reference" and found.kind == "output":
            found.kind, found.actual = "wrong", "Process Error: EOFError: "
        return found
    if variant == "reference":
        return _of_reference(found, report.get("record"), tests.kind)
    if "error" in report:
        found.kind, found.error = _failure(report, code)
        return found
    if reply["status"] != 0:
        found.error = [_ending(reply["status"])]
        return found
    if tests.kind == "stdin":
        found.actual = reply["out"].encode("latin-1").decode("utf-8", "replace")
        same = same_text(str(expected), found.actual, None if variant == "livecodebench" else tolerance)
        found.kind, found.actual = "passed" if same else "wrong", cleaned(found.actual.strip())
        return found
    if "value" not in report:
        found.error = [
            "The program ended before " + ("its tests did." if tests.kind == "code" else "the function returned.")
        ]
        return found
    if tests.kind == "code":
        found.kind = "passed"
        return found
    try:
        value = decoded(report["value"])
    except (ValueError, RecursionError):
        found.error = ["The result of the function cannot be read."]
        return found
    gold = tests.value(index)
    same = same_to_python(gold, value) if variant == "livecodebench" else same_values(gold, value, tolerance)
    found.kind, found.actual = "passed" if same else "wrong", cleaned(as_text(value))
    return found


def _of_reference(found: Outcome, record: Any, kind: str) -> Outcome:
    if kind == "stdin" and found.expected is not None:
        found.expected = found.expected.strip()
        found.expected = found.expected[:-1].rstrip() if found.expected.endswith("-") else found.expected
    if kind == "code":
        found.expected = ""
    if not isinstance(record, dict):
        record = {"passed": False, "actual": "Process Error: EOFError: ", "text": True, "debug": ""}
    found.actual, found.debug = cleaned(str(record.get("actual"))), cleaned(str(record.get("debug")))
    found.kind = "passed" if record.get("passed") is True else "wrong"
    if found.kind == "wrong" and record.get("text") and found.actual.startswith(ERROR):
        found.kind, found.error = "error", [found.actual[len(ERROR) :]]
    return found


def _failure(report: dict[str, Any], code: str) -> tuple[Kind, list[str]]:
    name, message = str(report["error"])[:100], cleaned(str(report.get("message", "")))
    lines = [f"{name}: {message}"]
    source = code.split("\n")
    for place in report.get("places", []):
        number, function = int(place[0]), str(place[1])[:100]
        if 0 < number <= len(source) and source[number - 1].strip():
            lines.append(f"  {source[number - 1].strip()[:200]}")
        lines.append(f"Line {number} in {function} (Solution.py)")
    return ("memory" if name == "MemoryError" else "error"), lines


def _ending(status: int) -> str:
    if status >= 0:
        return f"The program ended with exit status {status}."
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"The program was ended by {name}."


def cleaned(text: str) -> str:
    """Return a text that is the same in each run and can be encoded: without memory addresses, folders and half characters."""
    text = _FOLDER.sub(".", _ADDRESS.sub("0x...", text))
    return text.encode("utf-8", "backslashreplace").decode()


def as_text(value: Any) -> str:
    """Return a result as feedback shows it: JSON, as far as there is JSON for it.

    Example:
        >>> as_text([True, (1, "a"), {1: None}, frozenset({2, 1})])
        '[true, [1, "a"], {"1": null}, {1, 2}]'
    """
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(as_text(each) for each in value)}]"
    if isinstance(value, dict):
        names = (json.dumps(key if isinstance(key, str) else json_key(key)) for key in value)
        return f"{{{', '.join(f'{name}: {as_text(each)}' for name, each in zip(names, value.values(), strict=True))}}}"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(as_text(each) for each in value)) + "}"
    if isinstance(value, int) and not isinstance(value, bool):
        return shown(value)
    if value is None or isinstance(value, (bool, str, float)):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
