"""The worker: reads jobs, runs each in a fresh child under limits, and writes what came out of it. It judges nothing.

A job is two frames, each four bytes of length and a body: the header (JSON: program and limits) and the rest (standard input,
and the arguments or tests). The rest is read after the fork, so the memory of the child does not hold it. Expected outputs never
come here, except for the reference's own grader, which compares in the process of the answer.
"""

import json
import os
import select
import signal
import struct
import sys
import time
from typing import Any

from . import child
from .isolate import Isolation

COMMON = (
    "bisect cmath collections copy dataclasses datetime decimal fractions functools heapq inspect io itertools "
    "json math operator pickle random re statistics string time typing"
)
"""Modules that the worker loads before its first test. Larger ones, such as NumPy, make every later test slower (a fork of more
memory): it loads them when a program mentions them."""

EARS = 0.25
"""Longest time in seconds between two looks at a test that is silent."""

BUSY = 0.0005
"""CPU seconds between two looks above which a process is not idle: one that waits for a core on a busy machine gets more."""


def main() -> None:
    """Serve jobs until the other side closes the pipe."""
    source, sink = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    settings = json.loads(_read(source) or b"{}")
    sys.path[:] = [path for path in sys.path if path not in settings["hidden"]] + settings["packages"]
    child.prepare(COMMON.split())
    isolation = Isolation()
    try:
        isolation.enter(settings["namespaces"], settings["readable"])
    except PermissionError as error:
        _write(sink, {"refused": str(error)})
        return
    _write(sink, {"missing": isolation.missing, "private": isolation.private})
    while header := _read(source):
        job = json.loads(header)
        child.prepare(job["modules"])
        _write(sink, _run(job, source, isolation))


def _read(source: int) -> bytes:
    """Read one frame; nothing if the other side has gone."""
    length = _exactly(source, 4)
    return _exactly(source, struct.unpack(">I", length)[0]) if length else b""


def _exactly(source: int, count: int) -> bytes:
    parts = []
    while count and (part := os.read(source, min(count, 2**20))):
        parts.append(part)
        count -= len(part)
    if count and parts:
        os._exit(1)  # the parent has ended in the middle of a frame
    return b"".join(parts)


