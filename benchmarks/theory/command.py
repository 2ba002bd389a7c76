"""A research note as a program: a function's arguments on the command line, user errors in one line, results as files."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jsonargparse
from transformers.utils import logging as transformers_logging

from pgpo_lightning.core.errors import error_report
from pgpo_lightning.core.files import output_folder, plain, replacing, write_json, write_text


def run(note: Callable[..., Any], args: list[str] | None = None) -> None:
    """Call a function with arguments from the command line.

    Args:
        note: Its parameters become options, its docstring the help.
        args: Without the program's name; by default those of the process.

    Raises:
        SystemExit: With what is to be told of an error of the function.
    """
    parser = jsonargparse.ArgumentParser(description=(note.__doc__ or "").splitlines()[0])
    parser.add_function_arguments(note, as_group=False)
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        note(**vars(instantiate(parser.parse_args(args))))
    except Exception as error:
        sys.exit(error_report(error, None))


def write_note(
    folder: Path, name: str, markdown: str, content: dict[str, Any], draw: Callable[[IO[bytes]], None]
) -> dict[str, Any]:
    """Write ``name.md``, ``name.json`` and ``name.png`` into a folder, which is created if needed.

    Args:
        folder: Folder of the files.
        name: Name of the files, without the suffix.
        markdown: The report.
        content: What the report was made from.
        draw: Writes a PNG to an open file.

    Returns:
        The content with six significant digits, and None for numbers that are not finite.

    Raises:
        FileExistsError: If `folder` is a file.
    """
    output_folder(folder)
    rounded = plain(content, digits=6)
    write_text(folder / f"{name}.md", markdown)
    write_json(folder / f"{name}.json", rounded, indent=1, allow_nan=False)
    with replacing(folder / f"{name}.png") as file:
        draw(file.stream)
    return rounded
