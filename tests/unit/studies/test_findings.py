"""The figures of the premise study in docs/findings.md are those of its committed records."""

import pytest

from pgpo_lightning.monitoring.run_record import load_runs
from pgpo_lightning.studies.comparisons import conditions
from pgpo_lightning.studies.decisions import differences, estimate
from pgpo_lightning.studies.predictions import seen
from pgpo_lightning.studies.spec import read_study
from tests.support import CONFIGS, ROOT, committed

PAGE = " ".join((ROOT / "docs" / "findings.md").read_text().split())
QUOTED = [
    ("answer", "pgpo-gradient", "sdpo"),
    ("answer", "oracle-gradient", "pgpo-gradient"),
    ("answer", "pgpo-update", "constant-update"),
    ("answer", "oracle-update", "pgpo-update"),
    ("answer", "pgpo-gradient", "constant-gradient"),
    ("answer", "pgpo-gradient", "random-gradient"),
    ("answer", "pgpo-gradient", "shuffled-gradient"),
    ("answer", "pgpo-gradient", "replayed-gradient"),
    ("answer", "pgpo-gradient", "inverse-gradient"),
    ("answer", "pgpo-update", "shuffled-update"),
    ("answer-blocks", "pgpo-update", "constant-update"),
    ("answer-beta0", "pgpo-update", "constant-update"),
    ("first-step", "pgpo-paper", "constant-paper"),
    ("wrong", "pgpo-gradient", "sdpo"),
    ("inverted", "pgpo-gradient", "sdpo"),
]
"""Contrasts that the text quotes with their interval."""


@pytest.fixture(scope="module")
def study(monkeypatch_module):
    monkeypatch_module.chdir(ROOT)
    return read_study(CONFIGS / "studies" / "premise.yaml")


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def records():
    return load_runs([ROOT / "docs" / "premise" / "runs.jsonl.xz"])


@pytest.fixture(scope="module")
def groups(study, records):
    return {group.name: group for group in conditions(records, study.design)}


def test_the_records_are_the_whole_study(study, records):
    planned = {(run.condition, run.arm, run.seed) for run in study.runs()}
    assert {(run.study, run.arm, run.seed) for run in records} == planned
    assert len(records) == len(planned) == 330


@pytest.mark.parametrize(
    ("name", "held", "sentence"),
    [
        ("premise", (15, 18), "Fifteen of eighteen lie where they were predicted"),
        ("premise-crossed", (10, 10), "All ten lie where they were predicted"),
    ],
)
def test_what_was_predicted_and_seen(name, held, sentence):
    spec = committed.study(name)
    groups = committed.groups(f"{name}/runs.jsonl.xz", spec)
    inside = []
    for one in spec.predictions:
        found = seen(one, list(groups.values()))
        inside.append(found["in_predicted"])
        low, high = one.interval
        row = (
            f"| {one.condition} | {one.arm} \N{MINUS SIGN} {one.against} | {one.value:+.3f} [{low:+.3f}, {high:+.3f}] | "
            f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}] | {'yes' if found['in_predicted'] else 'no'} |"
        )
        assert row in PAGE
        assert found["seeds"] == 10
    assert (sum(inside), len(inside)) == held
    assert sentence in PAGE


@pytest.mark.parametrize(("condition", "arm", "against"), QUOTED)
def test_quoted_contrasts(groups, condition, arm, against):
    arms = groups[condition].arms
    mean = estimate(differences(arms[arm], arms[against], ("final",))["final"])
    low, high = mean.interval()
    assert f"{mean.value:+.3f} [{low:+.3f}, {high:+.3f}]" in PAGE


def test_scores_of_the_baseline_and_spreads(groups):
    for name, group in groups.items():
        row = next(
            line for line in (ROOT / "docs" / "findings.md").read_text().splitlines() if line.startswith(f"| {name} |")
        )
        assert row.split("|")[4].strip() == f"{group.arms['sdpo'].tables['final'].mean():.3f}"
    runs = groups["answer"].arms["pgpo-update"].runs
    spread = lambda tag: sum(run.curves[tag][1][-1] for run in runs) / len(runs)  # noqa: E731
    quoted = f"spread of rho is {spread('lr/multiplier_std'):.2f}, that of the weights batches get is"
    assert f"{quoted} {spread('lr/batch_weight_std'):.2f}" in PAGE


def test_collapsed_runs(groups):
    every = {(name, arm.name): arm for name, group in groups.items() for arm in group.arms.values()}
    counts = {key: sum(step is not None for step in arm.collapsed) for key, arm in every.items()}
    found = {key: count for key, count in counts.items() if count}
    assert found == {
        ("answer", "inverse-gradient"): 2,
        ("answer-blocks", "constant-update"): 4,
        ("first-step", "constant-paper"): 1,
        ("first-step", "pgpo-paper"): 1,
        ("inverted", "pgpo-gradient"): 4,
        ("inverted", "sdpo"): 3,
    }
