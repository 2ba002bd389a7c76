"""Figures of the pages on studies are those of the committed records."""

import pytest

from pgpo_lightning.studies.stopping import decide_to_stop
from tests.support.committed import difference, groups, known, of_report, page, records, study, unknown

LOW = {
    "sdpo": "SDPO",
    "pgpo-8": "PGPO alpha 8 (dose 1.67)",
    "constant-8": "constant of that dose",
    "random-8": "random",
    "shuffled-8": "shuffled",
    "replayed-8": "replayed from another seed",
    "inverse-8": "inverse, exp(-alpha I)",
}


def test_the_study_at_the_lowest_rate_ended_at_its_first_look():
    spec, runs = study("low"), records("low/runs.jsonl.xz")
    decision = decide_to_stop(runs, spec)
    assert (decision.stop, decision.seeds) == (True, 5)
    assert decision.why == "Decided at the look at 5 seeds (pgpo-8: equivalent)."
    planned = len(spec.runs())
    assert f"{planned - len(runs)} of {planned} runs were not needed" in page("findings.md")


@pytest.mark.parametrize("name", LOW)
def test_rows_of_the_lowest_rate(name):
    arms = groups("low/runs.jsonl.xz", study("low"))["lr=5e-5"].arms
    arm, base, pgpo = arms[name], arms["sdpo"], arms["pgpo-8"]
    first = arm.rows(base.seeds)  # the replayed control needs a sixth seed of PGPO
    gain = "" if arm is base else f"{difference(arm, base)} "
    over = "" if arm is pgpo else f"{difference(pgpo, arm)} "
    assert f"| {LOW[name]} | {arm.tables['final'][first].mean():.3f} | {gain}| {over}|" in page("findings.md")
    assert f"{pgpo.doses[pgpo.rows(base.seeds)].mean():.2f}" == "1.67"
    assert f"{base.base.mean():.3f}" == "0.377"


def test_every_interval_of_the_findings_is_known():
    quoted = of_report("findings") | {"0.019 [0.003, 0.035]"}  # what PGPO ends below SDPO, without its sign
    for name, file in (("low", "low/runs.jsonl.xz"), ("premise", "premise/runs.jsonl.xz")):
        quoted |= known(groups(file, study(name)))
    for name, file in (("toy", "findings/runs.jsonl"), ("toy", "findings/low.jsonl")):
        quoted |= known(groups(file, study(name)))
    for prediction in study("premise").predictions:
        low, high = prediction.interval
        quoted.add(f"{prediction.value:+.3f} [{low:+.3f}, {high:+.3f}]")
    assert unknown(page("findings.md"), quoted) == []
