"""How `pgpo ablate` starts runs: each in a process of its own, with its output in a file that it holds locked."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from typing import IO, Protocol

MESSAGE = 2**20
"""Most bytes of a request to the server."""


class RunProcess(Protocol):
    """The process of a run, which leads a session and a process group."""

    pid: int

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None if the process has not ended."""

    def wait(self) -> int:
        """Wait for the end of the process; return its exit status."""


class Starter(Protocol):
    """Starts runs."""

    def start(self, words: list[str], log: IO[bytes]) -> RunProcess:
        """Start a run.

        Args:
            words: Arguments of the program.
            log: File of its output. Its lock is held until the run and all of its children have ended.
        """

    def close(self) -> None:
        """Release what was needed to start runs, all of which have ended."""


class SeparateProcesses:
    """Starts each run as a program. This is for systems other than Linux.

    Args:
        program: Module of the program.
    """

    def __init__(self, program: str) -> None:
        self.program = program

    def start(self, words: list[str], log: IO[bytes]) -> "subprocess.Popen[bytes]":
        """See :meth:`Starter.start`."""
        return subprocess.Popen(  # noqa: S603  (our own program)
            [sys.executable, "-m", self.program, *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )

    def close(self) -> None:
        """See :meth:`Starter.close`."""


class RunServer:
    """Starts runs from a process that has imported what they need, see :mod:`pgpo_lightning.commands.run_server`. Linux only.

    The server starts with the first run. It ends with this object, and is killed with the thread that started it. Its runs are
    killed with it.

    Args:
        program: Module of the program.
        modules: What the server imports. None of them may start a thread or use a GPU.
    """

    def __init__(self, program: str, modules: tuple[str, ...]) -> None:
        self.program, self.modules = program, modules
        self._server: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def start(self, words: list[str], log: IO[bytes]) -> "_ForkedRun":
        """See :meth:`Starter.start`."""
        if self._server is None or self._server.poll() is not None:
            self.close()
            self._launch()
        pid = self.ask(words, log)
        if pid is None:
            raise ConnectionError("Expected the number of the run, but the server sent none.")
        return _ForkedRun(self, pid)

    def ask(self, request: list[str] | int, log: IO[bytes] | None = None) -> int | None:
        """Return the server's answer to a request.

        Raises:
            ConnectionError: If the server has ended.
        """
        if self._channel is None:
            raise ConnectionError("There is no server.")
        socket.send_fds(self._channel, [json.dumps(request).encode()], [] if log is None else [log.fileno()])
        answer = self._channel.recv(MESSAGE)
        if not answer:
            raise ConnectionError("The server has ended.")
        number: int | None = json.loads(answer)
        return number

    def close(self) -> None:
        """See :meth:`Starter.close`."""
        if self._channel is not None and self._server is not None:
            self._channel.close()
            self._server.wait()
            self._channel = self._server = None

    def _launch(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(  # noqa: S603  (our own program)
                [
                    sys.executable,
                    "-m",
                    "pgpo_lightning.commands.run_server",
                    str(theirs.fileno()),
                    self.program,
                    *self.modules,
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=_environment(),
                start_new_session=True,
                preexec_fn=partial(kill_with_parent, os.getpid()),
            )


class _ForkedRun:
    """A run that the server has started."""

    def __init__(self, server: RunServer, pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """See :meth:`RunProcess.poll`."""
        if self.returncode is None:
            try:
                self.returncode = self.server.ask(self.pid)
            except ConnectionError:  # runs are killed with the server
                self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self) -> int:
        """See :meth:`RunProcess.wait`."""
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code


def kill_with_parent(parent: int) -> None:
    """Let this new process be killed when its parent, or the thread of it that started this process, ends in any way. Linux only.

    Args:
        parent: Number of the parent, which may have ended already.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if os.getppid() != parent:  # the parent ended before the call above
        os.kill(os.getpid(), signal.SIGKILL)


def _environment() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", **os.environ}
