"""Run three programs in a worker as the user ``nobody``: print an output, the limit of a loop, and what a fork bomb leaves."""

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

BOMB = """
import os, time
for _ in range(50):
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
    except OSError: pass
os.kill(os.getpid(), 9) if os.getpid() > 1 else os._exit(137)
"""


def main(namespaces: bool) -> None:
    """Serve as the parent of a worker."""
    source = Path(__file__).resolve().parents[2] / "pgpo_lightning" / "rewards" / "code" / "process"
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(source, Path(folder) / "process")
        code = f"import sys; sys.path.insert(0, {folder!r}); from process.worker import main; main()"
        worker = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", "-c", code],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/", user=65534, group=65534, extra_groups=[], env={},
        )  # fmt: skip

        def ask(*frames):
            for frame in frames:
                body = json.dumps(frame).encode()
                worker.stdin.write(struct.pack(">I", len(body)) + body)
            worker.stdin.flush()
            return json.loads(worker.stdout.read(struct.unpack(">I", worker.stdout.read(4))[0]))

        readable = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", f"{sys.base_prefix}/lib"]
        ready = ask({"hidden": [folder], "packages": [], "namespaces": namespaces, "readable": readable})
        limits = {"cpu": 0.2, "idle": 5, "wall": 60, "memory": 2**30, "file": 2**20, "processes": 16, "output": 2**20}
        job = {"kind": "stdin", "variant": "strict", "context": "", "modules": [], "limits": limits}
        given = {"input": "1 2", "payload": None}
        print(ask(job | {"code": "print(sum(map(int, input().split())))"}, given)["out"].strip())
        print(ask(job | {"code": "while True: pass"}, given)["exceeded"])
        status = ask(job | {"code": BOMB}, given)["status"]
        print("SIGKILL" if status in (-9, 137) else status)
        left = subprocess.run(["ps", "-o", "pid=", "-u", "65534"], capture_output=True, text=True).stdout.split()
        print(len(left) - (2 if namespaces and ready["private"] else 1))  # the worker, and who waits for it
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    main(sys.argv[1] == "1")
