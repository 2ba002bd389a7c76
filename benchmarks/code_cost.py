"""Seconds of verification of programs: ours beside the reference's design, which forks a process for every test, all at once.

    OMP_NUM_THREADS=1 python -m benchmarks.code_cost --rollouts 256 --tests 12

The reference's design is rebuilt here in its essentials: for each response ``multiprocessing.Process`` by fork from the training
process (with torch loaded), one per test, results through pipes, the next response when the last has been read.
"""

import argparse
import io
import json
import resource
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch

from pgpo_lightning.core.types import Rollout
from pgpo_lightning.rewards import CodeExecution
from pgpo_lightning.rewards.code import pool
from tests.support.programs import asked, fenced

CODE = "a, b = map(int, input().split())\ntotal = 0\nfor i in range(1000):\n    total += i * a % (b + 1)\nprint(a + b)"


def rollouts(count: int, tests: int) -> list[Rollout]:
    """Return right programs that differ, each with the same tests."""
    inputs = [f"{i} {i + 1}" for i in range(tests)]
    question = asked(inputs, [str(2 * i + 1) for i in range(tests)], time_limit=6)
    return [Rollout(question, [1], [2], torch.zeros(1), fenced(f"{CODE}  # {i}"), True) for i in range(count)]


def cpu() -> float:
    """Return CPU seconds of this process and of those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def ours(given: list[Rollout], batch: bool) -> list[float]:
    """Grade with our workers, all at the same time or one response after another."""
    verifier = CodeExecution()
    if batch:
        found = [each.reward for each in verifier.grade_batch(given, 0)]
    else:
        found = [verifier(each.question, each.text).reward for each in given]
    pool.close_all()  # so that their CPU seconds count
    return found


def _one(code: str, text: str, expected: str, pipe: object) -> None:
    sys.stdin, sys.stdout = io.StringIO(text), io.StringIO()
    exec(compile(code, "Solution.py", "exec"), {"__name__": "__main__"})
    pipe.send(sys.stdout.getvalue().strip() == expected)
    pipe.close()


def all_at_once(given: list[Rollout]) -> list[float]:
    """Grade as the reference does."""
    context = get_context("fork")
    found = []
    for rollout in given:
        tests, code = json.loads(rollout.question.answer), rollout.text.split("```python\n")[1].split("```")[0]
        running = []
        for text, expected in zip(tests["inputs"], tests["outputs"], strict=True):
            receiving, sending = context.Pipe(duplex=False)
            process = context.Process(target=_one, args=(code, text, expected, sending))
            process.start()
            sending.close()
            running.append((process, receiving))
        passed = [receiving.recv() for _, receiving in running if receiving.poll(tests["time_limit"] + 1)]
        for process, _ in running:
            process.join()
        found.append(float(all(passed) and len(passed) == len(running)))
    return found


def main(arguments: list[str] | None = None) -> list[dict]:
    """Time the designs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--tests", type=int, default=12)
    parser.add_argument("--json", help="file for the rows")
    options = parser.parse_args(arguments)
    given = rollouts(options.rollouts, options.tests)
    designs: dict[str, Callable[[], list[float]]] = {
        "ours, one batch": lambda: ours(given, batch=True),
        "ours, one response after another": lambda: ours(given, batch=False),
        "reference's design": lambda: all_at_once(given),
    }
    rows = []
    print(f"{options.rollouts} rollouts x {options.tests} tests\n")
    print("| | CPU s | s | CPU ms per test | mean reward |\n|---|---|---|---|---|")
    for name, design in designs.items():
        before, start = cpu(), time.monotonic()
        rewards = design()
        row = {
            "design": name,
            "cpu": cpu() - before,
            "seconds": time.monotonic() - start,
            "reward": sum(rewards) / len(rewards),
        }
        each = row["cpu"] / options.rollouts / options.tests * 1e3
        print(f"| {name} | {row['cpu']:.1f} | {row['seconds']:.1f} | {each:.1f} | {row['reward']:g} |", flush=True)
        rows.append(row)
    if options.json:
        Path(options.json).write_text(json.dumps(rows))
    return rows


if __name__ == "__main__":
    main()
