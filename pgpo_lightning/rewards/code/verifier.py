"""Verifier of programs: runs a response's program on the tests of its question."""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Lock
from typing import Annotated, Any, Literal

from pgpo_lightning.core.settings import Count, NonNegative, Range, checked
from pgpo_lightning.core.types import Question, Rollout, Verdict
from pgpo_lightning.rewards.code.answers import cut_off, program
from pgpo_lightning.rewards.code.feedback import Level, feedback, of_format
from pgpo_lightning.rewards.code.outcomes import Outcome, Variant, outcome
from pgpo_lightning.rewards.code.pool import Isolation, Task, cores, shared
from pgpo_lightning.rewards.code.records import Tests, tests_of
from pgpo_lightning.rewards.grade import where

TIME_LIMITS: dict[Variant, float] = {"strict": 1.0, "livecodebench": 6.0, "reference": 1.0}
"""CPU seconds of a test where neither the question nor a setting has a limit."""

REFERENCE_GRACE = 1.0
"""The reference's deadline is a second after the limit."""

FILE_BYTES, OUTPUT_BYTES, PROCESSES = 16 * 2**20, 8 * 2**20, 32
CURVES = {"no_program": "no_program", "wrong_answer": "wrong", "runtime_error": "error", "time_limit": "timeout"}
"""Curves under ``rewards/``: the share of responses whose first failure is of a kind."""

REMEMBERED = 8192
"""Most verdicts kept, for programs that are written again."""