def _write(sink: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    view = memoryview(struct.pack(">I", len(body)) + body)
    while view:
        view = view[os.write(sink, view) :]


def _run(job: dict[str, Any], source: int, isolation: Isolation) -> dict[str, Any]:
    limits = job["limits"]
    folder: str | None = None
    try:
        folder = isolation.open_test()
    except OSError as error:
        if isolation.private:
            raise
        isolation.missing.append(f"no working folder ({error})")
        limits["file"] = 0  # it runs in the root folder, and must not leave anything there
    pipes = {name: os.pipe() for name in ("in", "out", "err", "result", "control")}
    process = os.fork()
    if process == 0:
        ends = (pipes["in"][0], pipes["out"][1], pipes["err"][1], pipes["result"][1], pipes["control"][0])
        child.start(job, ends, lambda: isolation.restrict(folder, limits))
    for name, (reading, writing) in pipes.items():
        os.close(reading if name in ("in", "control") else writing)
    rest = json.loads(_read(source) or b"null")
    nonce = os.urandom(16)
    talk = _Talk(process, source, limits)
    talk.give(pipes["in"][1], rest["input"].encode("utf-8", "surrogatepass"))
    payload = json.dumps(rest["payload"]).encode()
    talk.give(pipes["control"][1], struct.pack(">I", len(payload)) + payload + nonce)
    for name in ("out", "err", "result"):
        talk.take(name, pipes[name][0])
    reply = talk.until_the_end()
    isolation.end_orphans(process)
    talk.rest_of_the_output()
    reply |= talk.texts(nonce)
    isolation.close_test(folder)
    return reply


class _Talk:
    """Feeds the pipes of a test and empties them, until it ends or reaches a limit.

    Args:
        process: The child.
        source: Pipe of the worker's own parent; if it closes, there is nobody to work for.
        limits: ``cpu`` in seconds of CPU time; ``idle``, seconds in which it used none; ``wall`` in seconds; ``output`` in bytes.
    """

    def __init__(self, process: int, source: int, limits: dict[str, float]) -> None:
        self.process, self.source, self.limits = process, source, limits
        self.handle = os.pidfd_open(process)
        self.poll = select.poll()
        self.poll.register(self.handle, select.POLLIN)
        self.poll.register(source, select.POLLHUP)
        self.given: dict[int, memoryview] = {}
        self.names: dict[int, str] = {}
        self.parts: dict[str, list[bytes]] = {}
        self.size = 0
        self.exceeded = ""

    def give(self, pipe: int, content: bytes) -> None:
        """Write a text to a pipe as it takes it, and close it."""
        os.set_blocking(pipe, False)
        self.given[pipe] = memoryview(content)
        self.poll.register(pipe, select.POLLOUT)

    def take(self, name: str, pipe: int) -> None:
        """Read a pipe until it closes."""
        os.set_blocking(pipe, False)
        self.names[pipe], self.parts[name] = name, []
        self.poll.register(pipe, select.POLLIN)

    def until_the_end(self) -> dict[str, Any]:
        """Wait for the end of the child, and return its status, its CPU seconds and the limit that it exceeded."""
        clock = (~self.process << 3) | 2  # CPU time of a process, see clock_getcpuclockid(3)
        start = seen = time.monotonic()
        used = idle = 0.0
        ended = False
        while not ended and not self.exceeded:
            now = time.monotonic()
            try:
                cpu = time.clock_gettime(clock)
            except OSError:  # it is ending
                cpu = used
            if now - seen >= EARS:
                idle += now - seen if cpu - used < BUSY else 0.0
                seen, used = now, cpu
            left = self.limits["cpu"] - cpu
            if left <= 0:
                self.exceeded = "cpu"
            elif idle >= self.limits["idle"]:
                self.exceeded = "idle"
            elif now - start >= self.limits["wall"]:
                self.exceeded = "wall"
            else:
                ended = self._once(int(min(EARS, max(left, 0.002)) * 1000) + 1)
        if not ended:
            signal.pidfd_send_signal(self.handle, signal.SIGKILL)
        _, status, usage = os.wait4(self.process, 0)
        cpu = usage.ru_utime + usage.ru_stime
        if not self.exceeded and cpu > self.limits["cpu"]:
            self.exceeded = "cpu"
        return {"status": os.waitstatus_to_exitcode(status), "cpu": cpu, "exceeded": self.exceeded}

    def rest_of_the_output(self) -> None:
        """Read what is in the pipes, now that nobody writes any more, and close everything."""
        while self.names and not self.exceeded and self._once(0, rest=True):
            pass
        for pipe in [*self.names, *self.given]:
            self._close(pipe)
        os.close(self.handle)

    def texts(self, nonce: bytes) -> dict[str, Any]:
        """Return outputs as text of one character per byte, and the result if it carries the nonce."""
        found = {name: b"".join(parts) for name, parts in self.parts.items()}
        result = found["result"]
        return {
            "out": found["out"].decode("latin-1"),
            "err": found["err"][-(2**16) :].decode("latin-1"),
            "result": result[16:].decode("latin-1") if result[:16] == nonce else None,
            "exceeded": self.exceeded,
        }

    def _once(self, milliseconds: int, rest: bool = False) -> bool:
        """Handle what has happened; return whether the child has ended, or with `rest` whether anything was read."""
        read = ended = False
        for pipe, event in self.poll.poll(milliseconds):
            if pipe == self.source:
                if event & select.POLLHUP:
                    os.killpg(self.process, signal.SIGKILL)
                    os._exit(0)
            elif pipe == self.handle:
                ended = True
            elif pipe in self.given:
                self._feed(pipe)
            elif pipe in self.names:
                read |= self._empty(pipe)
        return read if rest else ended

    def _feed(self, pipe: int) -> None:
        try:
            self.given[pipe] = self.given[pipe][os.write(pipe, self.given[pipe][: 2**16]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:
            self.given[pipe] = memoryview(b"")
        if not self.given[pipe]:
            self._close(pipe)

    def _empty(self, pipe: int) -> bool:
        try:
            part = os.read(pipe, 2**18)
        except BlockingIOError:
            return False
        if not part:
            self._close(pipe)
            return True
        self.size += len(part)
        if self.size > self.limits["output"]:
            self.exceeded = "output"
            return False
        self.parts[self.names[pipe]].append(part)
        return True

    def _close(self, pipe: int) -> None:
        self.poll.unregister(pipe)
        self.given.pop(pipe, None)
        self.names.pop(pipe, None)
        os.close(pipe)
