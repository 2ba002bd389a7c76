"""Processes that start at once: forked from a server that has imported what takes a process of its own seven seconds.

They are new processes in all other respects: with their own memory, arguments, environment and exit status, and they can be
killed. What a user starts, imports included, is tested with `subprocess`: one run of every command.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pgpo_lightning.commands.fit"])


def start(words, log, **environment):
    """Start a program.

    Args:
        words: ``pgpo``, a module such as ``tests.support.ranks_worker`` or the path of a script, and its arguments.
        log: File for what it writes.
        environment: Changes to the variables of this process.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    process = FORKS.Process(target=_run, args=([str(word) for word in words], str(log), os.getcwd(), variables))
    process.start()
    return process


def start_ranks(words, log, ranks):
    """Start a program once per rank, as ``torchrun`` would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks,
              "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}  # fmt: skip
    return [
        start(words, f"{log}.{rank}", **{k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()})
        for rank in range(ranks)
    ]


def finish(*processes: BaseProcess, log, seconds=600):
    """Wait until all have ended well; one that fails ends the others.

    Args:
        processes: What was started.
        log: As it was given, or without the number of the rank.
        seconds: After which they are killed.
    """
    deadline = time.monotonic() + seconds
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    texts = [path.read_text()[-3000:] for path in sorted(Path(log).parent.glob(f"{Path(log).name}*"))]
    assert not any(codes), "\n".join([f"exit status {codes}", *texts])


def _run(words, log, folder, variables):
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = words
    if words[0] == "pgpo":
        from pgpo_lightning.commands.main import program

        program()
    elif words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