@checked
class CodeExecution:
    r"""Run the program in a response on the question's tests: 1.0 if all pass, else 0.0.

    The tests are the column ``tests`` of a question, or its answer: one JSON object, see ``docs/code.md``. Every test runs in a
    process of its own with limits on time, memory, output, files and processes. Outputs are compared in this process, except by
    ``reference``.

    Args:
        variant: Whose rules. ``strict`` (ours) runs a program as Python runs it. ``livecodebench`` has the official rules of that
            benchmark. ``reference`` is the grader of the SDPO repository with its faults: few builtins and modules, arguments
            split at white space, the comparison open to the answer. They also read a response differently; see ``docs/code.md``.
        feedback: What the teacher reads about a failed attempt: ``full``; ``no_expected``, without expected outputs; ``verdict``,
            the titles alone; ``none``.
        reward: ``all``: 1.0 if every test passes. ``fraction``: the share of tests that pass.
        tests: Which tests decide: ``all``, or the ``public`` ones.
        time_limit: CPU seconds of a test, in place of the limits of the questions.
        memory_mb: Largest address space of a process, in MiB.
        tolerance: Relative and absolute difference up to which two numbers are equal for ``strict``, if one of them is no
            integer.
        workers: Tests that run at the same time; null means one for each core of this rank.
        isolation: ``auto`` uses namespaces of Linux where it may, and says once what is missing. ``required`` raises instead.
            ``processes`` uses limits alone.
        packages: Whether programs can import the packages of this environment, such as NumPy.

    Raises:
        ValueError: If an argument is out of range, or, when called, if the tests of the question are faulty.

    Example:
        >>> tests = '{"testtype": "stdin", "inputs": ["1 2"], "outputs": ["3"]}'
        >>> CodeExecution()(Question("Add.", tests), "```python\nprint(sum(map(int, input().split())))\n```").reward
        1.0
    """

    while_sampling = True  # its processes work while this one samples

    def __init__(
        self,
        variant: Variant = "strict",
        feedback: Level = "full",
        reward: Literal["all", "fraction"] = "all",
        tests: Literal["all", "public"] = "all",
        time_limit: Annotated[float, Range(above=0, most=3600)] | None = None,
        memory_mb: Annotated[int, Range(least=64, most=2**20)] = 1024,
        tolerance: NonNegative = 1e-9,
        workers: Count | None = None,
        isolation: Isolation = "auto",
        packages: bool = True,
    ) -> None:
        self.variant, self.feedback, self.reward, self.tests = variant, feedback, reward, tests
        self.time_limit, self.memory_mb, self.tolerance = time_limit, memory_mb, tolerance
        self.workers, self.isolation, self.packages = workers, isolation, packages
        self._remembered: OrderedDict[bytes, Verdict] = OrderedDict()
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings: a lock and old verdicts do not go to other processes."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the settings."""
        self.__init__(**state)  # type: ignore[misc]

    def check_question(self, question: Question) -> None:
        """Raise if the tests of a question cannot be run.

        Raises:
            ValueError: Names the row.
        """
        tests = self._tests(question)
        if tests.kind != "functional" or self.variant == "reference":
            return
        if not tests.function:
            raise ValueError(
                f"Expected {where(question)} to name the function that its tests call (`fn_name`), but it does not."
            )
        for index in range(len(tests.inputs)):
            try:
                tests.arguments(index)
                tests.value(index)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"Expected test {index + 1} of {where(question)} to have arguments and a value in JSON, but got: {error}. "
                    "Correct the row."
                ) from error

    def __call__(self, question: Question, response: str) -> Verdict:
        """Grade one response."""
        return self.judge([(question, response, cut_off(response))])[0]

    def grade_batch(self, rollouts: list[Rollout], step: int) -> list[Verdict]:
        """Grade the responses of a step, whose tests share the workers."""
        return self.judge([(each.question, each.text, not each.finished or cut_off(each.text)) for each in rollouts])

    def judge(self, attempts: Sequence[tuple[Question, str, bool]]) -> list[Verdict]:
        """Grade several responses at the same time.

        Args:
            attempts: Question, response, and whether the response was cut off, which feedback on a missing program says.

        Returns:
            One verdict for each, in the same order. It does not depend on the others.
        """
        verdicts: dict[bytes, Verdict] = {}
        running: dict[bytes, tuple[Tests, Task, Callable[[int, dict[str, Any]], Outcome]]] = {}
        keys = []
        for question, response, cut in attempts:
            tests, code = self._tests(question), program(response, self.variant)
            key = _key(tests, code, cut)
            keys.append(key)
            with self._lock:
                known = self._remembered.get(key)
            if known is not None:
                verdicts[key] = known
            elif code is None:
                said = of_format(cut, self.feedback) if self.feedback != "none" else None
                verdicts[key] = Verdict(0.0, said, curves=_curves("no_program"))
            elif key not in running:
                running[key] = tests, *self._task(tests, code)
        if running:
            pool = shared(self.workers or cores(), self.isolation, self.packages)
            pool.run(task for _, task, _ in running.values())
        for key, (tests, task, outcome_of) in running.items():
            verdicts[key] = self._verdict(tests, [outcome_of(i, task.replies[i]) for i in range(task.end + 1)])
        with self._lock:
            for key in keys:
                self._remembered[key] = verdicts[key]
                self._remembered.move_to_end(key)
            while len(self._remembered) > REMEMBERED:
                self._remembered.popitem(last=False)
        return [replace(verdicts[key]) for key in keys]

    def _tests(self, question: Question) -> Tests:
        tests = tests_of(question)
        if tests.kind == "code" and self.variant == "livecodebench":
            raise ValueError(
                f"Expected {where(question)} to have tests of the `testtype` stdin or functional, because `variant` is "
                "livecodebench, which has no others, but got code. Use the variant strict."
            )
        if self.tests == "all" or all(tests.public):
            return tests
        kept = [index for index, public in enumerate(tests.public) if public]
        if not kept:
            raise ValueError(
                f"Expected {where(question)} to have public tests, because `tests` is public, but it has none."
            )
        inputs, outputs = (tuple(each[i] for i in kept) for each in (tests.inputs, tests.outputs))
        return replace(tests, inputs=inputs, outputs=outputs, public=(True,) * len(kept))

    def _task(self, tests: Tests, code: str) -> tuple[Task, Callable[[int, dict[str, Any]], Outcome]]:
        seconds = self.time_limit or tests.time_limit or TIME_LIMITS[self.variant]
        seconds += REFERENCE_GRACE if self.variant == "reference" else 0.0
        limits = {
            "cpu": seconds, "idle": 2 * seconds + 4, "wall": 60 * seconds + 30, "memory": self.memory_mb * 2**20,
            "file": FILE_BYTES, "output": OUTPUT_BYTES, "processes": PROCESSES,
        }  # fmt: skip
        everything = f"{code}{tests.context}{tests.inputs if tests.kind == 'code' else ''}"
        header = {
            "code": code, "kind": tests.kind, "variant": self.variant, "function": tests.function, "context": tests.context,
            "limits": limits,
            "modules": [name for name in ("numpy", "sortedcontainers") if name in everything and self.packages],
        }  # fmt: skip
        found: dict[int, tuple[Any, Outcome]] = {}

        def outcome_of(index: int, reply: dict[str, Any]) -> Outcome:
            if index not in found or found[index][0] is not reply:
                found[index] = reply, outcome(tests, index, code, self.variant, reply, self.tolerance)
            return found[index][1]

        rests = [self._rest(tests, index) for index in range(len(tests.inputs))]
        return Task([header] * len(rests), rests, lambda index, reply: self._ends(outcome_of(index, reply))), outcome_of

    def _rest(self, tests: Tests, index: int) -> dict[str, Any]:
        given = tests.inputs[index]
        if self.variant == "reference":
            expected = tests.outputs[index]
            given = given if isinstance(given, (str, dict)) else json.dumps(given)
            expected = expected if isinstance(expected, str) else json.dumps(expected)
            return {"input": "", "payload": {"input": given, "expected": expected}}
        if tests.kind == "stdin":
            return {"input": given, "payload": None}
        return {"input": "", "payload": tests.arguments(index) if tests.kind == "functional" else given}

    def _ends(self, each: Outcome) -> bool:
        """Return whether nothing depends on the tests after this one: neither the reward nor the feedback."""
        if self.reward == "fraction" or each.kind == "passed":
            return False
        if self.feedback == "none" or self.variant == "livecodebench":
            return True
        return each.kind == "error" or (each.kind != "wrong" and self.variant == "strict")

    def _verdict(self, tests: Tests, outcomes: list[Outcome]) -> Verdict:
        passed = sum(each.kind == "passed" for each in outcomes)
        complete = passed == len(tests.inputs)
        reward = passed / len(tests.inputs) if self.reward == "fraction" else float(complete)
        first = next((each.kind for each in outcomes if each.kind != "passed"), None)
        said = (
            None
            if complete or self.feedback == "none"
            else feedback(outcomes, tests.public, self.variant, self.feedback)
        )
        return Verdict(reward, said, curves=_curves(first))


def _curves(failure: str | None) -> dict[str, float]:
    """Return the numbers to log: which kind of failure came first, if any."""
    return {name: float(failure == kind) for name, kind in CURVES.items()}


def _key(tests: Tests, code: str | None, cut: bool) -> bytes:
    text = f"program {code}" if code is not None else f"none {cut}"
    return hashlib.sha256(tests.digest + text.encode("utf-8", "surrogatepass")).digest()
