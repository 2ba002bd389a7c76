"""What a study writes: Markdown, JSON and a picture, each whole or not at all."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def output_folder(output: str | Path) -> Path:
    """Return the folder to write into; ask before anything is computed.

    Raises:
        FileExistsError: If it is a file.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"Expected `output` to be a folder, but {folder} is a file.")
    return folder


def write_study(
    folder: Path, name: str, markdown: str, content: dict[str, Any], draw: Callable[[Path], None]
) -> dict[str, Any]:
    """Write ``name.md``, ``name.json`` and ``name.png`` into a folder, which is made if needed.

    Args:
        folder: Where.
        name: Of the files.
        markdown: The report.
        content: What it was made of.
        draw: Writes a PNG to a path.

    Returns:
        The content with six significant digits, and None where there is no number.

    Raises:
        FileExistsError: If the folder is a file.
    """
    output_folder(folder).mkdir(parents=True, exist_ok=True)
    made = plain(content)
    _whole(folder / f"{name}.md", lambda path: path.write_text(markdown, encoding="utf-8"))
    text = json.dumps(made, indent=1, allow_nan=False) + "\n"
    _whole(folder / f"{name}.json", lambda path: path.write_text(text, encoding="utf-8"))
    _whole(folder / f"{name}.png", draw)
    return made


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Return numbers with six significant digits, and None where there is none.

    Example:
        >>> plain({"a": [1 / 3, float("nan"), 2]})
        {'a': [0.333333, None, 2]}
    """
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
