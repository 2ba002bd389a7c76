"""What right and wrong programs get from the three graders: every cell was run against the originals, or follows their rules."""

import pytest

from tests.support.programs import asked, functional, run

ONE = asked(["1"], ["1"])
REFUSED = "NameError"  # an exception or builtin that the reference's programs do not have


def uses(name):
    return f"x = input()\ny = {name}\nprint(x)"


# name: question, program, (reference, livecodebench, strict), text in the reference's feedback
TABLE = {
    "space in an argument": (functional(["[1, 2]"], ["3"]), "def f(a): return sum(a)", (0, 1, 1), "JSONDecodeError"),
    "space in a text": (functional(['"a b"'], ['"b"']), "def f(a): return a.split()[1]", (0, 1, 1), "JSONDecodeError"),
    "class Solution": (functional(["1"], ["1"]), "class Solution:\n    def f(self, a): return a", (0, 1, 1), "KeyError"),
    "except ValueError": (ONE, "try:\n    int('x')\nexcept ValueError:\n    print(1)", (0, 1, 1), REFUSED),
    **{
        name: (ONE, uses(name), (0, 1, 1), REFUSED)
        for name in ("bin", "oct", "divmod", "super", "type", "getattr", "property", "bytearray", "complex")
    },
    "exit()": (ONE, "print(1)\nexit()", (0, 1, 1), REFUSED),
    "stdin.buffer": (ONE, "import sys\nprint(int(sys.stdin.buffer.read()))", (0, 1, 1), "AttributeError"),
    "sys.exit(0)": (ONE, "import sys\nprint(1)\nsys.exit(0)", (0, 1, 1), "SystemExit: 0"),
    **{f"import {name}": (ONE, f"import {name}\nprint(1)", (0, 1, 1), "ImportError") for name in ("os", "threading", "copy")},
    "0.5 for 0.50": (asked(["1"], ["0.50"]), "print(0.5)", (0, 1, 1), "Wrong Answer"),
    "one line for three": (asked(["1"], ["1\n2\n3"]), "print(1, 2, 3)", (1, 0, 0), None),
    "json.dumps replaced": (
        functional(["1"], ["1"]), "import json\njson.dumps = lambda *a, **k: 'x'\ndef f(a): return 7", (1, 0, 0), None
    ),
    "int subclass": (functional(["1"], ["1"]), "class I(int): pass\ndef f(a): return I(1)", (0, 1, 1), "UnboundLocalError"),
    # Not in the table of the specification, but found beside it, and run against the originals too.
    "1.0 for 1": (functional(["1"], ["1"]), "def f(a): return 1.0", (0, 1, 1), "Wrong Answer"),
    "True for 1": (functional(["1"], ["1"]), "def f(a): return True", (0, 1, 0), "Wrong Answer"),
    "tuples within a list": (functional(["1"], ["[[1, 2]]"]), "def f(a): return [(1, 2)]", (1, 0, 1), None),
    "another name": (functional(["1"], ["2"]), "def g(a): return a + 1", (1, 0, 0), None),
    "namedtuple": (
        functional(["1"], ["1"]),
        "from collections import namedtuple\nP = namedtuple('P', 'x')\ndef f(a): return P(a).x",
        (0, 1, 1),
        "TypeError",
    ),
    "for line in stdin": (asked(["1\n2"], ["3"]), "import sys\nprint(sum(int(x) for x in sys.stdin))", (1, 0, 1), None),
    "open(0)": (asked(["1\n2"], ["3"]), "print(sum(map(int, open(0).read().split())))", (0, 0, 1), "TypeError"),
    "a global of a program": (ONE, "x = 0\ndef g():\n    global x\n    x = 1\ng()\nprint(x)", (1, 0, 1), None),
    "a trailing dash": (asked(["1"], ["1 -"]), "print(1)", (1, 0, 0), None),
    "two spaces": (asked(["1"], ["a b"]), "print('a  b')", (0, 0, 1), "Wrong Answer"),
    "3000 calls deep": (ONE, "def g(n): return 1 if n == 0 else g(n - 1)\nprint(g(3000))", (0, 1, 0), "RecursionError"),
    "always equal": (
        functional(["1"], ["1"]),
        "class E:\n    def __eq__(self, o): return True\ndef f(a): return E()",
        (0, 0, 0),
        "Runtime Error",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", TABLE)
@pytest.mark.parametrize(("variant", "column"), [("reference", 0), ("livecodebench", 1), ("strict", 2)])
def test_cell(row, variant, column):
    question, code, rewards, said = TABLE[row]
    verdict = run(question, code, variant=variant)
    assert verdict.reward == rewards[column], verdict.feedback
    if variant == "reference":
        assert (said in verdict.feedback) if said else verdict.feedback is None
