"""The process from which `pgpo ablate` starts its runs."""

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from pgpo_lightning.commands import ablate as command
from pgpo_lightning.commands.run_processes import RunServer, SeparateProcesses
from tests.support import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every run is a program of its own")

PROGRAM = """
import atexit, json, os, random, sys, threading
atexit.register(print, "at exit")
what = sys.argv[1]
if what == "state":
    before = [len(os.environ.get("LEFT", "")), hasattr(sys, "left"), __name__, sys.modules["__main__"].__spec__.name]
    os.environ["LEFT"], sys.left = "x", True
    print(json.dumps([*before, sys.stdin.read(), os.getsid(0) == os.getpid() == os.getpgrp(), os.getcwd(), random.random()]))
elif what == "cuda":
    import torch
    loaded = "pgpo_lightning.commands.fit" in sys.modules
    print(loaded, torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork(), len(os.listdir("/proc/self/task")))
elif what == "exit":
    sys.exit(eval(sys.argv[2]))
elif what == "wait":
    import subprocess, time
    print(os.getppid(), flush=True)
    subprocess.Popen(["sleep", "60"]) if sys.argv[2:] else None
    time.sleep(60)
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.chdir(tmp_path)
    server = RunServer("program", ())
    yield server
    server.close()


def started(server, log, *words):
    with log.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return server.start([*words], file)


def output(server, log, *words):
    code = started(server, log, *words).wait()
    return code, log.read_text().splitlines()


def test_a_run_is_a_program_and_leaves_nothing_to_the_next(server, tmp_path):
    runs = [output(server, tmp_path / str(i), "state") for i in range(2)]
    runs.append(output(SeparateProcesses("program"), tmp_path / "separate", "state"))
    drawn = set()
    for code, (line, end) in runs:
        *state, number = eval(line.replace("true", "True").replace("false", "False"))
        assert state == [0, False, "__main__", "program", "", True, str(tmp_path)]
        assert (code, end) == (0, "at exit")
        drawn.add(number)
    assert len(drawn) == 3


@pytest.mark.parametrize(
    ("value", "code", "text"), [("3", 3, []), ("None", 0, []), ("'broken'", 1, ["broken"]), ("1/0", 1, None)]
)
def test_the_exit_status_is_that_of_a_program(server, tmp_path, value, code, text):
    for each in (server, SeparateProcesses("program")):
        found, lines = output(each, tmp_path / type(each).__name__, "exit", value)
        assert found == code
        assert lines[-2:-1] == ["ZeroDivisionError: division by zero"] if text is None else lines[:-1] == text


def test_what_is_imported_leaves_gpus_alone_and_starts_no_thread(server, tmp_path):
    server = RunServer("program", command.IMPORTED)
    code, (line, _) = output(server, tmp_path / "log", "cuda")
    server.close()
    assert (code, line) == (0, "True False False 1")


def held(log):
    with log.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_runs_end_with_the_server_and_a_new_one_takes_its_place(server, tmp_path):
    first, second = (tmp_path / name for name in "ab")
    run = started(server, first, "wait")
    until(first.read_text)
    assert held(first)
    assert run.poll() is None
    os.kill(int(first.read_text()), signal.SIGKILL)
    until(lambda: not held(first))
    assert run.poll() == -signal.SIGKILL
    assert output(server, second, "exit", "0")[0] == 0


def test_a_closed_server_has_no_runs(server, tmp_path):
    started(server, tmp_path / "log", "wait")
    until((tmp_path / "log").read_text)
    server.close()
    until(lambda: not held(tmp_path / "log"))


def test_children_of_a_run_hold_its_lock_and_end_with_its_group(server, tmp_path):
    run = started(server, tmp_path / "log", "wait", "with a child")
    until(lambda: Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text())
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert held(tmp_path / "log")
    os.killpg(run.pid, signal.SIGKILL)
    until(lambda: not held(tmp_path / "log"))
