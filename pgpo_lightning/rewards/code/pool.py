"""The workers: started on first use, as many as there are cores, replaced when they end, shared by all verifiers of a process."""

import atexit
import json
import os
import select
import struct
import sys
import sysconfig
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from threading import RLock
from typing import Any, Literal, cast

from pgpo_lightning.core.texts import shown

Isolation = Literal["auto", "required", "processes"]

KILLED = {"status": -9, "cpu": 0.0, "exceeded": "", "out": "", "err": "", "result": None}
"""What came out of a test that twice ended its worker."""

GRACE = 20.0
"""Seconds that a worker may need beyond a test's limit of wall clock, before it is replaced."""

LIBRARIES = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime"
)  # fmt: skip
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # the order of a set is then the same each time
    "PYTHONUTF8": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "LC_ALL": "C.UTF-8",
    "HOME": "/",
}
# Not `-I` and `-E`, with which Python would ignore the hash seed; the environment has nothing of ours anyway.
FLAGS = ("-s", "-S", "-P", "-B")
BOOT = "import sys; sys.path.insert(0, {0!r}); from process.worker import main; main()"


@dataclass
class Task:
    """The tests of one answer.

    Args:
        headers: One for each test: the program, the harness and the limits.
        rests: One for each test: its standard input, and its arguments or program.
        stops: Whether the tests after this one are not needed, given its number and what came out of it.
        replies: What came out, by number of the test.
        alone: Tests that have run with no other beside them.
    """

    headers: list[dict[str, Any]]
    rests: list[dict[str, Any]]
    stops: Callable[[int, dict[str, Any]], bool]
    replies: dict[int, dict[str, Any]] = field(default_factory=dict)
    alone: set[int] = field(default_factory=set)
    end: int = 0

    def __post_init__(self) -> None:
        """Start with all tests needed."""
        self.end = len(self.headers) - 1

    def wanted(self) -> list[int]:
        """Return the tests that are still to be run."""
        return [index for index in range(self.end + 1) if index not in self.replies]

    def put(self, index: int, reply: dict[str, Any]) -> None:
        """Note what came out of a test. The first test that stops the answer is the last one that counts."""
        self.replies[index] = reply
        if self.stops(index, reply):
            self.end = min(self.end, index)

    def take_doubtful(self) -> int | None:
        """Remove and return the first test that reached a limit of time while others ran."""
        for index in range(self.end + 1):
            if index not in self.alone and self.replies[index]["exceeded"] in ("cpu", "idle", "wall"):
                self.alone.add(index)
                del self.replies[index]
                stopping = [i for i, reply in sorted(self.replies.items()) if self.stops(i, reply)]
                self.end = min([len(self.headers) - 1, *stopping])
                return index
        return None


class Pool:
    """Workers that run tests.

    Args:
        size: Number of workers.
        isolation: ``required`` refuses to run without namespaces; ``processes`` does not use them.
        packages: Whether answers can import what is installed in this environment.
    """

    def __init__(self, size: int, isolation: Isolation, packages: bool) -> None:
        self.size, self.isolation, self.packages = size, isolation, packages
        self.lock = RLock()
        self.workers: list[Worker] = []
        self.process = os.getpid()

    def run(self, tasks: Iterable[Task]) -> None:
        """Run the tests of answers, in any order, and fill in their replies; tests that time out are then run alone.

        Raises:
            RuntimeError: If workers do not start.
        """
        tasks = list(tasks)
        with self.lock:
            try:
                self._together([(task, index) for task in tasks for index in task.wanted()])
                for task in tasks:
                    while (doubtful := task.take_doubtful()) is not None:
                        self._together([(task, doubtful)])
                        self._together([(task, index) for index in task.wanted()])  # those after it, if it has passed
            except BaseException:
                self.close()  # such as Ctrl-C: their replies would be read as those of the next tests
                raise

    def close(self) -> None:
        """End all workers."""
        while self.workers:
            self.workers.pop().stop()

    def _together(self, tests: list[tuple[Task, int]]) -> None:
        queue = deque(tests)
        tried: set[tuple[int, int]] = set()
        while True:
            while queue and queue[0][1] > queue[0][0].end:
                queue.popleft()  # it is not needed any more
            if queue and (worker := self._idle()) is not None:
                worker.send(*queue.popleft())
                continue
            busy = [worker for worker in self.workers if worker.job is not None]
            if not busy:
                return
            for worker, reply in _heard(busy):
                task, index = cast(tuple[Task, int], worker.job)
                if reply is not None:
                    worker.job = None
                    task.put(index, reply)
                    continue
                worker.stop()
                self.workers.remove(worker)
                if (id(task), index) in tried:
                    task.put(index, KILLED)
                else:  # it was killed, perhaps from outside: once more, with another worker
                    tried.add((id(task), index))
                    queue.appendleft((task, index))

    def _idle(self) -> "Worker | None":
        """Return a worker without a test, a new one if there may be more; null if all are busy."""
        if self.process != os.getpid():  # in a fork the pipes are those of the parent
            self.workers, self.process = [], os.getpid()
        idle = next((worker for worker in self.workers if worker.job is None), None)
        if idle is None and len(self.workers) < self.size:
            idle = Worker(self.isolation, self.packages)
            self.workers.append(idle)
        return idle


