"""The process of one test: set up the standard streams, restrict the process, run the grader's harness, and end."""

import importlib
import json
import os
import random
import signal
import struct
import sys
from collections.abc import Callable
from typing import Any

from . import livecodebench, reference, strict

HARNESSES: dict[str, Callable[[dict[str, Any], "Channel"], None]] = {
    "livecodebench": livecodebench.run,
    "reference": reference.run,
    "strict": strict.run,
}


class Channel:
    """The child's side of the channel beside the standard streams.

    What comes from the worker is read when it is needed: the arguments or tests once the answer's program is loaded, the nonce
    once the result stands. So while the program is loaded this process knows neither.
    """

    def __init__(self, result: int, control: int) -> None:
        self._result, self._control = result, control
        self._loads = json.JSONDecoder().decode  # not `json.loads`, which an answer may have replaced
        self._unread = True

    def payload(self) -> Any:
        """Return the arguments, the tests, or null."""
        self._unread = False
        return self._loads(self._exactly(struct.unpack(">I", self._exactly(4))[0]).decode("ascii"))

    def report(self, text: str) -> None:
        """Write a result (JSON in ASCII) after the nonce, which comes after the payload."""
        if self._unread:
            self.payload()
        view = memoryview(self._exactly(16) + text.encode("ascii"))
        while view:
            view = view[os.write(self._result, view) :]

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count and (part := os.read(self._control, count)):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)


def prepare(modules: list[str]) -> None:
    """Load modules in the worker, so that a test need not."""
    for name in modules:
        if name not in sys.modules:
            try:
                importlib.import_module(name)
            except ImportError:
                continue


def start(job: dict[str, Any], ends: tuple[int, int, int, int, int], restrict: Callable[[], None]) -> None:
    """Run a test in this process, a child of the worker, and end the process.

    Args:
        job: The program, and the names of harness and kind.
        ends: Descriptors: standard input, output and error, result, control.
        restrict: Takes away what the test must not have.
    """
    status = 70
    try:
        os.setsid()
        kept = [os.dup2(end, 200 + i) for i, end in enumerate(ends)]
        for i in range(3):
            os.dup2(kept[i], i)
        os.dup2(kept[3], 3)
        os.dup2(kept[4], 4)
        os.closerange(5, 256)
        restrict()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        random.seed(0)
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed(0)  # type: ignore[attr-defined]
        sys.argv = ["Solution.py"]
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        channel = Channel(3, 4)
    except BaseException as error:  # this is a failure of ours, not of the answer
        os.write(2, f"{type(error).__name__}: {error}".encode())
        os._exit(status)
    try:
        HARNESSES[job["variant"]](job, channel)
        status = 0
    except SystemExit as end:
        status = exit_status(end)
    except BaseException:
        status = 1
    finally:
        status = _finish(status)
        os._exit(status)


def exit_status(end: SystemExit) -> int:
    """Return the exit status that Python gives a program which raises this."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    return 1


def _finish(status: int) -> int:
    """Do what Python does at the end of a program: wait for its threads, call its exit functions, write out its buffers."""
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # type: ignore[attr-defined]
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()  # type: ignore[attr-defined]
    except BaseException:
        status = status or 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            status = status or 1
    return status
