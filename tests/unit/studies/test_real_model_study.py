"""Figures of the page on a real model are those of the committed records."""

import json

import pytest

from pgpo_lightning.probe.calibration import read_probe
from pgpo_lightning.probe.probe_report import probe_report
from pgpo_lightning.studies.decisions import estimate
from pgpo_lightning.studies.predictions import seen
from tests.support import ROOT
from tests.support.committed import difference, groups, known, page, records, shown, study, unknown

FILE, PAGE, FOLDER = "real_model/runs.jsonl.xz", "real_model.md", ROOT / "docs" / "real_model"
ARMS = {"sdpo": "SDPO", "pgpo": "PGPO, alpha 1", "grpo": "GRPO", "supervised": "supervised steps on own right answers"}
CONDITIONS = {"full": "all weights", "lora": "adapter"}
CONTEXTS = ("student", "example", "two examples", "arrow", "shipped", "example of another answer")


def lines(name):
    return [json.loads(line) for line in (FOLDER / name).read_text(encoding="utf-8").splitlines()]


def arm_row(condition, name):
    arms = groups(FILE, study("real-model"))[condition].arms
    arm, sdpo = arms[name], arms["sdpo"]
    minus = "" if arm is sdpo else f"{difference(arm, sdpo)} "
    seconds = sum(run.cpu_seconds for run in arm.runs) / len(arm.runs)
    by_seed = ", ".join(f"{score:.3f}" for score in arm.tables["final"].mean(axis=1))
    score = shown(estimate(arm.tables["final"]), sign="")
    return f"| {ARMS[name]} | {CONDITIONS[condition]} | {score} | {by_seed} | {minus}| {seconds:.0f} |"


def prediction_row(one):
    told = seen(one, [*groups(FILE, study("real-model")).values()])
    low, high = one.interval
    start = f"| {CONDITIONS[one.condition]}: {one.arm} - {one.against} | {low:+.2f} to {high:+.2f} | {told['value']:+.3f} | "
    return start + f"{'yes' if told['in_predicted'] else 'no'} |"


def probe_rows():
    report = probe_report(read_probe(FOLDER / "probe.json"), "probe.png")
    return [line for line in report.splitlines() if line.startswith("| ") and "context" not in line]


def screen_rows():
    found = {}
    for row in lines("screen.jsonl"):
        cells = found.setdefault((row["rule"], row["draw"]), {}).setdefault(row["context"], [])
        cells.append(f"{row['gap']:+.2f}" if row["context"] != "student" else f"{row['score']:.2f}")
    return [
        f"| {rule}, {draw} |" + "".join(f" {', '.join(cells[name])} |" if name in cells else " |" for name in CONTEXTS)
        for (rule, draw), cells in found.items()
    ]


def pilot_rows():
    rows = [row for row in lines("pilots.jsonl") if row["kind"] == "probe"]
    return [
        f"| {row['rule']}, {'-' if row['draw'] is None else row['draw']} | {row['temperature']:g} | {row['questions']} x "
        f"{row['samples']} | {row['student']:.3f} | {row['context']} | {row['teacher']:.3f} | {row['net']:+.3f} ± "
        f"{row['error']:.3f} |"
        for row in rows
    ]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", ARMS)
def test_rows_of_the_arms(name, condition):
    assert arm_row(condition, name) in page(PAGE)


def test_the_records_are_those_of_the_study_and_every_interval_is_known():
    spec = study("real-model")
    made = {(run.study, run.arm, run.seed) for run in records(FILE)}
    planned = {(run.condition, run.arm, run.seed) for run in spec.runs()}
    assert made == planned
    assert unknown(page(PAGE), known(groups(FILE, spec))) == []
    base = groups(FILE, spec)["full"].arms["sdpo"].base.mean()
    assert f"starts from {base:.3f}" in page(PAGE)
    (registered,) = json.loads((FOLDER / "registration.json").read_text(encoding="utf-8"))
    assert registered["runs_before"] == 0


def test_what_was_predicted_and_seen():
    assert [row for row in map(prediction_row, study("real-model").predictions) if row not in page(PAGE)] == []


def test_rows_of_probes_and_rules():
    rows = [*probe_rows(), *screen_rows(), *pilot_rows()]
    assert len(rows) == 6 + 19 + 10
    assert [row for row in rows if row not in page(PAGE)] == []


def test_what_pilots_of_another_rule_learnt():
    runs = {row["trained"]: row for row in lines("pilots.jsonl") if row["kind"] == "run" and row["rule"] == "larger"}
    change = {name: f"{run['change']:+.3f} ± {run['error']:.3f}" for name, run in runs.items()}
    assert f"{change['all weights']} (all weights) and {change['adapter']} (adapter)" in page(PAGE)
    ends = [
        f"{runs['all weights'][f'{when}_if_{which}']:.2f}"
        for which in ("first", "second")
        for when in ("before", "after")
    ]
    told = "its probability rose from {} to {}, where the second is, it fell from {} to {}".format(*ends)
    assert told in page(PAGE)
