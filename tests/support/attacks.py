"""Hostile programs, with what each should get."""

from tests.support.programs import asked, functional, tested

ONE = asked(["1"], ["1"], time_limit=0.3)
SLOW = asked(["1"], ["1"])  # for programs that take .2 CPU seconds before they are refused
PATCHED = "import json\njson.dumps = json.loads = lambda *a, **k: 1\ndef f(a): return 2"
THREADS = "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
ORPHANS = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(99)\nelse: print(1)"
FILES = "for i in range(99):\n    with open(str(i), 'w') as f: f.write('x' * 10**7)\nprint(1)"
FORGE = """
import os
for fd in range(3, 64):
    try: os.write(fd, bytes(16) + b'{"value":null}')
    except OSError: pass
def f(): return 1
"""
# name: question, program, reward, text in the feedback
ATTACKS = {
    "infinite loop": (ONE, "while True: pass", 0, "Time Limit Exceeded"),
    "deaf loop": (
        ONE,
        "import signal\nfor s in {*signal.Signals} - {9, 19}: signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        0,
        "Time Limit Exceeded",
    ),
    "3 GB": (ONE, "x = bytearray(3 * 10**9)\nprint(1)", 0, "Memory Limit Exceeded"),
    "1 GB of output": (ONE, "import sys\nwhile True: sys.stdout.write('x' * 10**6)", 0, "Output Limit Exceeded"),
    "1 GB of errors": (ONE, "import sys\nwhile True: sys.stderr.write('x' * 10**6)", 0, "Output Limit Exceeded"),
    "deleted folder": (ONE, "import os, shutil\nshutil.rmtree(os.getcwd(), True)\nprint(1)", 1, None),
    "forged result, os._exit": (tested("assert f() == 2"), f"{FORGE}\nos._exit(0)", 0, "ended before its tests did"),
    "forged result": (tested("assert f() == 2"), FORGE, 0, "Runtime Error"),
    "patched json, wrong": (functional(["1"], ["1"]), PATCHED, 0, "Wrong"),
    "patched json, right": (functional(["1"], ["2"]), PATCHED, 1, None),
    "sys.exit": (functional(["1"], ["1"]), "import sys\ndef f(a): sys.exit(0)", 0, "SystemExit: 0"),
    "os._exit": (functional(["1"], ["1"]), "import os\ndef f(a): os._exit(0)", 0, "ended before the function returned"),
    "os._exit in the tests": (tested("f()"), "import os\ndef f(): os._exit(0)", 0, "ended before its tests did"),
    "deep recursion": (ONE, "def f(n): return f(n + 1)\nf(0)", 0, "RecursionError"),
    "deep result": (functional(["1"], ["1"]), "def f(a):\n    for _ in range(10**5): a = [a]\n    return a", 0, "levels"),
    "not UTF-8": (ONE, "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe')", 0, "Wrong Answer"),
    "half a character": (functional(["1"], ["1"]), "def f(a): return '\\ud800'", 0, "\\ud800"),
    "output after the deadline": (
        ONE, "import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    print(1, flush=True)\nos._exit(0)", 0, "Wrong Answer"
    ),
    "zombies": (ONE, "import os\nfor _ in range(9):\n    if os.fork() == 0: os._exit(0)\nprint(1)", 1, None),
    "orphans": (ONE, ORPHANS, 1, None),
    "threads": (ONE, THREADS, 0, "RuntimeError"),
    "full disk": (SLOW, FILES, 0, "No space left"),
    "large file": (SLOW, "with open('a', 'w') as f: f.write('x' * 10**8)\nprint(1)", 0, "File too large"),
    "closed streams": (ONE, "import os\nos.closerange(0, 99)\nprint(1)", 0, "exit status"),
    "segmentation fault": (ONE, "import ctypes\nctypes.string_at(0)", 0, "ended by SIGSEGV"),
    "no end of the input": (asked(["x" * 10**6], ["1"]), "print(1)", 1, None),
    "large input": (asked(["x" * 10**6], ["1000000"]), "print(len(input()))", 1, None),
    "large number": (functional(["1"], ["1"]), "def f(a): return 10**5000", 0, "an integer of about 5001 digits"),
}  # fmt: skip
