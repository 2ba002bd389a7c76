"""The command ``pgpo report``: compare finished runs and write the result as Markdown, JSON and figures.

It reads the records of runs and nothing else. The same records give the same report.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jsonargparse

from pgpo_lightning.core.files import output_folder, plain, replacing, write_json, write_text
from pgpo_lightning.core.settings import Positive, Range, Text, checked
from pgpo_lightning.monitoring.run_record import load_runs, write_runs
from pgpo_lightning.studies.analysis import analyse
from pgpo_lightning.studies.comparisons import conditions
from pgpo_lightning.studies.conclusion import conclude
from pgpo_lightning.studies.design import CONTROLS, Design
from pgpo_lightning.studies.figures import draw_curves, draw_forest, draw_multipliers
from pgpo_lightning.studies.measures import Measure, Score
from pgpo_lightning.studies.report_text import markdown

Name = TypeVar("Name", bound=str)


@checked
def report(
    runs: list[Text],
    output: Text = "report",
    baseline: Text = "sdpo",
    information: list[Text] | Text = "pgpo*",
    controls: list[Text] | Text = list(CONTROLS),  # noqa: B006  (shown by --help, never changed)
    decisive: list[Text] | Text | None = None,
    measures: list[Measure] | Measure = ["final", "best"],  # noqa: B006
    score: Score = "avg",
    pool: Literal["learning", "all"] = "learning",
    margin: Positive = 0.02,
    collapse: Annotated[float, Range(above=0, below=1)] = 0.5,
) -> dict[str, Any]:
    """Compare the arms of one or more studies: does information help beyond its dose?

    Args:
        runs: Folders that contain finished runs at any depth, single records, or ``.jsonl`` files with one record per line.
        output: Folder of ``report.md``, ``report.json``, the figures, and ``runs.jsonl`` with the records themselves. Existing
            files are overwritten. ``runs.jsonl`` is small enough to keep: the report can be made from it again, also together
            with new runs. It is not written if all records come from ``.jsonl`` files of this folder.
        baseline: The arm that every other arm is compared with.
        information: Names of the arms that use information; ``*`` at the end matches any suffix. Several in brackets:
            ``[pgpo*,centred*]``.
        controls: Names, without the suffix, of the arms with the dose of an information arm: ``pgpo-1.0`` has the control
            ``constant-1.0``.
        decisive: Controls that an information arm has to exceed for a "yes", every one of them; by default all of `controls`.
        measures: Measures on which it has to exceed them, every one: the score at the last evaluation, at the best one, or its
            mean over the steps. The first one is drawn, and chooses the condition of a tuned arm.
        score: ``avg``, the mean reward of samples, or ``solution-probability``, the exact probability of the worked solution.
        pool: Which conditions are averaged: those in which the baseline learns, or all.
        margin: The smallest difference of interest. A "no" excludes a gain of this size.
        collapse: A run has collapsed if its held-out score is below this fraction of the base model's.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: If there are no runs, if the runs of a study cannot be compared, or if a setting is out of range.
        FileExistsError: If `output` is a file.
    """
    folder = output_folder(output)
    design = Design(
        baseline,
        _names(information),
        _names(controls),
        None if decisive is None else _names(decisive),
        _names(measures),
        score,
        pool,
        margin,
        collapse,
    )
    records = load_runs([Path(path) for path in runs])
    content = analyse(records, design)
    content["conclusion"] = conclude(content)
    groups = conditions(records, design)
    with replacing(folder / "curves.png") as file:
        draw_curves(groups, design, file.stream)
    with replacing(folder / "forest.png") as file:
        draw_forest(content, file.stream)
    figures = {"curves": "curves.png", "differences": "forest.png"}
    if any(condition.multipliers or condition.informed for condition in groups):
        with replacing(folder / "multipliers.png") as file:
            draw_multipliers(groups, design, file.stream)
        figures["multipliers and information"] = "multipliers.png"
    write_text(folder / "report.md", markdown(content, figures))
    if not all(Path(path).suffix == ".jsonl" and Path(path).resolve().parent == folder.resolve() for path in runs):
        write_runs(records, folder / "runs.jsonl")
    rounded = plain(content, digits=6)
    write_json(folder / "report.json", rounded, indent=1, allow_nan=False)
    print(f"{content['conclusion']}\n\nreport: {folder / 'report.md'}")
    return rounded


def main(args: list[str]) -> None:
    """Run the command: ``pgpo report RUNS... [--output report]``.

    Args:
        args: Without the program's name.
    """
    parser = jsonargparse.ArgumentParser(prog="pgpo report", description=(report.__doc__ or "").splitlines()[0])
    # jsonargparse makes no list of positional words by itself.
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders, records or .jsonl files of finished runs")
    parser.add_function_arguments(report, skip={"runs"})
    report(**vars(parser.parse_args(args)))


def _names(names: Sequence[Name] | Name) -> tuple[Name, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
