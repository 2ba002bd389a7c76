"""The tests of a question, as the data gives them: one JSON object, the format of the SDPO repository with one addition."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal, cast

from pgpo_lightning.core.texts import shown
from pgpo_lightning.core.types import Question
from pgpo_lightning.rewards.grade import where

Kind = Literal["stdin", "functional", "code"]

COLUMN = "tests"
"""Column of a question with its tests; without it they are its answer."""


@dataclass(frozen=True)
class Tests:
    """The tests of one question.

    Args:
        kind: ``stdin``: programs read the input and print the output. ``functional``: a function is called. ``code``: the
            input is a test program, which runs after the answer and raises if the answer is wrong.
        inputs: Input of each test.
        outputs: Expected output of each test; unused for ``code``.
        function: Name of the function to call; empty for other kinds.
        time_limit: CPU seconds of one test, or null.
        context: Program that runs before the answer.
        public: Whether feedback may show a test.
    """

    kind: Kind
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    function: str
    time_limit: float | None
    context: str
    public: tuple[bool, ...]

    @cached_property
    def digest(self) -> bytes:
        """A hash of everything."""
        return hashlib.sha256(repr(self).encode("utf-8", "surrogatepass")).digest()

    def arguments(self, index: int) -> list[Any] | dict[str, Any]:
        """Return the arguments of a functional test: a list, or an object of named ones.

        As text they are JSON, one line each. Blank lines are skipped.

        Raises:
            ValueError: If a line is no JSON.
        """
        given = self.inputs[index]
        if not isinstance(given, str):
            return given if isinstance(given, (list, dict)) else [given]
        try:
            return [json.loads(line) for line in given.split("\n") if line.strip()]
        except (ValueError, RecursionError):
            return [json.loads(given)]  # one argument on several lines

    def value(self, index: int) -> Any:
        """Return the expected value of a functional test.

        Raises:
            ValueError: If it is no JSON.
        """
        given = self.outputs[index]
        return json.loads(given) if isinstance(given, str) else given


def tests_of(question: Question) -> Tests:
    """Return the tests of a question, from its column ``tests`` or its answer.

    Raises:
        ValueError: If they are not as they should be; names the question and the field.
    """
    record = question.columns.get(COLUMN, question.answer)
    try:
        return _parsed(record) if isinstance(record, str) else _read(record)
    except ValueError as error:
        raise ValueError(
            f"Expected {where(question)} to have tests in its column `{COLUMN}` or its answer, but {error}. Correct the row."
        ) from error


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Tests:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"they are no JSON: {shown(error, str, 100)}") from error
    return _read(record)


def _read(record: Any) -> Tests:
    if not isinstance(record, dict):
        raise ValueError(f"they are {type(record).__name__} {shown(record, longest=80)}, not an object")
    kind, inputs, function = record.get("testtype"), record.get("inputs"), record.get("fn_name") or ""
    outputs, limit, context = record.get("outputs"), record.get("time_limit"), record.get("context") or ""
    if kind not in ("stdin", "functional", "code"):
        raise ValueError(f"`testtype` is {shown(kind, longest=80)}, not stdin, functional or code")
    if not isinstance(inputs, list) or not inputs:
        raise ValueError(f"`inputs` is {shown(inputs, longest=80)}, not a list of at least one test")
    if kind == "code" and outputs is None:
        outputs = [""] * len(inputs)
    if not isinstance(outputs, list) or len(outputs) != len(inputs):
        raise ValueError(f"`outputs` is {shown(outputs, longest=80)}, not a list of {len(inputs)} expected outputs")
    if kind != "functional" and not all(isinstance(each, str) for each in [*inputs, *outputs]):
        raise ValueError(f"inputs and outputs of `testtype` {kind} are not all texts")
    if isinstance(limit, bool) or not (limit is None or (isinstance(limit, (int, float)) and 0 < limit <= 3600)):
        raise ValueError(f"`time_limit` is {shown(limit, longest=80)}, not null or seconds up to an hour")
    if not isinstance(function, str) or not isinstance(context, str):
        raise ValueError("`fn_name` or `context` is no text")
    public = record.get("public", [True] * len(inputs))
    if not isinstance(public, list) or len(public) != len(inputs) or not all(isinstance(each, bool) for each in public):
        raise ValueError(f"`public` is {shown(public, longest=80)}, not a list of {len(inputs)} times true or false")
    seconds = float(limit) if limit is not None else None
    return Tests(cast(Kind, kind), tuple(inputs), tuple(outputs), function, seconds, context, tuple(public))
