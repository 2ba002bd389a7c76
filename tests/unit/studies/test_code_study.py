"""Figures of the page on the toy programs are those of the committed records."""

import pytest

from pgpo_lightning.studies.predictions import seen
from tests.support.committed import difference, groups, known, page, records, study, unknown

FILE, PAGE = "code_toy/runs.jsonl.xz", "code_toy.md"
ARMS = {
    "sdpo": "SDPO: a sibling's program, else feedback",
    "pgpo-8": "PGPO alpha 8 of it",
    "grpo": "GRPO",
    "full": "feedback alone: input, output, expected output",
    "no-expected": "without the expected output",
    "verdict": "titles alone",
    "template": "the template alone",
    "placebo": "feedback on another question",
}


@pytest.mark.parametrize("name", ARMS)
def test_rows_of_the_toy_programs(name):
    arms = groups(FILE, study("code"))["lr=4e-4"].arms
    arm = arms[name]
    minus = [("" if name == other else f"{difference(arm, arms[other])} ") for other in ("sdpo", "full")]
    hidden = sum(run.curves["val/avg@1"][1][-1] for run in arm.runs) / len(arm.runs)
    row = f"| {ARMS[name]} | {arm.tables['final'].mean():.3f} | {minus[0]}| {minus[1]}| {hidden:.3f} |"
    assert row in page(PAGE)
    assert set(study("code").arms) == set(ARMS)


def test_the_records_are_whole_and_every_interval_is_known():
    spec = study("code")
    made = {(run.study, run.arm, run.seed) for run in records(FILE)}
    assert made == {(run.condition, run.arm, run.seed) for run in spec.runs()}
    assert unknown(page(PAGE), known(groups(FILE, spec))) == []


def test_what_was_predicted_and_seen():
    found = [*groups(FILE, study("code")).values()]
    for one in study("code").predictions:
        told = seen(one, found)
        low, high = one.interval
        row = f"| {one.arm} - {one.against} | {low:+.2f} to {high:+.2f} | {told['value']:+.3f} | "
        assert row + f"{'yes' if told['in_predicted'] else 'no'} |" in page(PAGE)
