"""Compare two mathematical expressions with math-verify, in a separate process that can be killed."""

import json
import os
import signal
import sys
from contextlib import suppress
from subprocess import PIPE, Popen
from threading import Lock
from typing import Any

LONGEST_TIMEOUT = 3600.0
"""Largest time limit of a comparison, in seconds."""


class MathProcess:
    """math-verify in a separate process, which an alarm kills when a comparison takes too long.

    math-verify has no reliable time limit: ``9^{9^9}``, ``(e^{12})^{20}`` or twenty nested braces take minutes. A signal in this
    process would interrupt the main thread only, and not within an operation on big integers.

    Not a pool of ``concurrent.futures``, which cannot stop a worker, nor of ``pebble``, which can. A pool of pebble starts its
    workers through multiprocessing, which imports the training script again or forks a process with threads and an accelerator.
    It gives its workers no environment of their own, which decides the integers that SymPy uses. After a fork of this process its
    threads are missing.
    """

    code = r"""
import json, logging, resource, signal, sys
from math_verify import LatexExtractionConfig, parse, verify

config = [LatexExtractionConfig(boxed_match_priority=0)]
read = lambda text: parse(r"\boxed{%s}" % text, config, fallback_mode="no_fallback", parsing_timeout=None)
replies, sys.stdout = sys.stdout, sys.stderr
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
signal.signal(signal.SIGALRM, signal.SIG_DFL)  # one that is ignored would be inherited
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timeouts are off
# The first parse is slow. math-verify takes every error for a difference, that of a missing module too.
if not verify(read(r"\frac{1}{2}"), read(r"\frac{2}{4}"), timeout_seconds=None, raise_on_error=True):
    sys.exit("math-verify does not find 1/2 and 2/4 equal: install it again with its dependencies")
if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (2**32, resource.RLIM_INFINITY))
    except (ValueError, OSError):
        pass  # not every system has this limit
print("ready", file=replies, flush=True)
for line in sys.stdin:
    gold, answer, timeout = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, timeout)
    try:
        reply = bool(verify(read(gold), read(answer), timeout_seconds=None))
    except (MemoryError, RecursionError):  # no sensible answer takes 4 GiB, or a thousand levels
        reply = False
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps(reply), file=replies, flush=True)
"""

    def __init__(self) -> None:
        self.lock = Lock()
        self.process: Any = None  # it ends with this process, when its input closes

    def equal(self, gold: str, answer: str, timeout: float) -> bool:
        """Return whether two expressions are equal; False if the comparison takes too much time or memory.

        Args:
            gold: The gold answer, in LaTeX.
            answer: The answer, in LaTeX.
            timeout: Time limit in seconds.

        Raises:
            RuntimeError: If the process ends for any other reason, or does not start.
        """
        with self.lock:
            reply = ""
            try:
                # In a fork of this process `poll` reports the process of the parent as ended, so the fork starts its own.
                if self.process is None or self.process.poll() is not None:
                    self._start()
                try:
                    print(json.dumps([gold, answer, timeout]), file=self.process.stdin, flush=True)
                    reply = self.process.stdout.readline()
                except BrokenPipeError:
                    pass  # it has ended, and its status tells why
                if not reply and (status := self.process.wait()) != -signal.SIGALRM:
                    raise RuntimeError(
                        f"Expected math-verify to compare {answer[:80]!r} with {gold[:80]!r}, but its process {_ended(status)}. "
                        "See what it wrote to the standard error output"
                    )
            finally:
                # No reply after the alarm, or after Ctrl-C here: a late reply would be read as that of the next call.
                if not reply:
                    self.stop()
            return reply == "true\n"

    def _start(self) -> None:
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                with suppress(BrokenPipeError):
                    pipe.close()
        # Libraries for big integers abort where Python's own raise MemoryError.
        environment = {**os.environ, "SYMPY_GROUND_TYPES": "python", "MPMATH_NOGMPY": "1"}
        command = [sys.executable, "-c", self.code]
        self.process = Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment)  # noqa: S603
        if self.process.stdout.readline() != "ready\n":
            raise RuntimeError(
                f"Expected math-verify to start in a process of its own, but it {_ended(self.process.wait())}. See what it wrote "
                "to the standard error output; `pip install math-verify` installs a missing module"
            )

    def stop(self) -> None:
        """End the process; the next comparison starts another."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


def _ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


math_process = MathProcess()
"""Shared by all threads of this process."""
