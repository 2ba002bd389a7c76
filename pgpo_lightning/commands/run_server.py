"""A process that imports what `pgpo fit` needs once, and forks a child for each run.

``python -m pgpo_lightning.commands.run_server SOCKET PROGRAM MODULE ...``; its other end is
:class:`pgpo_lightning.commands.run_processes.RunServer`. A child is what ``python -m PROGRAM`` would be, less the time of the
imports: with its own session, memory, output and exit status, and nothing of other runs.

The fork server of `multiprocessing` does not end with the process that started it as long as it has a child, and its children
do not call exit handlers.
"""

import gc
import importlib
import json
import os
import runpy
import socket
import sys

from pgpo_lightning.commands.quiet import quiet
from pgpo_lightning.commands.run_processes import MESSAGE, kill_with_parent


def serve(channel: socket.socket) -> list[str] | None:
    """Answer requests until the other end is closed.

    Args:
        channel: Of packets. A list of words, with the file of the output, starts a run and is answered with its number. The
            number of a run is answered with its exit status, negative for a signal, or null if the run has not ended.

    Returns:
        In a child, the words that it was started with; in the server, None.
    """
    server = os.getpid()
    while True:
        packet, files, *_ = socket.recv_fds(channel, MESSAGE, 1)
        if not packet:
            return None
        request = json.loads(packet)
        if isinstance(request, list):
            (file,) = files
            if (child := os.fork()) == 0:
                os.setsid()  # so that only `ablate` gets Ctrl-C, and can end the whole group
                kill_with_parent(server)
                channel.close()
                os.dup2(file, 1)  # the child and its children hold the lock from now on
                os.dup2(file, 2)
                os.close(file)
                return request
            os.close(file)
            answer: int | None = child
        else:
            ended, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
        channel.send(json.dumps(answer).encode())


def main() -> None:
    """Import the modules, serve, and in a child run the program."""
    descriptor, program, *modules = sys.argv[1:]
    quiet()
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a child would copy the memory of everything that was imported
    with socket.socket(fileno=int(descriptor)) as channel:
        words = serve(channel)
    if words is not None:
        sys.argv[1:] = words
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
