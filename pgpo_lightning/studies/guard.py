"""Detections, false alarms and lead of the collapse rules, measured on finished runs.

The rules are those of :mod:`pgpo_lightning.monitoring.collapse_rules`.

Run: ``python -m pgpo_lightning.studies.guard RUNS...`` prints the table. It reads the records that runs leave, step by step, as a
callback would have seen them; choose thresholds on other runs than these (``--seeds`` takes a part of them), or the table
says nothing.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import jsonargparse

from pgpo_lightning.core.settings import PositiveFraction, Seed, Text, checked
from pgpo_lightning.monitoring.collapse_rules import REWARD, RULES, CollapseRules, alarms, medians
from pgpo_lightning.monitoring.curves import Scalars, series
from pgpo_lightning.monitoring.run_record import RunRecord, load_runs
from pgpo_lightning.studies.inference import exact_interval
from pgpo_lightning.studies.report_text import table

ANY = "any rule"

When = Literal["any", "end"]
"""Whether one evaluation below the limit makes a collapse, or only those up to the end of the run."""


@dataclass(frozen=True)
class Fate:
    """What became of one run, and when the rules would have spoken.

    Attributes:
        run: The run.
        lost: Step of the evaluation that first saw the score lost; None for a run that did not collapse.
        declining: Whether it did not collapse, and yet one of its evaluations was not healthy.
        reward_lost: Step at which the running median of the training reward fell below the share of its first value (that of
            the base model); None if it never did. Known at every step, where `lost` is known at evaluations only.
        first: Rule to the first step at which it fires, and :data:`ANY` to the first of all.
    """

    run: RunRecord
    lost: int | None
    declining: bool
    reward_lost: int | None
    first: dict[str, int]


@dataclass(frozen=True)
class Row:
    """One rule over many runs.

    Attributes:
        rule: Its name, or :data:`ANY`.
        collapsed: Runs that collapsed.
        detected: Those in which it fires no later than the evaluation that first saw the score lost.
        late: Those in which it fires only after that.
        healthy: Runs whose score never was below the share that makes a run healthy.
        false_alarms: Those in which it fires at all.
        declining: Runs between: neither collapsed nor healthy. Whether an alarm is wrong there is for the reader to say.
        declining_alarms: Those in which it fires at all.
        leads: Steps from alarm to that evaluation, of the detected runs, in order.
        reward_leads: Steps from alarm to the loss of the training reward, of detected runs that have one, in order; negative
            where the alarm came after.
    """

    rule: str
    collapsed: int
    detected: int
    late: int
    healthy: int
    false_alarms: int
    declining: int
    declining_alarms: int
    leads: list[int]
    reward_leads: list[int]


def scalars_of(run: RunRecord) -> Scalars:
    """Return the curves of a record in the form of :data:`pgpo_lightning.monitoring.curves.Scalars`."""
    return {
        tag: dict(zip((int(step) for step in steps), values, strict=True))
        for tag, (steps, values) in run.curves.items()
    }


def lost_step(steps: list[int], scores: list[float], below: float = 0.5, when: When = "any") -> int | None:
    """Return the evaluation that first saw a score lost, or None.

    Args:
        steps: Of the evaluations, the base model's first.
        scores: Held-out.
        below: A score below this share of the first one is lost.
        when: ``any``: at any evaluation; ``end``: at the last one and all before it back to the step returned.

    Example:
        >>> lost_step([0, 10, 20, 30, 40], [0.5, 0.2, 0.3, 0.1, 0.0])
        10
        >>> lost_step([0, 10, 20, 30, 40], [0.5, 0.2, 0.3, 0.1, 0.0], when="end")
        30
    """
    lost = [value < below * scores[0] for value in scores]
    if when == "end":
        lost = [all(lost[i:]) for i in range(len(lost))]
    return next((step for step, is_lost in zip(steps, lost, strict=True) if is_lost), None)


def fate(run: RunRecord, rules: CollapseRules, below: float = 0.5, when: When = "any", healthy: float = 0.9) -> Fate:
    """Replay a run.

    Args:
        run: A finished run.
        rules: Thresholds.
        below: See :func:`lost_step`.
        when: See :func:`lost_step`.
        healthy: A run whose score never falls below this share of the first one is healthy.

    Raises:
        ValueError: If the run was not evaluated before the first step and after it, or if `healthy` is below `below`.
    """
    if healthy < below:
        raise ValueError(f"Expected `healthy` to be at least `below` ({below:g}), but got {healthy:g}.")
    steps, scores = run.scores
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError(
            f"Expected {run.study}/{run.arm}/{run.seed} to be evaluated before the first step and after it, but its "
            f"evaluations are at {steps}. Without the base model's score nobody can tell a collapse."
        )
    scalars = scalars_of(run)
    first: dict[str, int] = {}
    for now in sorted({step for points in scalars.values() for step in points}):
        for name in alarms(scalars, now, rules):
            first.setdefault(name, now)
            first.setdefault(ANY, now)
    at, rewards = series(scalars, REWARD)
    smooth = zip(at, medians(rewards, rules.window), strict=True)
    reward_lost = next((step for step, value in smooth if value < below * rewards[0]), None)
    lost = lost_step(steps, scores, below, when)
    return Fate(run, lost, lost is None and min(scores) < healthy * scores[0], reward_lost, first)


def guard_table(
    runs: list[RunRecord],
    rules: CollapseRules | None = None,
    below: float = 0.5,
    when: When = "any",
    healthy: float = 0.9,
) -> list[Row]:
    """Count detections and false alarms of every rule, and of all together.

    Args:
        runs: Finished runs, of whatever studies.
        rules: Thresholds; by default those that callbacks have.
        below: See :func:`lost_step`.
        when: See :func:`lost_step`.
        healthy: See :func:`fate`.

    Returns:
        A row for :data:`ANY`, then one per rule.
    """
    return _rows([fate(run, rules or CollapseRules(), below, when, healthy) for run in runs])


def _rows(fates: list[Fate]) -> list[Row]:
    return [_row(name, fates) for name in (ANY, *RULES)]


def _row(name: str, fates: list[Fate]) -> Row:
    at = [(f.lost, f.reward_lost, f.first.get(name)) for f in fates]
    collapsed = [(lost, reward, alarm) for lost, reward, alarm in at if lost is not None]
    detected = [(lost, reward, alarm) for lost, reward, alarm in collapsed if alarm is not None and alarm <= lost]
    healthy, declining = (
        [f.first.get(name) for f in fates if f.lost is None and f.declining == which] for which in (False, True)
    )
    return Row(
        rule=name,
        collapsed=len(collapsed),
        detected=len(detected),
        late=sum(alarm is not None and alarm > lost for lost, _, alarm in collapsed),
        healthy=len(healthy),
        false_alarms=sum(alarm is not None for alarm in healthy),
        declining=len(declining),
        declining_alarms=sum(alarm is not None for alarm in declining),
        leads=sorted(lost - alarm for lost, _, alarm in detected),
        reward_leads=sorted(reward - alarm for _, reward, alarm in detected if reward is not None),
    )


def markdown(rows: list[Row]) -> str:
    """Return the rows as a Markdown table; shares with their exact 95 % intervals, leads as median and range."""
    header = ["rule", "lost, alarm in time", "too late", "healthy, alarm", "declining, alarm", "steps before score lost",
              "steps before reward lost"]  # fmt: skip
    return table(
        header,
        [
            [
                row.rule,
                _share(row.detected, row.collapsed),
                str(row.late),
                _share(row.false_alarms, row.healthy),
                _share(row.declining_alarms, row.declining),
                _spread(row.leads),
                _spread(row.reward_leads),
            ]
            for row in rows
        ],
    )


def _share(count: int, of: int) -> str:
    if not of:
        return "0 of 0"
    low, high = exact_interval(count, of)
    return f"{count} of {of} [{low:.2f}, {high:.2f}]"


def _spread(values: list[int]) -> str:
    return f"{median(values):g} ({values[0]} to {values[-1]})" if values else ""


@checked
def guard(
    runs: list[Text],
    rules: CollapseRules | None = None,
    below: PositiveFraction = 0.5,
    when: When = "any",
    healthy: PositiveFraction = 0.9,
    seeds: list[Seed] | None = None,
    each: bool = False,
) -> list[Row]:
    """Print how well the rules tell collapsing runs from healthy ones.

    Args:
        runs: Folders with finished runs anywhere below them, single records, or ``.jsonl`` files with a record per line.
        rules: Thresholds; by default those that callbacks have.
        below: A score below this share of the base model's is lost.
        when: Whether one evaluation below makes a collapse, or only those up to the end of the run.
        healthy: A run whose score never falls below this share of the base model's is healthy; one between is declining.
        seeds: Count the runs with these seeds only; by default all.
        each: Print a line for every run as well.
    """
    records = load_runs([Path(path) for path in runs])
    kept = [run for run in records if seeds is None or run.seed in seeds]
    if not kept:
        there = sorted({run.seed for run in records})
        raise ValueError(f"Expected `seeds` to be among those of the runs, {there}, but got {seeds}.")
    fates = [fate(run, rules or CollapseRules(), below, when, healthy) for run in kept]
    rows = _rows(fates)
    print(markdown(rows))
    if each:
        print(f"\n{_each(fates)}")
    return rows


def _each(fates: list[Fate]) -> str:
    lines = []
    for f in fates:
        fired = sorted(((step, name) for name, step in f.first.items() if name != ANY))
        run = f"{f.run.study}/{f.run.arm}/{f.run.seed}"
        told = ", ".join(f"{name} @{step}" for step, name in fired)
        lines.append([run, *("" if step is None else str(step) for step in (f.lost, f.reward_lost)), told])
    return table(["run", "score lost", "reward lost", "alarms"], lines)


def main(args: list[str]) -> None:
    """Run the program: ``python -m pgpo_lightning.studies.guard RUNS...``.

    Args:
        args: Without the program's name.
    """
    parser = jsonargparse.ArgumentParser(
        prog="pgpo_lightning.studies.guard", description=(guard.__doc__ or "").splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders, records or .jsonl files of finished runs")
    parser.add_function_arguments(guard, skip={"runs"})
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    guard(**vars(instantiate(parser.parse_args(args))))


if __name__ == "__main__":
    main(sys.argv[1:])
