"""Compare what a test gave with what was expected, in the process of the training."""

import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Foreign:
    """A value of a type that is not compared.

    Args:
        kind: Name of the type.
    """

    kind: str

    def __eq__(self, other: object) -> bool:
        """Return that it is nothing else, whatever its type says."""
        return False

    def __hash__(self) -> int:
        """Return the hash of its name."""
        return hash(self.kind)

    def __repr__(self) -> str:
        """Return it as feedback shows it."""
        return f"<{self.kind}>"


class Array(list[Any]):
    """The rows of an array of NumPy, which Python's ``==`` compares entry by entry."""


def decoded(report: Any) -> Any:
    """Return the value that a test's process has written; see ``process/values.py``.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(report, list):
        return [decoded(each) for each in report]
    if not isinstance(report, dict):
        return report
    try:
        ((kind, content),) = report.items()
        if kind == "int":
            return int(content, 16)
        if kind == "float":
            return float(content)
        if kind == "tuple":
            return tuple(decoded(each) for each in content)
        if kind == "array":
            return Array(decoded(each) for each in content)
        if kind == "set":
            return frozenset(decoded(each) for each in content)
        if kind == "dict":
            return {decoded(key): decoded(each) for key, each in content}
        return Foreign(str(content)[:100])
    except (TypeError, ValueError) as error:
        raise ValueError("no value") from error


def same_values(expected: Any, value: Any, tolerance: float) -> bool:
    """Return whether a result is the expected value (JSON).

    Tuples count as lists, keys of objects as their texts. A truth value is no number. Numbers are compared exactly, with the
    tolerance (relative and absolute) if one of them is a float.
    """
    if isinstance(expected, bool) or isinstance(value, bool) or expected is None or value is None:
        return expected is value
    if isinstance(expected, (int, float)) and isinstance(value, (int, float)):
        if isinstance(expected, int) and isinstance(value, int):
            return expected == value
        try:
            return math.isclose(expected, value, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:
            return expected == value
    if isinstance(expected, str):
        return isinstance(value, str) and expected == value
    if isinstance(expected, list):
        return (
            isinstance(value, (list, tuple))
            and len(expected) == len(value)
            and all(same_values(a, b, tolerance) for a, b in zip(expected, value, strict=True))
        )
    if isinstance(expected, dict) and isinstance(value, dict):
        named = {key if isinstance(key, str) else json_key(key): each for key, each in value.items()}
        return expected.keys() == named.keys() and all(
            same_values(each, named[key], tolerance) for key, each in expected.items()
        )
    return False


def json_key(key: Any) -> str:
    """Return the key of an object as JSON writes it."""
    return {True: "true", False: "false", None: "null"}[key] if key is None or isinstance(key, bool) else str(key)


def same_to_python(expected: Any, value: Any) -> bool:
    """Return whether Python says that they are equal, an outermost tuple counting as a list (LiveCodeBench)."""
    if isinstance(value, Array):
        return (
            len(value) == 1 and not isinstance(value[0], list) and value[0] == expected
        )  # the truth of a longer one is an error
    try:
        return bool((list(value) if isinstance(value, tuple) else value) == expected)
    except RecursionError:
        return False


def same_text(expected: str, output: str, tolerance: float | None) -> bool:
    """Return whether an output is the expected one: as many lines, each the same or with the same numbers.

    White space around the output and around lines does not count.

    Args:
        expected: The expected output.
        output: What was printed.
        tolerance: None for LiveCodeBench's rule: lines of numbers alone may differ in writing (``0.5``, ``0.50``). Else words are
            compared one by one, and numbers that are not whole are equal within this, relative and absolute.
    """
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (expected, output))
    if len(ours) != len(theirs):
        return False
    return all(a == b or _same_line(a.split(), b.split(), tolerance) for a, b in zip(ours, theirs, strict=True))


def _same_line(expected: list[str], output: list[str], tolerance: float | None) -> bool:
    if tolerance is None:
        try:
            return [Decimal(word) for word in expected] == [Decimal(word) for word in output]
        except (InvalidOperation, ValueError):
            return False
    return len(expected) == len(output) and all(
        _same_word(a, b, tolerance) for a, b in zip(expected, output, strict=True)
    )


def _same_word(expected: str, output: str, tolerance: float) -> bool:
    if expected == output:
        return True
    if max(len(expected), len(output)) > 400 or not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(output)):
        return False
    a, b = Decimal(expected), Decimal(output)
    if a == b or (expected.lstrip("+-").isdigit() and output.lstrip("+-").isdigit()):
        return a == b
    return abs(a - b) <= Decimal(tolerance) * max(Decimal(1), abs(a))


def parsed(text: str | None) -> dict[str, Any]:
    """Return a report as JSON; an empty object if it is none, whatever wrote it."""
    try:
        report = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}
