"""The command ``pgpo report``: what finished runs say, as Markdown, JSON and pictures.

It reads the records that runs leave and nothing else; the same records give the same report.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import jsonargparse

from pgpo_lightning.core.settings import Positive, Range, Text, checked
from pgpo_lightning.monitoring.run_record import load_runs, write_runs
from pgpo_lightning.studies.analysis import analyse
from pgpo_lightning.studies.comparisons import CONTROLS, Design, studies
from pgpo_lightning.studies.figures import draw_curves, draw_forest, draw_multipliers
from pgpo_lightning.studies.measures import Measure
from pgpo_lightning.studies.output import output_folder, plain
from pgpo_lightning.studies.report_text import conclude, markdown


@checked
def report(
    runs: list[Text],
    output: Text = "report",
    baseline: Text = "sdpo",
    information: list[Text] | Text = "pgpo*",
    controls: list[Text] | Text = list(CONTROLS),  # noqa: B006  (shown by --help, never changed)
    decisive: list[Text] | Text = "constant",
    measure: Measure = "final",
    margin: Positive = 0.02,
    collapse: Annotated[float, Range(above=0, below=1)] = 0.5,
) -> dict[str, Any]:
    """Compare the arms of one or more studies: does information help beyond its dose?

    Args:
        runs: Folders with finished runs anywhere below them, single records, or ``.jsonl`` files with a record per line.
        output: The folder to write ``report.md``, ``report.json``, pictures and ``runs.jsonl``, the records themselves, into;
            what is there is written over. The last is small enough to be kept: with it the report can be made again, with new
            runs beside the old ones.
        baseline: The arm that every other arm is compared with.
        information: Names of the arms that use information; ``*`` at the end stands for any suffix. Several in brackets:
            ``[pgpo*,centred*]``.
        controls: Names of the arms with the dose of an information arm, without its suffix: that of ``pgpo-1.0`` is
            ``constant-1.0``.
        decisive: The controls that an information arm has to beat for a "yes". PGPO's referee would ask for
            ``[constant,random,shuffled,replayed]``.
        measure: The held-out score that decides: at the last evaluation, at the best one, or the mean over the steps.
        margin: The smallest difference of interest: a "no" excludes a gain of this size.
        collapse: A run has collapsed when its held-out score falls below this share of the base model's.

    Returns:
        What ``report.json`` holds.

    Raises:
        ValueError: If there are no runs, if those of a study cannot be compared, or if a setting is out of range.
        FileExistsError: If `output` is a file.
    """
    folder = output_folder(output)
    design = Design(
        baseline, _names(information), _names(controls), _names(decisive), measure, margin=margin, collapse=collapse
    )
    records = load_runs([Path(path) for path in runs])
    content = analyse(records, design)
    content["conclusion"] = conclude(content)
    folder.mkdir(parents=True, exist_ok=True)
    groups = studies(records, design)
    draw_curves(groups, design, folder / "curves.png")
    draw_forest(content, folder / "forest.png")
    pictures = {"curves": "curves.png", "differences": "forest.png"}
    if any(study.multipliers or study.informed for study in groups):
        draw_multipliers(groups, design, folder / "multipliers.png")
        pictures["multipliers and information"] = "multipliers.png"
    (folder / "report.md").write_text(markdown(content, pictures), encoding="utf-8")
    write_runs(records, folder / "runs.jsonl")
    made = plain(content)
    (folder / "report.json").write_text(json.dumps(made, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"{content['conclusion']}\n\nreport: {folder / 'report.md'}")
    return made


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


def _names(given: list[str] | str) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
