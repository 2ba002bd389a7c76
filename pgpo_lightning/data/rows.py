"""Read rows from files, and turn a row into a question or raise an error that names the row."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet

from pgpo_lightning.core.texts import is_text, shown
from pgpo_lightning.core.types import Message, Question

DEEPEST = 100
"""Largest nesting depth of lists and objects in a column."""

RawRow = tuple[str, dict[str, Any]]
"""Where a row comes from (``file:line``), and its columns."""


def read_rows(path: str | Path) -> list[RawRow]:
    """Read all rows of a file.

    Args:
        path: A ``.jsonl`` or ``.json`` file (one JSON object per line, or one array of objects) or a ``.parquet`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, is of another kind, or cannot be parsed.
    """
    if "://" in str(path):
        raise ValueError(
            f"Expected the path of a file, but got {path}. Download it, or name a data set of the Hub in `dataset`."
        )
    path = Path(path).expanduser()
    readers: dict[str, Callable[[Path], list[RawRow]]] = {
        ".json": _read_json,
        ".jsonl": _read_json,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise ValueError(f"Expected a file that ends in {', '.join(readers)}, but got {path}. Convert it.")
    if path.exists() and not path.is_file():
        raise ValueError(f"Expected a file at {path}, but it is a {'folder' if path.is_dir() else 'pipe or device'}.")
    if not path.is_file():
        raise FileNotFoundError(f"Expected a data file at {path}, but there is none (working folder: {Path.cwd()}).")
    rows = readers[path.suffix](path)
    if not rows:
        raise ValueError(f"Expected at least one row in {path}, but it is empty.")
    check_rows(rows)
    return rows


def check_rows(rows: list[RawRow]) -> None:
    """Raise if a row is no mapping, or has a value that cannot be tokenized or written to a file.

    Raises:
        ValueError: Names the row and the column.
    """
    for source, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"Expected a JSON object (column: value) at {source}, but got {_typed(row)}.")
        for column, value in row.items():
            check_value(value, f"column {_named(column)} of {source}")
            check_value(column, f"the name of column {_named(column)} of {source}")


def _read_json(path: Path) -> list[RawRow]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {path} to be UTF-8 text, but got: {error}.") from error
    # The content decides, not the name: the `.json` files of the SDPO repository are JSON Lines.
    if text.lstrip().startswith("["):
        try:
            return [(f"{path}:{number}", row) for number, row in enumerate(_parsed(text), start=1)]
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected {path} to be a JSON array, but line {error.lineno} says: {error}.") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"Expected {path} to be a JSON array of rows, but {_reason(error)}.") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): a string may hold U+2028
        if line.strip():
            try:
                rows.append((f"{path}:{number}", _parsed(line)))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"Expected {path} to be a JSON array, or JSON Lines (one complete object per line), but line "
                    f"{number} is no JSON: {error}."
                ) from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"Expected a row at {path}:{number}, but {_reason(error)}.") from error
    return rows


def _parsed(text: str) -> Any:
    """Parse JSON, and raise where Python would not: for a name that occurs twice, and a number too large for a float.

    NaN and Infinity are read; they are not JSON, but many programs write them.
    """
    return json.loads(text, object_pairs_hook=_object, parse_float=_float)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {_named(twice)} occurs twice in one object")
    return result


def _float(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"the number {text[:40]} is too large for a float")
    return number


def _reason(error: Exception) -> str:
    return f"it has more than {DEEPEST} levels" if isinstance(error, RecursionError) else str(error)


def check_value(value: Any, where: str, depth: int = 0) -> None:
    """Raise if a value cannot be tokenized or written to a file, at any depth.

    Raises:
        ValueError: If a text has a lone surrogate (half of a character), or if containers are nested too deeply.
    """
    if isinstance(value, str):
        if not is_text(value):
            raise ValueError(
                f"Expected whole characters in {where}, but got {_typed(value)}, which has half of one (a lone surrogate). "
                "Correct the row: the program that wrote it has cut a character in two."
            )
    elif isinstance(value, (dict, list, tuple)):
        if depth >= DEEPEST:
            raise ValueError(f"Expected at most {DEEPEST} levels in {where}, but it has more.")
        for each in [*value, *value.values()] if isinstance(value, dict) else value:
            check_value(each, where, depth + 1)


def _read_parquet(path: Path) -> list[RawRow]:
    try:
        # Not `read_table`, which makes columns of folders named like `lr=1`.
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"Expected {path} to be a parquet file, but got: {shown(' '.join(str(error).split()), str)}."
        ) from error
    names = table.column_names
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"Expected different names of the columns of {path}, but {_named(twice[0])} occurs twice. Rename one."
        )
    columns = [
        _as_python(column, f"column {_named(name)} of {path}")
        for name, column in zip(names, table.columns, strict=True)
    ]
    return [
        (f"{path}:{number}", dict(zip(names, row, strict=True)))
        for number, row in enumerate(zip(*columns, strict=True), start=1)
    ]


def _as_python(column: pyarrow.ChunkedArray, where: str) -> list[Any]:
    result = []
    for number, scalar in enumerate(column, start=1):
        try:
            result.append(scalar.as_py())
        except (
            ValueError,
            OverflowError,
            ImportError,
            pyarrow.ArrowException,
        ) as error:  # such as a date after the year 9999
            raise ValueError(f"Expected a value that Python can hold in {where}:{number}, but got: {error}.") from error
    return result


@dataclass
class Columns:
    """The columns of a row with a meaning. All but the prompt are in ``Question.columns`` too.

    Args:
        prompt: The user's text, or chat messages that end with a user turn.
        answer: The gold answer; null for none.
        system: System message.
        privileged_context: Text that only the self-teacher may see.
        tools: JSON schemas of tools, as a list or as a text.
    """

    prompt: str = "prompt"
    answer: str | None = "answer"
    system: str = "system"
    privileged_context: str = "privileged_context"
    tools: str = "tools"

    def to_question(self, row: dict[str, Any], source: str, prompt_suffix: str = "") -> Question:
        """Turn a row into a question.

        Args:
            row: The columns.
            source: Where the row comes from, for error messages.
            prompt_suffix: Text that is appended to the last user turn.

        Raises:
            ValueError: If the prompt or the answer is missing, or if a column is not what it should be.
        """
        for argument in ("prompt", "answer"):
            column = getattr(self, argument)
            if column is None:
                continue
            value = row.get(column)
            if _is_missing(value):
                found = f"it is {value!r}" if column in row else "there is no such column"
                raise ValueError(
                    f"Expected {source} to have the {argument} in its column `{column}`, but {found}. The row has the "
                    f"columns {', '.join(row)}. Correct the row, or set `{argument}_column`."
                )
        prompt = self._prompt(row[self.prompt], source, prompt_suffix)
        system = self._text(row, self.system, source)
        if system is not None and not isinstance(prompt, str) and prompt[0]["role"] == "system":
            raise ValueError(
                f"Expected one system message at {source}, but there is one in the column `{self.system}` and one in "
                f"the messages of `{self.prompt}`. Remove one of them, or set `system_column` to another name."
            )
        named = [self.system, self.privileged_context, self.tools, *([] if self.answer is None else [self.answer])]
        return Question(
            prompt=prompt,
            answer=None if self.answer is None else row[self.answer],
            system=system,
            privileged_context=self._text(row, self.privileged_context, source),
            source=source,
            columns={name: value for name, value in row.items() if name != self.prompt},
            tools=self._tools(row.get(self.tools), source),
            repeated=tuple(name for name in row if name in named and name != self.prompt),
        )

    def _tools(self, value: Any, source: str) -> list[dict[str, Any]] | None:
        if isinstance(value, str) and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"Expected JSON in column `{self.tools}` of {source}, but got: {error}.") from error
        if _is_missing(value):
            return None
        if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
            raise ValueError(
                f"Expected a list of JSON schemas in column `{self.tools}` of {source}, but got {_typed(value)}. Correct "
                "the row, or set `tools_column` to another name."
            )
        return [without_nulls(tool) for tool in value]

    def _prompt(self, value: Any, source: str, suffix: str) -> str | list[Message]:
        if isinstance(value, str):
            return value + suffix
        where = f"in column `{self.prompt}` of {source}"
        if not isinstance(value, list):
            raise ValueError(f"Expected a text or a list of chat messages {where}, but got {_typed(value)}.")
        for message in value:
            turn = message if isinstance(message, dict) else {}
            if _calls_tools(turn) and turn.get("content") is None:
                continue
            if not (isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
                raise ValueError(
                    f"Expected chat messages with the texts `role` and `content` {where}, but got {_typed(message)}."
                )
            if turn.get("tool_calls") and not _calls_tools(turn):
                raise ValueError(
                    f"Expected `tool_calls` to be a list of objects in an assistant turn {where}, but got {_typed(message)}."
                )
            if not turn["content"].strip() and not turn.get("tool_calls"):
                raise ValueError(
                    f"Expected a text in every chat message {where}, but the `content` of {_typed(message)} is blank."
                )
        if value[-1]["role"] != "user":
            raise ValueError(f"Expected a user turn at the end {where}, but got the role `{value[-1]['role']}`.")
        # Parquet fills keys that a message does not have (such as `name`) with None.
        turns = [
            {"content": "", **without_nulls(message)}
            if _calls_tools(message)
            else {key: text for key, text in message.items() if text is not None}
            for message in value
        ]
        turns[-1]["content"] += suffix
        return turns

    def _text(self, row: dict[str, Any], column: str, source: str) -> str | None:
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"Expected a text in column `{column}` of {source}, but got {_typed(value)}.")
        return value if value and value.strip() else None


def _calls_tools(turn: dict[str, Any]) -> bool:
    """Whether a turn is an assistant's with tool calls."""
    calls = turn.get("tool_calls")
    well_formed = isinstance(calls, list) and bool(calls) and all(isinstance(call, dict) for call in calls)
    return turn.get("role") == "assistant" and well_formed


def without_nulls(value: Any) -> Any:
    """Return nested data without the keys that are null: parquet gives all objects of a column the same keys.

    Example:
        >>> without_nulls({"name": "add", "arguments": {"a": 1, "of another call": None}})
        {'name': 'add', 'arguments': {'a': 1}}
    """
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _is_missing(value: Any) -> bool:
    if isinstance(value, (float, Decimal)):
        return value != value
    return (
        value is None
        or (isinstance(value, (list, dict)) and not value)
        or (isinstance(value, str) and not value.strip())
    )


def _typed(value: Any) -> str:
    return f"{type(value).__name__} {shown(value, longest=80)}"


def _named(column: str) -> str:
    return f"`{column if is_text(column) else ascii(column)[1:-1]}`"
