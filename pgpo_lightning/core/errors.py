"""User errors are printed as a short message; every other error leaves a traceback in a file, for a bug report.

An error is a user error because of where it was raised, not of its type alone: a ``ValueError`` of a check of this package
concerns a setting or a file, but one from within a training step is a bug.
"""

import errno
import os
import platform
import re
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "pgpo-lightning",
    "torch",
    "lightning",
    "transformers",
    "peft",
    "jsonargparse",
    "datasets",
    "vllm",
    "bitsandbytes",
)
MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.EIO
}  # fmt: skip
"""Disk full, permission denied and so on: user errors wherever they are raised."""
OPENING = MACHINE | {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST}

USER_ERROR = 2
"""Exit status of the program after a user error. After any other error it is 1."""
MOST_LINES = 6
"""Longest message of a user error, in lines."""


class UserError(ValueError):
    """A library refused a value that a user gave."""


class VerifierError(RuntimeError):
    """A verifier raised, or returned something that is not a finite reward."""


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn errors of libraries about something that a user named into a :class:`UserError`.

    Args:
        what: The thing that was named, such as ``the model `a/b```.

    Raises:
        UserError: In place of `OSError`, `ValueError` and `ImportError`.
    """
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if is_user_error(error):
            raise
        raise UserError(f"Expected {what} to be usable, but {_first_line(error)}") from error


def is_user_error(error: BaseException) -> bool:
    """Return whether a user can correct an error without its traceback."""
    # Not at the top, because it imports all of Lightning.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, (UserError, MisconfigurationException, VerifierError)):
        return True
    if isinstance(error, OSError) and error.errno in MACHINE:
        return True
    if isinstance(error, OSError) and error.filename is not None and error.errno in OPENING:
        return not _from_a_step(error)
    origin = raised_by(error).split(".")[0]
    if origin in ("lightning", "jsonargparse"):  # on settings
        return isinstance(error, ValueError) and not _from_a_step(error)
    return origin == "pgpo_lightning" and str(error).startswith("Expected ")


def raised_by(error: BaseException) -> str:
    """Return the module whose code raised an error."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def _from_a_step(error: BaseException) -> bool:
    steps = ("training_step", "validation_step", "test_step")
    return any(frame.f_code.co_name in steps for frame, _ in traceback.walk_tb(error.__traceback__))


def _first_line(error: BaseException) -> str:
    name = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return name + next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason was given")


def one_line(error: BaseException) -> str:
    """Return one line for a user error: the message of a class about its arguments, not everything that jsonargparse tried."""
    message = re.search(r"^ *- (Expected .*`.*)$", str(error), re.MULTILINE)
    if message:
        return message[1]
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def error_report(error: BaseException, folder: Path | None) -> str:
    """Return the text to print for an error that ends the program.

    Args:
        error: The error, with its traceback.
        folder: Of the run, for the traceback of an error that is not a user error; without one the traceback is in the text.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))))
    prefix = f"error (rank {rank})" if rank else "error"
    if is_user_error(error):
        lines = one_line(error).splitlines()
        lines = [*lines[: MOST_LINES - 2], "..."] if len(lines) >= MOST_LINES else lines
        return "\n".join([f"{prefix}: {lines[0]}", *lines[1:], "(PGPO_TRACEBACK=1 shows where)"])
    name = (
        type(error).__name__
        if type(error).__module__ == "builtins"
        else f"{type(error).__module__}.{type(error).__name__}"
    )
    line = f"{prefix}: {name}: {_first_line(error).removeprefix(f'{type(error).__name__}: ')}"
    text = "".join(traceback.format_exception(error))
    if folder is None:
        return f"{text}{line}"
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = folder / f"error-{stamp}{f'-rank{rank}' if rank else ''}.txt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{_circumstances()}\n\n{text}", encoding="utf-8")
    except OSError as second:
        return f"{text}{line}\n({path} could not be written: {second.strerror})"
    return f"{line}\nThis is a bug of the program, or of your own code. The traceback: {path}"


def _circumstances() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    command = f"{shlex.join(sys.orig_argv)}\nin {Path.cwd()}"
    return f"{command}\nPython {platform.python_version()}, {platform.platform()}\n{', '.join(found)}"
