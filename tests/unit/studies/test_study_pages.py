"""Figures of the pages on studies are those of the committed records."""

import pytest

from pgpo_lightning.studies.collapse_shares import collapsed_share
from pgpo_lightning.studies.decisions import estimate
from pgpo_lightning.studies.predictions import seen
from pgpo_lightning.studies.stopping import decide_to_stop
from tests.support.committed import difference, groups, known, of_report, page, records, shown, study, unknown

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
    for name in ("low", "premise", "premise-crossed", "collapse"):
        quoted |= known(groups(f"{name}/runs.jsonl.xz", study(name)))
    for name, file in (("toy", "findings/runs.jsonl"), ("toy", "findings/low.jsonl")):
        quoted |= known(groups(file, study(name)))
    for prediction in (*study("premise").predictions, *study("premise-crossed").predictions):
        low, high = prediction.interval
        quoted.add(f"{prediction.value:+.3f} [{low:+.3f}, {high:+.3f}]")
    assert unknown(page("findings.md"), quoted) == []


RIVALS = {
    "sdpo": "SDPO",
    "srpo": "SRPO",
    "srpo-dw": "SRPO with DW weights",
    "sc-sdpo": "SC-SDPO",
    "dw-sdpo": "DW-SDPO",
    "cgtr": "CGTR",
    "frozen": "frozen teacher",
    "restart-and-freeze": "restart-and-freeze",
    "opsd-clip": "OPSD's clip",
    "demopsd": "DemoPSD (on the reverse KL)",
    "reverse-kl": "reverse KL",
    "rlsd": "RLSD",
    "grpo": "GRPO",
    "pgpo-1": "PGPO alpha 1",
    "pgpo-8": "PGPO alpha 8",
    "constant-8": "constant of that dose",
}


def rival_row(found, name):
    """The row of an arm: at each rate its final score and the difference to SDPO, and the lost runs at the higher one."""
    cells = [RIVALS[name]]
    for rate in ("lr=1e-4", "lr=2e-4"):
        arms = found[rate].arms
        gain = "" if name == "sdpo" else difference(arms[name], arms["sdpo"])
        cells += [f"{arms[name].tables['final'].mean():.3f}", gain]
    lost = arms[name].collapsed
    cells.append(f"{sum(step is not None for step in lost)}/{len(lost)}")
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


@pytest.mark.parametrize("name", RIVALS)
def test_rows_of_the_rivals(name):
    assert rival_row(groups("rivals/runs.jsonl.xz", study("rivals")), name) in page("rivals.md")


def test_every_interval_of_the_rivals_is_known():
    quoted = set()
    for name in ("rivals", "systems"):
        quoted |= known(groups(f"{name}/runs.jsonl.xz", study(name)))
    assert unknown(page("rivals.md"), quoted) == []


HAPO = {
    "grpo": "GRPO",
    "hapo-0.8": "HAPO, threshold 0.8",
    "hapo-0.2": "threshold 0.2 (no success at all)",
    "annealed": "0.8, annealed until closed at step 31",
    "always": "always (LUFFY)",
    "random": "random, as often open as 0.8's",
    "random-injected": "random, as many demonstrations as 0.8",
    "random-0.2": "random, as often open as 0.2's",
    "thompson": "a draw from the posterior (Thompson)",
    "accumulated": "accumulated counts",
    "no-advantage": "without advantage",
    "buffer": "buffer instead of column",
}


def curve_mean(arm, tag, start=0, stop=None):
    """The mean of a curve over runs and steps."""
    return sum(
        sum(values[start:stop]) / len(values[start:stop]) for _, values in (run.curves[tag] for run in arm.runs)
    ) / len(arm.runs)


