"""Ending a process that is asked to end by a signal, at a place where nothing is lost.

Until training begins, a signal ends the process wherever it is. From then on it is only noted, except within *sections*: code
that takes long, changes nothing that a checkpoint holds, and exchanges nothing between ranks (sampling). There it raises at once.
Behind a section all ranks agree, so that they end at the same step even if one of them alone was asked.
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
"""Seconds after which a signal is a second request. Before, it is the first that came twice: to the process and to its group."""


class Stopped(BaseException):
    """A signal asked this process to end. No ``Exception``, so that nobody takes it for an error of something that was tried.

    Args:
        number: Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.saved: Path | str | None = None
        """The checkpoint to go on from, if there is one."""

    @property
    def status(self) -> int:
        """The exit status by which shells and schedulers know that a signal ended a process."""
        return 128 + self.number

    def __str__(self) -> str:
        where = f"; {self.saved} is the last whole step" if self.saved else ""
        return f"stopped by {signal.Signals(self.number).name}{where}"


def _gather(mine: int | None) -> list[int | None]:
    from pgpo_lightning.distributed.collectives import gather  # here, because torch takes seconds

    return gather(mine)


class Signals:
    """What this process does when it is asked to end. There is one such object, :data:`SIGNALS`, as there is one process."""

    def __init__(self) -> None:
        self.mode: Literal["anywhere", "sections", "never"] = "anywhere"
        self.asked: int | None = None
        self._since = 0.0
        self._inside = False
        self._forward: Callable[[int], Any] | None = None
        self._before: dict[int, Any] = {}

    def listen(self, more: tuple[int, ...] = (), forward: Callable[[int], Any] | None = None) -> None:
        """Take over the signals that ask for an end, but those that are ignored (``nohup``, a shell's background).

        Args:
            more: Further signals that do.
            forward: Sends a signal to the processes that this one started to share its work.
        """
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may, and only it is interrupted
        if not self._before:
            self.mode, self.asked, self._inside = "anywhere", None, False
        self._forward = forward or self._forward
        for number in (*ENDING, *more):
            if number not in self._before and signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def release(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before, self._forward, self._inside = {}, None, False

    def _handle(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.asked is not None:
            # SIGTERM behind SIGINT is not the user's second word but that of a launcher such as torchrun.
            if number == self.asked and now - self._since > AGAIN:
                self._pass_on(signal.SIGKILL)
                os._exit(128 + number)
            return
        self.asked, self._since = number, now
        self._pass_on(number)
        if self.mode == "anywhere" or self._inside:
            raise Stopped(number)
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            what = "the run is about to end" if self.mode == "never" else "the step is finished first"
            # Not print(), which must not be entered twice.
            os.write(
                sys.__stderr__.fileno(), f"\n{signal.Signals(number).name}: {what}; once more ends it now.\n".encode()
            )

    def _pass_on(self, number: int) -> None:
        if self._forward is not None:
            self._forward(number)

    @contextmanager
    def section(self, together: bool) -> Iterator[None]:
        """Let a signal end the enclosed code at once.

        Args:
            together: Whether ranks are to agree behind it. Else they do when each calls :meth:`agree`.

        Raises:
            Stopped: If this rank, or with ``together`` any rank, was asked to end.
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
            if self.asked is not None:  # and what was tried took the exception for its own
                raise Stopped(self.asked)
        except Stopped:
            _gather(self.asked)
            raise
        if together:
            self.agree()

    def agree(self) -> None:
        """Ask all ranks whether to end.

        Raises:
            Stopped: If any of them was asked to.
        """
        if self.mode == "sections" and (numbers := [number for number in _gather(self.asked) if number is not None]):
            raise Stopped(numbers[0])


SIGNALS = Signals()
