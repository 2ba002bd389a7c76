"""Termination by a signal at a point where no progress is lost.

Before training begins, a signal ends the process at once. During training it is only recorded, except within *sections*: code
that takes long, changes no state of a checkpoint, and uses no collectives (sampling). There it raises at once. After a section
all ranks agree, so that they end at the same step even if only one of them received the signal.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
AGAIN = 1.0
"""Seconds after which a signal is a second request. Earlier ones are duplicates, sent to the process and to its group."""


class Stopped(BaseException):
    """Raised when a signal ends this process. It is not an ``Exception``, so that ``except Exception`` does not catch it.

    Args:
        number: Number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.saved: Path | str | None = None
        """The checkpoint to resume from, if there is one."""

    @property
    def status(self) -> int:
        """The exit status that tells shells and schedulers that a signal ended the process."""
        return 128 + self.number

    def __str__(self) -> str:
        where = f"; {self.saved} is the last whole step" if self.saved else ""
        return f"stopped by {signal.Signals(self.number).name}{where}"


def _gather(local: int | None) -> list[int | None]:
    from pgpo_lightning.distributed.collectives import gather  # importing torch takes seconds

    return gather(local)


class Signals:
    """The reaction of this process to signals. :data:`SIGNALS` is the only instance.

    Attributes:
        mode: Where a signal raises at once: ``anywhere``, within ``sections``, or ``never``.
        asked: The signal that was received; ``None`` before.
    """

    def __init__(self) -> None:
        self.mode: Literal["anywhere", "sections", "never"] = "anywhere"
        self.asked: int | None = None
        self._since = 0.0
        self._inside = False
        self._forward: Callable[[int], Any] | None = None
        self._before: dict[int, Any] = {}

    def listen(self, more: tuple[int, ...] = (), forward: Callable[[int], Any] | None = None) -> None:
        """Handle the signals that end a process, except those that are ignored (``nohup``, background jobs of a shell).

        Args:
            more: Further signals to handle.
            forward: Sends a signal to the ranks that this process started.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may handle signals
        if not self._before:
            self.mode, self.asked, self._inside = "anywhere", None, False
        self._forward = forward or self._forward
        for number in (*ENDING, *more):
            if number not in self._before and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._forward, self._inside = {}, None, False

    def _handle(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.asked is not None:
            # SIGTERM after SIGINT comes from a launcher such as torchrun and is not a second request of the user.
            if number == self.asked and now - self._since > AGAIN:
                self._pass_on(signal.SIGKILL)
                os._exit(128 + number)
            return
        self.asked, self._since = number, now
        self._pass_on(number)
        if self.mode == "anywhere" or self._inside:
            raise Stopped(number)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0 and sys.__stderr__ is not None:
            what = "the run is about to end" if self.mode == "never" else "the step is finished first"
            message = f"\n{signal.Signals(number).name}: {what}; once more ends it now.\n"
            os.write(sys.__stderr__.fileno(), message.encode())  # print() is not reentrant

    def _pass_on(self, number: int) -> None:
        if self._forward is not None:
            self._forward(number)

    @contextmanager
    def section(self, together: bool) -> Iterator[None]:
        """Context in which a signal raises at once.

        Args:
            together: Whether ranks agree after it. Otherwise each rank must call :meth:`agree`.

        Raises:
            Stopped: If this rank, or with ``together`` any rank, received a signal.
        """
        if self.mode != "sections":
            yield
            return
        try:
            try:
                self._inside = True
                if self.asked is not None:
                    raise Stopped(self.asked)
                yield
            finally:
                self._inside = False
            if self.asked is not None:  # the enclosed code caught the exception
                raise Stopped(self.asked)
        except Stopped:
            _gather(self.asked)
            raise
        if together:
            self.agree()

    def agree(self) -> None:
        """Exchange received signals between all ranks.

        Raises:
            Stopped: If any rank received one.
        """
        if self.mode == "sections" and (numbers := [number for number in _gather(self.asked) if number is not None]):
            raise Stopped(numbers[0])


SIGNALS = Signals()
