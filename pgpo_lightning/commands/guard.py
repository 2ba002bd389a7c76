"""The command `pgpo guard`: measure how well the collapse rules separate collapsed runs from healthy ones."""

from pathlib import Path
from typing import Any

import jsonargparse

from pgpo_lightning.commands.mistakes import brief
from pgpo_lightning.core.settings import PositiveFraction, Seed, Text, checked
from pgpo_lightning.monitoring.collapse_rules import CollapseRules, When
from pgpo_lightning.monitoring.run_record import load_runs
from pgpo_lightning.studies.collapse_detection import RuleResult, markdown, outcome, outcomes_markdown, rule_results


@checked
def guard(
    runs: list[Text],
    rules: CollapseRules | None = None,
    below: PositiveFraction = 0.5,
    when: When = "any",
    healthy: PositiveFraction = 0.9,
    seeds: list[Seed] | None = None,
    each: bool = False,
) -> list[RuleResult]:
    """Measure how well the collapse rules separate collapsed runs from healthy ones.

    Args:
        runs: Folders that contain finished runs at any depth, single records, or ``.jsonl`` files with one record per line.
        rules: Thresholds; by default those of the callbacks.
        below: A run has collapsed if its held-out score is below this fraction of the base model's.
        when: ``any``: one low evaluation makes a collapse. ``end``: all later evaluations must be low as well.
        healthy: A run whose score never falls below this fraction of the base model's is healthy; runs in between are declining.
        seeds: Use only the runs with these seeds; by default all.
        each: Also print a line for every run.

    Returns:
        A row for any rule, then one for each rule.

    Raises:
        ValueError: If there are no runs with these seeds, a run was not evaluated before the first step and after it, or a
            setting is out of range.
    """
    records = load_runs([Path(path) for path in runs])
    selected = [run for run in records if seeds is None or run.seed in seeds]
    if not selected:
        present = sorted({run.seed for run in records})
        raise ValueError(f"Expected `seeds` to be among those of the runs, {present}, but got {seeds}.")
    outcomes = [outcome(run, rules or CollapseRules(), below, when, healthy) for run in selected]
    results = rule_results(outcomes)
    print(markdown(results))
    if each:
        print(f"\n{outcomes_markdown(outcomes)}")
    return results


def main(args: list[str]) -> None:
    """Run the command: ``pgpo guard RUNS...``.

    Args:
        args: Without the program's name.
    """
    parser = jsonargparse.ArgumentParser(prog="pgpo guard", description=(guard.__doc__ or "").splitlines()[0])
    # jsonargparse makes no list of positional words by itself.
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders, records or .jsonl files of finished runs")
    parser.add_function_arguments(guard, skip={"runs"})
    brief(parser, ["guard", *args])
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    guard(**vars(instantiate(parser.parse_args(args))))