def _heard(busy: list["Worker"]) -> list[tuple["Worker", dict[str, Any] | None]]:
    """Wait for workers, and return those that have said something or are late (null), with what they said."""
    poll = select.poll()  # not `select.select`, whose descriptors are below 1024
    by_pipe = {worker.process.stdout.fileno(): worker for worker in busy}
    for pipe in by_pipe:
        poll.register(pipe, select.POLLIN)
    soonest = min(worker.deadline for worker in busy) - time.monotonic()
    heard = [by_pipe[pipe] for pipe, _ in poll.poll(max(0.0, soonest) * 1000 + 1)]
    late = [worker for worker in busy if worker not in heard and worker.deadline <= time.monotonic()]
    return [*((worker, worker.receive()) for worker in heard), *((worker, None) for worker in late)]


class Worker:
    """A process that runs one test at a time."""

    def __init__(self, isolation: Isolation, packages: bool) -> None:
        folder = Path(__file__).parent
        paths = sysconfig.get_paths()
        sites = sorted({paths["purelib"], paths["platlib"]}) if packages else []
        settings = {
            "hidden": [str(folder)],
            "packages": sites,
            "namespaces": isolation != "processes",
            "readable": [*LIBRARIES, paths["stdlib"], paths["platstdlib"], f"{sys.base_prefix}/lib", *sites],
        }
        command = [sys.executable, *FLAGS, "-c", BOOT.format(str(folder))]
        self.job: tuple[Task, int] | None = None
        self.deadline = 0.0
        self.process: Any = Popen(command, stdin=PIPE, stdout=PIPE, env=ENVIRONMENT, bufsize=0, cwd="/")  # noqa: S603
        try:
            self._write(settings)
            ready = self.receive()
        except BrokenPipeError:
            ready = None
        if ready is None:
            self.stop()
            raise RuntimeError(
                "Expected a process for the tests of programs to start, but it ended. See what it wrote to the error output"
            )
        if "refused" in ready:
            self.stop()
            raise RuntimeError(f"Expected to run the tests of programs safely, but {ready['refused']}")
        self.private: bool = ready["private"]
        _tell(ready, isolation)
        self._check()

    def _check(self) -> None:
        """Run a program whose outcome is known, so that a fault of the set-up is not taken for one of the answers.

        Raises:
            RuntimeError: With what the set-up says.
        """
        limits = {
            "cpu": 60.0,
            "idle": 60.0,
            "wall": 300.0,
            "memory": 2**30,
            "file": 2**20,
            "processes": 16,
            "output": 2**20,
        }
        header = {
            "code": "print(input())",
            "kind": "stdin",
            "variant": "strict",
            "context": "",
            "modules": [],
            "limits": limits,
        }
        self._write(header)
        self._write({"input": "ready", "payload": None})
        reply = self.receive() or KILLED
        if reply["out"] != "ready\n":
            self.stop()
            raise RuntimeError(
                f"Expected a program to run in the process for tests, but got {shown(reply['err'] or reply, str)}"
            )

    def send(self, task: Task, index: int) -> None:
        """Give it a test."""
        self.job = task, index
        self.deadline = time.monotonic() + task.headers[index]["limits"]["wall"] + GRACE
        with suppress(BrokenPipeError):  # then its other pipe is closed too, and `receive` says so
            self._write(task.headers[index])
            self._write(task.rests[index])

    def receive(self) -> dict[str, Any] | None:
        """Return what it says; none if it has ended."""
        head = self._exactly(4)
        body = self._exactly(struct.unpack(">I", head)[0]) if len(head) == 4 else b""
        return json.loads(body) if body else None

    def stop(self) -> None:
        """End it: between tests it ends when its input closes, else it is killed."""
        if self.job is None:
            with suppress(OSError, TimeoutExpired):
                self.process.stdin.close()
                self.process.wait(1)
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                pipe.close()
        self.process.wait()

    def _write(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        view = memoryview(struct.pack(">I", len(body)) + body)
        while view:
            view = view[self.process.stdin.write(view) :]

    def _exactly(self, count: int) -> bytes:
        parts = []
        while count and (part := self.process.stdout.read(min(count, 2**20))):
            parts.append(part)
            count -= len(part)
        return b"".join(parts) if not count else b""


_told: set[str] = set()


def _tell(ready: dict[str, Any], isolation: Isolation) -> None:
    """Say once what isolation lacks.

    Raises:
        RuntimeError: If it has to be complete.
    """
    missing = [text for text in ready["missing"] if isolation != "processes" or "`isolation`" not in text]
    if isolation == "required" and missing:
        raise RuntimeError(
            f"Expected namespaces for the tests of programs, because `isolation` is required, but got {'; '.join(missing)}. "
            "Set `isolation` to auto, or run in a container that allows user namespaces"
        )
    for text in missing:
        if text not in _told:
            _told.add(text)
            warnings.warn(f"The programs of answers run with {text}. See docs/code.md.", stacklevel=2)


def cores() -> int:
    """Return the cores for this process: those it may use, divided by the ranks of this machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


_pools: dict[tuple[int, Isolation, bool], Pool] = {}


def shared(size: int, isolation: Isolation, packages: bool) -> Pool:
    """Return the pool of this process with these settings."""
    return _pools.setdefault((size, isolation, packages), Pool(size, isolation, packages))


@atexit.register
def close_all() -> None:
    """End all workers. They also end when this process does, because their pipes close."""
    for pool in _pools.values():
        if pool.process == os.getpid():
            pool.close()
