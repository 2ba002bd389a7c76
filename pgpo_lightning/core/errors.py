"""What a user can mend is one line; everything else leaves a traceback that can be sent to somebody.

Which of both an error is follows from where it was raised, not from its type alone: a ``ValueError`` of a check of this package
is about a setting or a file, one from within a step of torch is a fault.
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
"""Disk full, not allowed, and so on: wherever it is raised, no line of code is to blame."""
OPENING = MACHINE | {errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST}


class UserError(ValueError):
    """Something that was given is wrong, as a library said that does not know what it was given for."""


class VerifierError(RuntimeError):
    """A verifier raised, or returned something that is not a finite reward."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Turn what libraries say about something a user named into an error of that user.

    Args:
        what: What was named, as in ``the model `a/b```.

    Raises:
        UserError: In place of `OSError`, `ValueError` and `ImportError`.
    """
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if mendable(error):
            raise
        raise UserError(f"Expected {what} to be usable, but {_first_line(error)}") from error


def mendable(error: BaseException) -> bool:
    """Tell whether a user can mend an error, and needs no traceback for it."""
    # Here, because they bring all of Lightning along.
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


def told(error: BaseException) -> str:
    """Return one line on an error that can be mended: what a class said about its arguments, not all that jsonargparse tried."""
    said = re.search(r"^ *- (Expected .*`.*)$", str(error), re.MULTILINE)
    if said:
        return said[1]
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def report(error: BaseException, folder: Path | None) -> str:
    """Return what to show of an error that ends the program.

    Args:
        error: What was raised. Has been caught, so that it has a traceback.
        folder: Of the run, for the traceback of an error that no user can mend; without one it is part of the text.
    """
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", "0"))))
    who = f"error (rank {rank})" if rank else "error"
    if mendable(error):
        return f"{who}: {told(error)}\n(PGPO_TRACEBACK=1 shows where)"
    name = (
        type(error).__name__
        if type(error).__module__ == "builtins"
        else f"{type(error).__module__}.{type(error).__name__}"
    )
    line = f"{who}: {name}: {_first_line(error).removeprefix(f'{type(error).__name__}: ')}"
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
    return f"{line}\nThis is a fault of the program or of code it was given. The traceback: {path}"


def _circumstances() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    command = f"{shlex.join(sys.orig_argv)}\nin {Path.cwd()}"
    return f"{command}\nPython {platform.python_version()}, {platform.platform()}\n{', '.join(found)}"
