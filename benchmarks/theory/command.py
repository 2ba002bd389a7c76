"""A research note as a program: the arguments of a function on the command line, user errors as one line."""

import sys
from collections.abc import Callable
from typing import Any

import jsonargparse
from transformers.utils import logging as transformers_logging

from pgpo_lightning.core.errors import report


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
        sys.exit(report(error, None))
