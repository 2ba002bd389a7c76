"""Detection rate, false alarms and lead time of the collapse rules, measured on finished runs.

The rules of :mod:`pgpo_lightning.monitoring.collapse_rules` are applied to the record of each run step by step, as a callback
would have applied them during training. Thresholds must be chosen on other runs than those they are measured on.
"""

from dataclasses import dataclass
from statistics import median

from pgpo_lightning.core.files import markdown_table
from pgpo_lightning.monitoring.collapse_rules import (
    REWARD,
    RULES,
    CollapseRules,
    When,
    alarms,
    collapse_step,
    medians,
)
from pgpo_lightning.monitoring.curves import Scalars, series
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies.inference import exact_interval

ANY = "any rule"


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run, and the steps at which the rules fire.

    Attributes:
        run: The run.
        collapsed_at: Step of the evaluation at which the run counts as collapsed; None for a run that did not collapse.
        declining: Whether the run did not collapse but was not healthy at one of its evaluations.
        reward_collapsed_at: Step at which the running median of the training reward fell below the same fraction of its first
            value, that of the base model; None if it never did. The reward is known at every step, the score at evaluations
            only.
        alarms: Rule to the first step at which it fires, and :data:`ANY` to the first step at which any rule fires.
    """

    run: RunRecord
    collapsed_at: int | None
    declining: bool
    reward_collapsed_at: int | None
    alarms: dict[str, int]


@dataclass(frozen=True)
class RuleResult:
    """The results of one rule on many runs.

    Attributes:
        rule: Its name, or :data:`ANY`.
        collapsed: Number of runs that collapsed.
        detected: Number of them in which the rule fires no later than the evaluation that shows the collapse.
        late: Number of them in which the rule fires only after that.
        healthy: Number of runs whose score was never below the fraction that makes a run healthy.
        false_alarms: Number of them in which the rule fires at all.
        declining: Number of runs that are neither collapsed nor healthy. Whether an alarm is wrong there is left open.
        declining_alarms: Number of them in which the rule fires at all.
        leads: Steps from the alarm to that evaluation, of the detected runs, sorted.
        reward_leads: Steps from the alarm to the collapse of the training reward, of the detected runs whose reward
            collapsed, sorted; negative if the alarm came later.
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


def scalars_from(run: RunRecord) -> Scalars:
    """Return the curves of a record as :data:`pgpo_lightning.monitoring.curves.Scalars`."""
    return {
        tag: dict(zip((int(step) for step in steps), values, strict=True))
        for tag, (steps, values) in run.curves.items()
    }


def outcome(
    run: RunRecord, rules: CollapseRules, below: float = 0.5, when: When = "any", healthy: float = 0.9
) -> Outcome:
    """Apply the rules to a run step by step.

    Args:
        run: A finished run.
        rules: Thresholds.
        below: See :func:`pgpo_lightning.monitoring.collapse_rules.collapse_step`.
        when: Likewise.
        healthy: A run whose score never falls below this fraction of the first one is healthy.

    Raises:
        ValueError: If the run was not evaluated before the first step and after it, or if `healthy` is less than `below`.
    """
    if healthy < below:
        raise ValueError(f"Expected `healthy` to be at least `below` ({below:g}), but got {healthy:g}.")
    steps, scores = run.scores
    if len(steps) < 2 or steps[0] != 0:
        raise ValueError(
            f"Expected {run.study}/{run.arm}/{run.seed} to be evaluated before the first step and after it, but its "
            f"evaluations are at {steps}. A collapse is defined relative to the base model's score."
        )
    scalars = scalars_from(run)
    first: dict[str, int] = {}
    for now in sorted({step for points in scalars.values() for step in points}):
        for name in alarms(scalars, now, rules):
            first.setdefault(name, now)
            first.setdefault(ANY, now)
    reward_steps, rewards = series(scalars, REWARD)
    smooth = zip(reward_steps, medians(rewards, rules.window), strict=True)
    reward_collapsed_at = next((step for step, value in smooth if value < below * rewards[0]), None)
    collapsed_at = collapse_step(steps, scores, below, when)
    declining = collapsed_at is None and min(scores) < healthy * scores[0]
    return Outcome(run, collapsed_at, declining, reward_collapsed_at, first)


