"""Hostile programs: each gets one clear verdict, ends, and leaves nothing. Two thousand in a row: benchmarks/hostile.py."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pgpo_lightning.core.types import Question
from pgpo_lightning.rewards import CodeExecution
from pgpo_lightning.rewards.code import pool
from tests.support import ROOT
from tests.support.attacks import ATTACKS, ONE
from tests.support.programs import asked, fenced, run


def private():
    """Whether this machine allows namespaces."""
    run(ONE, "print(1)")
    return all(worker.private for each in pool._pools.values() for worker in each.workers)


def processes():
    return {each.pid for each in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(name):
    if name in ("full disk", "deleted folder") and not private():
        pytest.skip("without namespaces the folder of a test is not bounded")
    question, code, reward, said = ATTACKS[name]
    run(ONE, "print(1)")
    before = processes()
    verdict = run(question, code)
    assert verdict.reward == reward, verdict.feedback
    assert (said in verdict.feedback) if said else verdict.feedback is None
    assert processes() == before
    assert run(ONE, "print(int(input()))").reward == 1


def test_fork_bomb_is_bounded_and_leaves_nothing():
    if not private():
        pytest.skip("needs namespaces")
    before = processes()
    code = """
import os
try:
    while True:
        if os.fork() == 0:
            while True:
                try: os.fork()
                except OSError: pass
except OSError as error:
    print(error.errno)
"""
    verdict = run(asked(["1"], ["11"]), code)  # EAGAIN: the limit
    assert verdict.reward == 1, verdict.feedback
    assert processes() == before


def test_what_a_program_sees_of_the_machine(tmp_path):
    if not private():
        pytest.skip("needs namespaces")
    (tmp_path / "secret").touch()
    code = f"""
import glob, os, socket
def tried(action):
    try: return str(action())
    except OSError as e: return 'gone' if isinstance(e, ProcessLookupError) else 'refused'
print(glob.glob({str(tmp_path)!r}) + glob.glob('/etc/passwd') + glob.glob('/proc/*') + glob.glob('/dev/shm') + os.listdir('.'))
print(os.getpid(), os.getuid() == 0, len(os.environ) < 12)
print(tried(lambda: socket.create_connection(('127.0.0.1', 22), 1)))
print(tried(lambda: os.kill(-1, 9)))
print(tried(lambda: open(os.__file__, 'a')))
"""
    said = "[]\n1 False True\nrefused\ngone\nrefused"
    verdict = run(asked([""], [said]), code)
    assert verdict.reward == 1, verdict.feedback


def test_a_killed_worker_is_replaced_and_the_test_is_run_again():
    run(ONE, "print(1)", workers=1)
    (worker,) = pool.shared(1, "auto", True).workers
    worker.process.kill()
    os.waitid(os.P_PID, worker.process.pid, os.WEXITED | os.WNOWAIT)  # it may answer until it has ended
    assert run(ONE, "print(int(input()) )", workers=1).reward == 1
    (other,) = pool.shared(1, "auto", True).workers
    assert other is not worker
    for child in psutil.Process(other.process.pid).children() or [psutil.Process(other.process.pid)]:
        child.kill()
    assert run(ONE, "print(int(input())  )", workers=1).reward == 1


def test_500_tests_and_their_order():
    numbers = [str(i) for i in range(500)]
    wrong = run(asked(numbers, numbers), "x = int(input())\nprint(x if x != 321 else 0)")
    assert wrong.feedback.startswith("Test Case 322: Wrong Answer\n\nInput\n321\n")


def test_programs_never_run_as_root():
    """Root without another user id would be able to end every process of the machine."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    readable = all(path.stat().st_mode & 1 for path in Path(os.__file__).resolve().parents)
    verifier = CodeExecution(isolation="processes", workers=1)
    question = asked([""], ["False"])
    if readable:
        assert verifier(question, fenced("import os\nprint(os.getuid() == 0)")).reward == 1
    else:
        with pytest.raises(RuntimeError, match="must not run as root"):
            verifier(question, fenced("print(1)"))


@pytest.mark.parametrize("namespaces", [True, False])
def test_another_user_needs_no_rights(namespaces, tmp_path):
    """The worker as a user without rights: in a user namespace, or with limits alone."""
    script = ROOT / "tests" / "support" / "code_worker.py"
    python = next((each for each in ("/usr/bin/python3", sys.executable) if _usable(each)), None)
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, and a Python 3.11 that others can run")
    result = subprocess.run([python, "-I", script, str(int(namespaces))], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["3", "cpu", "SIGKILL", "0"], result.stdout


def _usable(python):
    code = "import sys, os; os.setuid(65534); open(os.__file__); sys.exit(sys.version_info < (3, 11))"
    return Path(python).exists() and subprocess.run([python, "-c", code], capture_output=True).returncode == 0


def test_missing_namespaces_are_said_once_and_the_run_goes_on(recwarn):
    pool._told.clear()
    ready = {"missing": ["no namespaces (Operation not permitted), so answers can read files"], "private": False}
    for _ in range(2):
        pool._tell(ready, "auto")
    assert [str(each.message) for each in recwarn] == [
        "The programs of answers run with no namespaces (Operation not permitted), so answers can read files. See docs/code.md."
    ]
    with pytest.raises(RuntimeError, match="`isolation` is required, but got no namespaces"):
        pool._tell(ready, "required")


def test_nothing_of_torch_is_in_a_worker():
    code = "import sys\nprint(any(name.split('.')[0] in ('torch', 'num' + 'py', 'pgpo_lightning') for name in sys.modules))"
    assert run(asked([""], ["False"]), code, workers=3).reward == 1


def test_a_verifier_can_be_sent_to_another_process():
    import pickle

    verifier = pickle.loads(pickle.dumps(CodeExecution(variant="livecodebench", time_limit=2.0)))
    assert (verifier.variant, verifier.time_limit) == ("livecodebench", 2.0)
    assert verifier(Question("x", ONE.answer), fenced("print(1)")).reward == 1