def hapo_row(found, name):
    """The row of an arm at temperature 0.6."""
    arms = found["base"].arms
    arm = arms[name]
    last = [run.curves["val/pass@8"][1][-1] for run in arm.runs]
    cells = [HAPO[name], shown(estimate(arm.tables["final"]), 2, ""), f"{sum(last) / len(last):.2f}"]
    cells.append("" if name == "grpo" else difference(arm, arms["grpo"], digits=2))
    cells.append("" if name in ("grpo", "hapo-0.8") else difference(arm, arms["hapo-0.8"], digits=2))
    if name == "grpo":
        return f"| {' | '.join([*cells, '', ''])} |".replace("|  |", "| |").replace("|  |", "| |")
    shares = [curve_mean(arm, "hapo/injected_groups", *part) for part in ((0, 10), (-10, None))]
    cells += [f"{shares[0]:.2f} -> {shares[1]:.2f}", f"{curve_mean(arm, 'hapo/teacher_token_share'):.2f}"]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


@pytest.mark.parametrize("name", HAPO)
def test_rows_of_hapo(name):
    assert hapo_row(groups("hapo/runs.jsonl.xz", study("hapo")), name) in page("hapo.md")


@pytest.mark.parametrize(("condition", "temperature"), [("t0.3", "0.3"), ("base", "0.6"), ("t1.0", "1.0")])
def test_hapo_against_grpo_by_temperature(condition, temperature):
    arms = groups("hapo/runs.jsonl.xz", study("hapo"))[condition].arms
    grpo, hapo = (shown(estimate(arms[name].tables["final"]), 2, "") for name in ("grpo", "hapo-0.8"))
    row = f"| {temperature} | {grpo} | {hapo} | {difference(arms['hapo-0.8'], arms['grpo'], digits=2)} |"
    assert row in page("hapo.md").replace("**", "")


def test_every_interval_of_hapo_is_known():
    assert unknown(page("hapo.md"), known(groups("hapo/runs.jsonl.xz", study("hapo")))) == []


@pytest.mark.parametrize(
    ("file", "names", "inside"),
    [
        ("rivals/runs.jsonl.xz", ["rivals"], 10),
        ("hapo/runs.jsonl.xz", ["hapo", "hapo-rare"], 7),
        ("low/runs.jsonl.xz", ["low"], 3),
        ("collapse/runs.jsonl.xz", ["collapse"], 6),
        ("premise-crossed/runs.jsonl.xz", ["premise-crossed"], 10),
        ("systems/runs.jsonl.xz", ["systems"], 11),
        ("tgpo/runs.jsonl.xz", ["tgpo"], 2),
    ],
)
def test_records_are_whole_and_so_many_predictions_held(file, names, inside):
    made = {(run.study, run.arm, run.seed) for run in records(file)}
    planned = {(run.condition, run.arm, run.seed) for name in names for run in study(name).runs()}
    assert made <= planned
    assert made == planned or names == ["low"]
    found = [*groups(file, study(names[0])).values()]
    assert sum(seen(one, found)["in_predicted"] for name in names for one in study(name).predictions) == inside


CROSSED = {
    "pgpo-update": "PGPO on the update",
    "constant-update": "constant of its dose",
    "shuffled-update": "shuffled",
    "replayed-update": "replayed from another seed",
    "inverse-update": "inverse",
    "oracle-update": "oracle on the update",
    "pgpo-gradient": "PGPO on the gradient",
    "shuffled-gradient": "shuffled",
    "oracle-gradient": "oracle on the gradient",
}


def crossed_rows(found):
    """The rows of every arm: in each condition its final score minus SDPO's, and its lost runs."""
    crossed = [found[name].arms for name in ("beta0", "blocks", "beta0-blocks")]
    base = [f"{arms['sdpo'].tables['final'].mean():.3f}" for arms in crossed]
    rows = [f"| SDPO | {' | '.join(base)} |"]
    for name, label in CROSSED.items():
        cells = []
        for arms in crossed:
            lost = sum(step is not None for step in arms[name].collapsed)
            cells.append(difference(arms[name], arms["sdpo"]) + (f", {lost} lost" if lost else ""))
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return rows


