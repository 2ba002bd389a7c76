"""Read rows from files, and turn a row into a question or say what is wrong with it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet

from pgpo_lightning.records import Message, Question

Row = tuple[str, dict[str, Any]]
"""Where a row comes from (``file:line``), and its columns."""


def read_rows(path: str | Path) -> list[Row]:
    """Read all rows of a file.

    Args:
        path: A ``.jsonl`` or ``.json`` file (one JSON object per line, or one array of objects) or a ``.parquet`` file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is empty, is of another kind, or cannot be parsed.
    """
    path = Path(path).expanduser()
    readers: dict[str, Callable[[Path], list[Row]]] = {
        ".json": _read_json,
        ".jsonl": _read_json,
        ".parquet": _read_parquet,
    }
    if path.suffix not in readers:
        raise ValueError(f"Expected a file that ends in {', '.join(readers)}, but got {path}. Convert it.")
    if not path.is_file():
        raise FileNotFoundError(f"Expected a data file at {path}, but there is none (working folder: {Path.cwd()}).")
    rows = readers[path.suffix](path)
    if not rows:
        raise ValueError(f"Expected at least one row in {path}, but it is empty.")
    for source, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"Expected a JSON object (column: value) at {source}, but got {_short(row)}.")
    return rows


def _read_json(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {path} to be UTF-8 text, but got: {error}.") from error
    # The content decides, not the name: the `.json` files of the SDPO repository are JSON Lines.
    if text.lstrip().startswith("["):
        try:
            return [(f"{path}:{number}", row) for number, row in enumerate(json.loads(text), start=1)]
        except json.JSONDecodeError as error:
            raise ValueError(f"Expected {path} to be a JSON array, but line {error.lineno} says: {error}.") from error
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): a string may hold U+2028
        if line.strip():
            try:
                rows.append((f"{path}:{number}", json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"Expected {path} to be a JSON array, or JSON Lines (one complete object per line), but line "
                    f"{number} is no JSON: {error}."
                ) from error
    return rows


def _read_parquet(path: Path) -> list[Row]:
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"Expected {path} to be a parquet file, but got: {error}.") from error
    return [(f"{path}:{number}", row) for number, row in enumerate(table.to_pylist(), start=1)]


@dataclass
class Columns:
    """Which column of a row is what; all other columns land in ``Question.columns``.

    Args:
        prompt: The user's text, or chat messages that end with a user turn.
        answer: The gold answer.
        system: System message.
        privileged_context: Text that only the self-teacher may see.
    """

    prompt: str = "prompt"
    answer: str = "answer"
    system: str = "system"
    privileged_context: str = "privileged_context"

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
            value = row.get(column)
            if value is None or value == [] or (isinstance(value, str) and not value.strip()):
                found = f"it is {value!r}" if column in row else "there is no such column"
                raise ValueError(
                    f"Expected {source} to have the {argument} in its column `{column}`, but {found}. The row has the "
                    f"columns {', '.join(row)}: mend the row, or set `{argument}_column`."
                )
        prompt = self._prompt(row[self.prompt], source, prompt_suffix)
        system = self._text(row, self.system, source)
        if system is not None and not isinstance(prompt, str) and prompt[0]["role"] == "system":
            raise ValueError(
                f"Expected one system message at {source}, but there is one in the column `{self.system}` and one in "
                f"the messages of `{self.prompt}`. Remove one of them, or set `system_column` to another name."
            )
        named = (self.prompt, self.answer, self.system, self.privileged_context)
        return Question(
            prompt=prompt,
            answer=row[self.answer],
            system=system,
            privileged_context=self._text(row, self.privileged_context, source),
            source=source,
            columns={name: value for name, value in row.items() if name not in named},
        )

    def _prompt(self, value: Any, source: str, suffix: str) -> str | list[Message]:
        if isinstance(value, str):
            return value + suffix
        where = f"in column `{self.prompt}` of {source}"
        if not isinstance(value, list):
            raise ValueError(f"Expected a text or a list of chat messages {where}, but got {_short(value)}.")
        for message in value:
            turn = message if isinstance(message, dict) else {}
            if not (isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
                raise ValueError(
                    f"Expected chat messages with the texts `role` and `content` {where}, but got {_short(message)}."
                )
        if value[-1]["role"] != "user":
            raise ValueError(f"Expected a user turn at the end {where}, but got the role `{value[-1]['role']}`.")
        # Parquet fills keys that a message does not have (such as `name`) with None.
        turns = [{key: text for key, text in message.items() if text is not None} for message in value]
        turns[-1]["content"] += suffix
        return turns

    def _text(self, row: dict[str, Any], column: str, source: str) -> str | None:
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"Expected a text in column `{column}` of {source}, but got {_short(value)}.")
        return value if value and value.strip() else None


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"