def detection_table(
    runs: list[RunRecord],
    rules: CollapseRules | None = None,
    below: float = 0.5,
    when: When = "any",
    healthy: float = 0.9,
) -> list[RuleResult]:
    """Count detections and false alarms of every rule, and of all of them together.

    Args:
        runs: Finished runs, from any studies.
        rules: Thresholds; by default those of the callbacks.
        below: See :func:`pgpo_lightning.monitoring.collapse_rules.collapse_step`.
        when: Likewise.
        healthy: See :func:`outcome`.

    Returns:
        A row for :data:`ANY`, then one for each rule.

    Raises:
        ValueError: As :func:`outcome`.
    """
    return rule_results([outcome(run, rules or CollapseRules(), below, when, healthy) for run in runs])


def rule_results(outcomes: list[Outcome]) -> list[RuleResult]:
    """Count as :func:`detection_table` does, from outcomes."""
    return [_result(name, outcomes) for name in (ANY, *RULES)]


def _result(name: str, outcomes: list[Outcome]) -> RuleResult:
    steps = [(run.collapsed_at, run.reward_collapsed_at, run.alarms.get(name)) for run in outcomes]
    collapsed = [(score, reward, alarm) for score, reward, alarm in steps if score is not None]
    alarmed = [(score, reward, alarm) for score, reward, alarm in collapsed if alarm is not None]
    detected = [(score, reward, alarm) for score, reward, alarm in alarmed if alarm <= score]
    healthy, declining = (
        [run.alarms.get(name) for run in outcomes if run.collapsed_at is None and run.declining == kind]
        for kind in (False, True)
    )
    return RuleResult(
        rule=name,
        collapsed=len(collapsed),
        detected=len(detected),
        late=len(alarmed) - len(detected),
        healthy=len(healthy),
        false_alarms=sum(alarm is not None for alarm in healthy),
        declining=len(declining),
        declining_alarms=sum(alarm is not None for alarm in declining),
        leads=sorted(score - alarm for score, _, alarm in detected),
        reward_leads=sorted(reward - alarm for _, reward, alarm in detected if reward is not None),
    )


def markdown(results: list[RuleResult]) -> str:
    """Return the results as a Markdown table: fractions with exact 95 % intervals, leads as median and range."""
    counts = ["collapsed, alarm in time", "too late", "healthy, alarm", "declining, alarm"]
    header = ["rule", *counts, "steps before score collapsed", "steps before reward collapsed"]
    rows = [
        [
            row.rule,
            _fraction(row.detected, row.collapsed),
            str(row.late),
            _fraction(row.false_alarms, row.healthy),
            _fraction(row.declining_alarms, row.declining),
            _spread(row.leads),
            _spread(row.reward_leads),
        ]
        for row in results
    ]
    return markdown_table(header, rows)


def outcomes_markdown(outcomes: list[Outcome]) -> str:
    """Return a Markdown table with a line for each run: when it collapsed, and when each rule fired."""
    rows = []
    for result in outcomes:
        fired = sorted((step, name) for name, step in result.alarms.items() if name != ANY)
        steps = ("" if step is None else str(step) for step in (result.collapsed_at, result.reward_collapsed_at))
        name = f"{result.run.study}/{result.run.arm}/{result.run.seed}"
        rows.append([name, *steps, ", ".join(f"{rule} @{step}" for step, rule in fired)])
    return markdown_table(["run", "score collapsed", "reward collapsed", "alarms"], rows)


def _fraction(count: int, total: int) -> str:
    if not total:
        return "0 of 0"
    low, high = exact_interval(count, total)
    return f"{count} of {total} [{low:.2f}, {high:.2f}]"


def _spread(values: list[int]) -> str:
    return f"{median(values):g} ({values[0]} to {values[-1]})" if values else ""
