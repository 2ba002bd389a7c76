"""The command ``pgpo report``: compare finished runs and write the result as Markdown, JSON and figures.

It reads the records of runs and nothing else. The same records give the same report.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonargparse

from pgpo_lightning.commands.mistakes import brief
from pgpo_lightning.core.files import output_folder, plain, replacing, write_json, write_text
from pgpo_lightning.core.settings import Positive, Range, Text, checked
from pgpo_lightning.monitoring.run_record import holds_many, load_runs, write_runs
from pgpo_lightning.studies.analysis import analyse
from pgpo_lightning.studies.comparisons import conditions
from pgpo_lightning.studies.conclusion import conclude
from pgpo_lightning.studies.dose_figure import draw_doses, mean_rates
from pgpo_lightning.studies.figures import draw_curves, draw_forest, draw_multipliers
from pgpo_lightning.studies.measures import Measure, Score
from pgpo_lightning.studies.registration import FILE, as_json, judged_by, outcome, registrations, write_registrations
from pgpo_lightning.studies.report_text import markdown


@checked
def report(
    runs: list[Text],
    output: Text = "report",
    baseline: Text | None = None,
    information: list[Text] | Text | None = None,
    controls: list[Text] | Text | None = None,
    decisive: list[Text] | Text | None = None,
    measures: list[Measure] | Measure | None = None,
    score: Score | None = None,
    pool: Literal["learning", "all"] | None = None,
    margin: Positive | None = None,
    collapse: Annotated[float, Range(above=0, below=1)] | None = None,
) -> dict[str, Any]:
    """Compare the arms of one or more studies: does information help beyond its dose?

    A setting that is null is that of the study's file, as `pgpo ablate` registered it before the first run, else the default of
    :class:`pgpo_lightning.studies.design.Design`.

    Args:
        runs: Folders that contain finished runs at any depth, single records, or ``.jsonl`` files with one record per line
            (``.jsonl.xz`` if compressed).
        output: Folder of ``report.md``, ``report.json``, the figures, and ``runs.jsonl`` with the records themselves. Existing
            files are overwritten. ``runs.jsonl`` is small enough to keep: the report can be made from it again, also together
            with new runs. It is not written if all records come from ``.jsonl`` files of this folder.
        baseline: The arm that every other arm is compared with; ``sdpo`` by default.
        information: Names of the arms that use information; ``*`` at the end matches any suffix. Several in brackets:
            ``[pgpo*,centred*]``. By default ``pgpo*``.
        controls: Names, without the suffix, of the arms with the dose of an information arm: ``pgpo-1.0`` has the control
            ``constant-1.0``. By default ``[constant,random,shuffled,replayed,inverse]``.
        decisive: Controls that an information arm has to exceed for a "yes", every one of them; by default all of `controls`.
        measures: Measures on which it has to exceed them, every one: the score at the last evaluation, at the best one, or its
            mean over the steps (``final``, ``best``, ``area``). The first one is drawn, and chooses the condition of a tuned arm.
            By default ``[final,best]``.
        score: ``avg``, the mean reward of samples, by default, or ``solution-probability``, the exact probability of the worked
            solution.
        pool: Which conditions are averaged: those in which the baseline learns (``learning``, by default), or ``all``.
        margin: The smallest difference of interest; 0.02 by default. A "no" excludes a gain of this size.
        collapse: A run has collapsed if its avg@k is below this fraction of the base model's; 0.5 by default.

    Returns:
        The content of ``report.json``.

    Raises:
        ValueError: If there are no runs, if the runs of a study cannot be compared, or if a setting is out of range.
        FileExistsError: If `output` is a file.
    """
    folder = output_folder(output)
    names = {"information": information, "controls": controls, "decisive": decisive, "measures": measures}
    others = {"baseline": baseline, "score": score, "pool": pool, "margin": margin, "collapse": collapse}
    explicit = {name: _names(value) for name, value in names.items() if value is not None}
    paths = [Path(path) for path in runs]
    records, registered = load_runs(paths), registrations(paths)
    design, plan = judged_by(
        registered, **explicit, **{name: value for name, value in others.items() if value is not None}
    )
    groups = conditions(records, design)
    content = analyse(records, design, plan)
    content["registrations"] = [outcome(one, groups, design) for one in registered]
    content["conclusion"] = conclude(content)
    with replacing(folder / "curves.png") as file:
        draw_curves(groups, design, file.stream)
    with replacing(folder / "forest.png") as file:
        draw_forest(content, file.stream)
    figures = {"curves": "curves.png", "differences": "forest.png"}
    if any(condition.multipliers or condition.informed for condition in groups):
        with replacing(folder / "multipliers.png") as file:
            draw_multipliers(groups, design, file.stream)
        figures["multipliers and information"] = "multipliers.png"
    if any(mean_rates(condition) for condition in groups):
        with replacing(folder / "doses.png") as file:
            draw_doses(groups, design, file.stream)
        figures["score against learning rate x dose"] = "doses.png"
    write_text(folder / "report.md", markdown(content, figures))
    if not all(holds_many(path) and path.resolve().parent == folder.resolve() for path in paths):
        write_runs(records, folder / "runs.jsonl")
        if registered:
            write_registrations([as_json(one) for one in registered], folder / FILE)
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
    report(**vars(brief(parser, ["report", *args]).parse_args(args)))


def _names(names: Sequence[str] | str) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
