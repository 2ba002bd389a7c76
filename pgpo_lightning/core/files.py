"""Files that other programs read: written whole or not at all, numbers as strict JSON takes them, tables in Markdown."""

import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial"
"""Ends the name of a file that is being written."""


@dataclass
class PartialFile:
    """A file that is being written.

    Attributes:
        stream: Where its bytes go.
        path: The name that it gets once it is whole. May be changed until then, within the folder.
    """

    stream: IO[bytes]
    path: Path


@contextmanager
def replacing(path: str | Path) -> Iterator[PartialFile]:
    """Open a file that appears under its name, in place of an earlier one, only when it is whole and on the disk.

    Args:
        path: Of the file. Its folder is created.

    Yields:
        The open file. If the enclosed code raises, what was written is removed, and the earlier file stays.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that write the same file do not write into each other's bytes; the last one wins.
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            file = PartialFile(stream, path)
            yield file
            stream.flush()
            os.fsync(stream.fileno())
            if os.name == "nt":
                stream.close()  # Windows does not rename open files
            partial.replace(file.path)
        sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk, where the system supports it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file with :func:`replacing`.

    Raises:
        OSError: If the file cannot be written.
    """
    with replacing(path) as file:
        file.stream.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Write a text in UTF-8 with :func:`replacing`.

    Raises:
        OSError: If the file cannot be written.
    """
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any, **options: Any) -> None:
    """Write a value as JSON and a line break with :func:`replacing`.

    Args:
        path: Of the file.
        value: What ``json.dumps`` takes.
        options: Of ``json.dumps``, such as ``indent``.

    Raises:
        OSError: If the file cannot be written.
        ValueError, TypeError: If JSON cannot hold the value.
    """
    write_text(path, json.dumps(value, **options) + "\n")


def output_folder(output: str | Path) -> Path:
    """Return the folder that results go to. Call this before anything is computed.

    Raises:
        FileExistsError: If there is a file of this name.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"Expected `output` to be a folder, but {folder} is a file.")
    return folder


def plain(value: Any, digits: int | None = None) -> Any:
    """Return nested dictionaries and lists as strict JSON takes them: numbers that are not finite become None.

    Args:
        value: The dictionaries and lists. Tuples become lists.
        digits: Significant digits to round floats to; by default they stay as they are.

    Example:
        >>> plain({"a": [1 / 3, float("nan"), 2]}, digits=6)
        {'a': [0.333333, None, 2]}
    """
    if isinstance(value, dict):
        return {key: plain(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, digits) for each in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return value if digits is None else float(f"{value:.{digits}g}")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Return a Markdown table.

    Not the package ``tabulate``, which has no format without padding: one longer cell would change every line of a table
    that is under version control.

    Args:
        header: Titles of the columns.
        rows: Cells, already formatted.
        align: ``r`` for each column that is aligned to the right, and ``l`` for others; missing letters mean ``l``.

    Example:
        >>> print(markdown_table(["arm", "score"], [["sdpo", "0.5"]], align="lr"))
        | arm | score |
        |---|---:|
        | sdpo | 0.5 |
    """
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(header), "l")]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], f"|{'|'.join(rules)}|", *lines[1:]])
