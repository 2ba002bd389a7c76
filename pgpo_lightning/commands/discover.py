"""The command ``pgpo discover``: one question and many attempts, by methods that learn from each attempt's feedback and others.

It makes the missing runs of a comparison and writes its report. The command can be killed at any moment and repeated: what was
attempted is in files, and no attempt is made or counted twice.
"""

import importlib.util
import re
from typing import Any

import jsonargparse

from pgpo_lightning.commands.mistakes import brief
from pgpo_lightning.core.files import output_folder, plain, replacing, write_json, write_text
from pgpo_lightning.core.settings import Count, Natural, Seed, Text, checked
from pgpo_lightning.discovery.spec import DiscoverySpec, read_discovery


@checked
def discover(
    config: Text,
    methods: list[Text] | None = None,
    questions: list[Natural] | None = None,
    seeds: list[Seed] | None = None,
    budget: Count | None = None,
    dry_run: bool = False,
    report_only: bool = False,
) -> dict[str, Any]:
    """Make the missing runs of a comparison of methods on single questions, and report when each found its first success.

    Args:
        config: File of the comparison, such as `configs/studies/discover.yaml`. Its keys are in docs/discover.md.
        methods: Only these methods: sdpo, pgpo, frozen-teacher, placebo-feedback, no-feedback, reset-weights, best-of-k,
            multi-turn, multi-turn-attempts, or those of the file.
        questions: Numbers of the questions in their split, in place of those of the file.
        seeds: In place of those of the file.
        budget: Attempts per run, in place of that of the file. A larger one continues runs.
        dry_run: Print the runs and how far they are, and make none.
        report_only: Write the report of the attempts that are there, and make none.

    Returns:
        The content of ``report.json``; empty with `dry_run`.

    Raises:
        ValueError: If a setting is invalid, there is no such question, or the verifier gives no feedback where a method needs it.
        ModuleNotFoundError: Without statsmodels.
    """
    if importlib.util.find_spec("statsmodels") is None:
        raise ModuleNotFoundError(
            "`pgpo discover` needs statsmodels for its log-rank tests: pip install 'pgpo-lightning[studies]'"
        )
    spec = read_discovery(config)
    output_folder(spec.folder)
    wanted = spec.narrowed(methods, questions, seeds, budget)
    from pgpo_lightning.commands.discovery_runs import Comparison

    comparison = Comparison(wanted)
    if dry_run or report_only:
        runs = comparison.runs(measure=False)
    else:
        comparison.register(spec)
        runs = comparison.runs()
        for number, run in enumerate(runs, 1):
            result = comparison.make(run)
            spent = f"{result.spent['generations']:.0f} attempts, {result.spent['seconds']:.1f} s"
            found = "found" if result.found else "not found" if result.complete else "made by another process"
            print(f"{number} of {len(runs)}: {run.name}: {found}, {spent}", flush=True)
    outcomes = [run.outcome(wanted) for run in runs]
    if dry_run:
        for run, result in zip(runs, outcomes, strict=True):
            print(f"{run.name}: {result.spent['generations']:.0f} of {wanted.budget} attempts, found: {result.found}")
        return {}
    return _report(wanted, [each for each in outcomes if each.spent["generations"]])


def _report(spec: DiscoverySpec, outcomes: list[Any]) -> dict[str, Any]:
    """Write ``report.md``, ``report.json`` and ``discovery.png``, and return the content."""
    from pgpo_lightning.discovery import pass_rates
    from pgpo_lightning.discovery.analysis import analyse
    from pgpo_lightning.discovery.figure import draw_discovery
    from pgpo_lightning.discovery.report_text import markdown

    content = analyse(outcomes, spec.baseline, spec.budget, spec.predictions)
    with replacing(spec.folder / "discovery.png") as file:
        draw_discovery(content, file.stream)
    text = markdown(content, pass_rates.read(spec.folder), "discovery.png")
    write_text(spec.folder / "report.md", text)
    rounded: dict[str, Any] = plain(content, digits=6)
    write_json(spec.folder / "report.json", rounded, indent=1, allow_nan=False)
    print(f"\n{text.split('## How to read it')[0].strip()}\n\nreport: {spec.folder / 'report.md'}")
    return rounded


def main(args: list[str]) -> None:
    """Run the command: ``pgpo discover --config FILE``.

    Args:
        args: Without the program's name.
    """
    about = (discover.__doc__ or "").splitlines()[0]
    parser = jsonargparse.ArgumentParser(prog="pgpo discover", description=about)
    parser.add_function_arguments(discover, as_group=False, skip={"dry_run", "report_only"})
    action = jsonargparse.ActionYesNo(no_prefix="no_")
    parser.add_argument(
        "--dry_run", action=action, nargs="?", help="Print the runs and how far they are, and make none."
    )
    parser.add_argument(
        "--report_only",
        action=action,
        nargs="?",
        help="Write the report of the attempts that are there, and make none.",
    )
    brief(parser, ["discover", *args])
    words = [re.sub("^--(dry|report)-(run|only)", r"--\1_\2", word) for word in args]
    discover(**parser.parse_args(words).as_dict())
