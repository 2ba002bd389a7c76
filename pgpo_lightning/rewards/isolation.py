"""Protect the training process from verifiers: working folder, output streams, torch's defaults, signal handlers."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

import torch

from pgpo_lightning.distributed.stopping import ENDING


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Restore the state of the process that the enclosed code changes.

    This covers the working folder, torch's default type and device, its gradient mode and number of threads, and the output
    streams. For random generators see :func:`pgpo_lightning.core.seeding.generators_kept`.

    Raises:
        RuntimeError: If the enclosed code closed an output stream, which is reopened.
        OSError: If the working folder was deleted.
    """
    folder: str | None = None
    with suppress(OSError):
        folder = os.getcwd()
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    open_before = [descriptor for descriptor in (1, 2) if _is_open(descriptor)]
    try:
        yield
    finally:
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        if torch.is_grad_enabled() != gradients:
            torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        closed = []
        for descriptor in open_before:
            if not _is_open(descriptor):  # all output would go into the next file that is opened
                _occupy(descriptor)
                closed.append(f"file descriptor {descriptor}")
        for name, stream in streams.items():
            if getattr(stream, "closed", False):
                stream = _reopened(name)
                closed.append(f"sys.{name}")
            setattr(sys, name, stream)
        if folder is not None:
            os.chdir(folder)
        if closed:
            raise RuntimeError(f"it closed {' and '.join(closed)}")


@contextmanager
def signals_recorded() -> Iterator[list[BaseException]]:
    """Record the exceptions that signal handlers raise (Ctrl-C: ``KeyboardInterrupt``) while the enclosed code runs.

    Handlers work as before. Their exceptions are known even if the enclosed code catches them, and are distinguished from those
    that it raises itself.

    Yields:
        The exceptions of handlers so far.
    """
    raised: list[BaseException] = []
    called: set[int] = set()

    def noting(handler: Callable[[int, FrameType | None], Any]) -> Callable[[int, FrameType | None], Any]:
        def note(number: int, frame: FrameType | None) -> Any:
            called.add(number)
            try:
                return handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return note

    before: dict[int, tuple[Any, Any]] = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread sets and runs handlers
        for number in ENDING:  # no alarms, which verifiers use to limit their time
            if callable(handler := signal.getsignal(number)):
                before[number] = handler, noting(handler)
                signal.signal(number, before[number][1])
    try:
        yield raised
    finally:
        for number, (handler, ours) in before.items():
            # A handler that ran may have installed another one, for the second Ctrl-C.
            if signal.getsignal(number) is ours or number not in called:
                signal.signal(number, handler)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _occupy(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _reopened(name: str) -> TextIO:
    original = getattr(sys, f"__{name}__")
    if original is not None and not original.closed:
        return original
    # Python does not close the descriptor together with its standard streams.
    return open({"stdout": 1, "stderr": 2}[name], "w", encoding="utf-8", errors="backslashreplace", closefd=False)
