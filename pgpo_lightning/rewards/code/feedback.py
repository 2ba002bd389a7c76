"""The feedback on an attempt, in the form of LeetCode: which test failed, with what input, output and expected output."""

from typing import Any, Literal

from pgpo_lightning.rewards.code.outcomes import Outcome, Variant

Level = Literal["full", "no_expected", "verdict", "none"]

MOST_CHARS = 2000
MOST_CASES = 2
VALUE_CHARS = 250
INPUT_LINES = 8
DEBUG_LINES = 10
DEBUG_CHARS = 300

TITLES = {
    "error": "Runtime Error",
    "timeout": "Time Limit Exceeded",
    "memory": "Memory Limit Exceeded",
    "output": "Output Limit Exceeded",
}
NO_PROGRAM = (
    "Incorrect Format: no program was found. Write it in one block that starts with ```python and ends with ```."
)
CUT_OFF = (
    "Incorrect Format: the response ends within a block of code. It probably reached the length limit; be shorter."
)


def of_format(cut_off: bool, level: Level) -> str:
    """Return the feedback on a response without a program.

    Args:
        cut_off: Whether it ends within a block.
        level: ``verdict`` leaves the title alone.
    """
    text = CUT_OFF if cut_off else NO_PROGRAM
    return text.partition(":")[0] if level == "verdict" else text


def feedback(outcomes: list[Outcome], public: tuple[bool, ...], variant: Variant, level: Level) -> str:
    """Return the feedback on the tests of a program; empty if all have passed.

    An error or an exceeded limit is shown alone: in ``reference`` the first error, else the first limit of time; in the other
    variants the first in the order of the tests. Otherwise up to two wrong answers are shown, those with the shortest input and
    output (``livecodebench``: the first one alone, because its tests end there).

    Args:
        outcomes: In the order of the tests, up to the last that has run.
        public: Whether a test may be shown. Of others only the title is, and only if no public test failed.
        variant: Whose rules.
        level: ``no_expected`` leaves out expected outputs, ``verdict`` all but the titles.
    """
    failed = [each for each in outcomes if each.kind != "passed"]
    visible = [each for each in failed if public[each.index]]
    if failed and not visible:
        return f"Hidden Test Case: {TITLES.get(failed[0].kind, 'Wrong Answer')}"
    parts: list[str] = []
    for case in _chosen(visible, variant):
        parts += [*_case(case, level), ""]
    return "\n".join(parts).rstrip()[:MOST_CHARS]


def _chosen(failed: list[Outcome], variant: Variant) -> list[Outcome]:
    ranks = [("error",), ("timeout",)] if variant == "reference" else [tuple(TITLES)]
    for kinds in ranks:
        if first := next((each for each in failed if each.kind in kinds), None):
            return [first]
    if variant == "livecodebench":
        return failed[:1]
    return sorted(failed, key=lambda each: len(str(each.given)) + len(each.actual))[:MOST_CASES]


def _case(case: Outcome, level: Level) -> list[str]:
    if case.kind in TITLES:
        title, lines = TITLES[case.kind], [*case.error, "", *_input("Last Executed Input", case.given)]
    else:
        title = f"Test Case {case.index + 1}: Wrong Answer"
        lines = ["", *_input("Input", case.given), "", "Output", _cut(case.actual, VALUE_CHARS)]
        if case.expected is not None and level == "full":
            lines += ["", "Expected", _cut(case.expected, VALUE_CHARS)]
    return [title] if level == "verdict" else [title, *lines, *_debug(case.debug)]


def _input(title: str, given: Any) -> list[str]:
    if isinstance(given, dict):
        return [title, *(f"{name} = {_cut(str(value), VALUE_CHARS)}" for name, value in given.items())]
    lines = str(given).splitlines()
    shown = [title, *(_cut(line, VALUE_CHARS) for line in lines[:INPUT_LINES])]
    return [*shown, f"... ({len(lines) - INPUT_LINES} more lines)"] if len(lines) > INPUT_LINES else shown


def _debug(text: str) -> list[str]:
    lines = text.strip().split("\n")
    if not text.strip():
        return []
    shown = ["", "Debug Output", *(_cut(line, DEBUG_CHARS) for line in lines[:DEBUG_LINES])]
    return [*shown, f"... ({len(lines) - DEBUG_LINES} more lines)"] if len(lines) > DEBUG_LINES else shown


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."