def test_rows_of_the_crossed_premise():
    for row in crossed_rows(groups("premise-crossed/runs.jsonl.xz", study("premise-crossed"))):
        assert row in page("findings.md")


COLLAPSE = {
    ("survives", "sdpo"): "2e-4 | SDPO",
    ("survives", "pgpo-8"): "2e-4 | PGPO alpha 8",
    ("survives", "constant-8"): "2e-4 | its constant",
    ("survives", "random-8"): "2e-4 | its random",
    ("survives", "pgpo-relative"): "2e-4 | relative, alpha 8",
    ("survives", "constant-relative"): "2e-4 | its constant",
    ("survives", "random-relative"): "2e-4 | its random",
    ("lost", "sdpo"): "5e-4 | SDPO",
    ("lost", "pgpo-8"): "5e-4 | PGPO alpha 8",
    ("lost", "constant-8"): "5e-4 | its constant",
    ("lost", "pgpo-certainty"): "5e-4 | teacher-certainty, alpha 16",
    ("lost", "constant-certainty"): "5e-4 | its constant",
    ("lost", "random-certainty"): "5e-4 | its random",
}


@pytest.mark.parametrize(("condition", "name"), COLLAPSE)
def test_rows_of_the_collapse(condition, name):
    spec = study("collapse")
    arms = groups("collapse/runs.jsonl.xz", spec)[condition].arms
    arm, kind, suffix = arms[name], *name.partition("-")[::2]
    share = collapsed_share(arm, "final")
    lost = f"{share['count']} of {len(arm.seeds)} [{share['low']:.2f}, {share['high']:.2f}]"
    over = f"{difference(arms[f'pgpo-{suffix}'], arm)} " if kind in ("constant", "random") else ""
    row = (
        f"| {COLLAPSE[condition, name]} | {arm.doses.mean():.2f} | {lost} | {arm.tables['final'].mean():.3f} | {over}|"
    )
    assert row in page("findings.md")
    assert {(condition, each) for condition in spec.conditions for each in spec.arms_of(condition)} == set(COLLAPSE)


SYSTEMS = {
    "sdpo": "SDPO",
    "pgpo-1": "PGPO alpha 1",
    "grpo": "GRPO",
    "srpo": "SRPO",
    "i-sdpo": "I-SDPO",
    "cepo": "CEPO",
    "drift": "DRIFT",
    "column": "SDPO on reference solutions",
    "opsd": "OPSD",
    "sdft": "SDFT",
    "opcd": "OPCD",
    "placebo-other": "another question's solution",
    "placebo-template": "the template alone",
    "own-feedback": "the attempt's own feedback",
    "placebo-feedback": "another attempt's feedback",
    "opd": "OPD (outside teacher)",
    "tgpo": "TGPO (outside teacher)",
}


def system_row(found, name):
    """The row of an arm: at each rate its final score, the difference to SDPO, and the lost runs at the higher one."""
    cells = [SYSTEMS[name]]
    for rate in ("lr=5e-5", "lr=1e-4"):
        arms = found[rate].arms
        gain = "" if name == "sdpo" else difference(arms[name], arms["sdpo"])
        cells += [f"{arms[name].tables['final'].mean():.3f}", gain]
    lost = arms[name].collapsed
    cells.append(f"{sum(step is not None for step in lost)}/{len(lost)}")
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


@pytest.mark.parametrize("name", SYSTEMS)
def test_rows_of_the_remaining_systems(name):
    assert system_row(groups("systems/runs.jsonl.xz", study("systems")), name) in page("rivals.md")


def test_every_interval_of_the_methods_is_known():
    found = groups("tgpo/runs.jsonl.xz", study("tgpo"))
    assert unknown(page("methods.md"), known(found)) == []
    arms = found["lr=1e-4"].arms
    for name in ("tgpo-0.002", "tgpo-0.5"):
        assert difference(arms[name], arms["grpo"]) in page("methods.md")
