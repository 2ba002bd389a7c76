"""Many hostile programs in a row: is there one verdict for each, and is anything left behind?

    OMP_NUM_THREADS=1 python -m benchmarks.hostile --count 2000 --loaded 100

Prints processes, memory, open files and temporary files before and after, and whether the verdicts and texts are the same while
four other processes are busy.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import psutil

from pgpo_lightning.rewards import CodeExecution
from tests.support.attacks import ATTACKS
from tests.support.programs import fenced


def answers(count: int) -> list[tuple]:
    """Return hostile programs in turn, each different from all before, so that no verdict is remembered."""
    names = list(ATTACKS)
    found = []
    for i in range(count):
        question, code, reward, said = ATTACKS[names[i % len(names)]]
        found.append((question, fenced(f"{code}\n# {i}"), reward, said))
    return found


def state() -> dict[str, float]:
    """Return what a leak would make grow."""
    process = psutil.Process()
    children = process.children(recursive=True)
    return {
        "processes below this one": len(children),
        "zombies": sum(each.status() == psutil.STATUS_ZOMBIE for each in children),
        "memory of this process (MiB)": round(process.memory_info().rss / 2**20, 1),
        "memory of the workers (MiB)": round(sum(each.memory_info().rss for each in children) / 2**20, 1),
        "open files": process.num_fds(),
        "temporary files": len(list(Path(tempfile.gettempdir()).glob("pgpo-code-*"))),
    }


def busy() -> None:
    """Use one core until killed."""
    while True:
        pass


def verdicts(count: int) -> list[tuple]:
    """Grade programs with a verifier that remembers nothing."""
    verifier = CodeExecution()
    return [
        (verdict := verifier(question, text)) and (verdict.reward, verdict.feedback)
        for question, text, _, _ in answers(count)
    ]


def main(arguments: list[str] | None = None) -> dict:
    """Run the programs and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="programs in a row")
    parser.add_argument(
        "--loaded", type=int, default=100, help="programs that are graded again beside four busy processes"
    )
    parser.add_argument("--json", help="file for the result")
    options = parser.parse_args(arguments)
    verifier = CodeExecution()
    for question, text, _, _ in answers(len(ATTACKS)):
        verifier(question, text)
    before, start = state(), time.monotonic()
    wrong = []
    for number, (question, text, reward, said) in enumerate(answers(len(ATTACKS) + options.count)[len(ATTACKS) :]):
        verdict = verifier(question, text)
        if verdict.reward != reward or (said or "") not in (verdict.feedback or ""):
            wrong.append((number, verdict.feedback))
    seconds, after = time.monotonic() - start, state()
    print(f"| after {options.count} programs | before | after |\n|---|---|---|")
    for name, value in before.items():
        print(f"| {name} | {value:g} | {after[name]:g} |")
    print(f"\n{options.count} verdicts, {len(wrong)} unexpected, {seconds:.0f} s", *wrong[:5], sep="\n")
    alone = verdicts(options.loaded)
    others = [get_context("spawn").Process(target=busy, daemon=True) for _ in range(4)]
    for each in others:
        each.start()
    try:
        loaded = verdicts(options.loaded)
    finally:
        for each in others:
            each.kill()
            each.join()
    different = sum(a != b for a, b in zip(alone, loaded, strict=True))
    print(f"\n{different} of {options.loaded} verdicts and texts differ beside four busy processes")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(f"CPU seconds of this process: {usage.ru_utime + usage.ru_stime:.1f}; cores: {len(os.sched_getaffinity(0))}")
    result = {"before": before, "after": after, "wrong": len(wrong), "different": different, "seconds": seconds}
    if options.json:
        Path(options.json).write_text(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
