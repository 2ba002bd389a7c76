"""The installed command as a user starts it."""

import os
import subprocess
import sys

from tests.support import CONFIGS


def program(folder, *args):
    """The installed command, in a folder of the user's."""
    # A console script has no '' in its path. Under ddp the second process is started like the first, which -c cannot be.
    bare = "import sys; sys.path.pop(0); from pgpo_lightning.commands.main import program; program()"
    command = [sys.executable, *(["-m", "pgpo_lightning.commands.main"] if "ddp" in args else ["-c", bare]), *args]
    path = os.pathsep.join([str(CONFIGS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
