"""Comparisons of a report: pairs, controls, doses, notes, and the sentence that follows from the numbers."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from pgpo_lightning.monitoring.collapse_rules import collapse_step
from pgpo_lightning.studies import measures
from pgpo_lightning.studies.analysis import analyse
from pgpo_lightning.studies.comparisons import conditions
from pgpo_lightning.studies.conclusion import QUESTION, conclude, phrase
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import two_way
from pgpo_lightning.studies.simulation import World
from tests.support.studies import DOSES, runs, study_of, tiny

FAST = Design(draws=0)


def test_runs_with_other_held_out_questions_are_not_compared():
    """Of equal number: as unlike as apples and pears."""
    known = [tiny(0, "sdpo", data={"validation": "a" * 64}), tiny(0, "pgpo-1", data={"validation": "b" * 64})]
    message = "same held-out questions, but got those with sha256 bbbbbbbbbbbb in s/pgpo-1/0; those .* aaaaaaaaaaaa in s/sdpo/0"
    with pytest.raises(ValueError, match=message) as error:
        conditions(known, FAST)
    assert "\n" not in str(error.value)
    known[1].data["validation"] = "a" * 64
    (same,) = analyse(known, FAST)["studies"]
    old = tiny(1, "sdpo")
    (mixed,) = analyse([*known, old], FAST)["studies"]
    expected = "The records of 1 of 3 runs do not identify their held-out questions: for these runs only the number"
    assert any(note.startswith(expected) for note in mixed["notes"])
    assert not any("identify" in note for note in same["notes"])


def test_measures_of_a_run_are_those_one_would_write_down():
    run = tiny(curves={"response_length/mean": [[26, 27, 28, 30], [9.0, 9.0, 1.0, 3.0]]}, rho=[1.0, 2.0])
    steps, table = measures.evaluations(run), measures.answers(run)
    assert steps == [0, 10, 30]
    each = {name: values.mean() for name, values in measures.per_question(steps, table).items()}
    area = (10 * (0.5 + 0.75) / 2 + 20 * (0.75 + 0.25) / 2) / 30
    assert each == pytest.approx({"final": 0.25, "best": 0.75, "area": area})
    assert measures.at_the_end(run, measures.LENGTH) == 2.0
    assert math.isnan(measures.at_the_end(run, measures.ENTROPY))
    assert measures.dose(run) == 1.5
    assert measures.dose(tiny()) == 1.0


def test_one_evaluation_is_all_measures_at_once():
    each = measures.per_question([30], np.array([[0.0, 1.0]]))
    assert [values.tolist() for values in each.values()] == [[0.0, 1.0]] * 3


def test_collapse_is_the_first_score_below_half_of_the_base():
    steps = [0, 10, 20]
    assert collapse_step(steps, np.array([0.5, 0.2, 0.6])) == 10
    assert collapse_step(steps, np.array([0.5, 0.25, 0.3])) is None
    assert collapse_step(steps, np.array([0.5, 0.25, 0.3]), below=0.55) == 10
    content = analyse([tiny(0), tiny(1, scores=((0.5, 0.5), (0.0, 0.0), (0.0, 0.0)))], FAST)
    gone = study_of(content)["arms"][0]["collapsed"]
    assert (gone["count"], gone["share"], gone["step"], gone["steps"]) == (1, 0.5, 10, {"0": None, "1": 10})


def test_differences_are_paired_by_seed_and_question():
    pgpo = [tiny(seed, "pgpo", ((0.5, 0.5), (0.5, 0.5), final)) for seed, final in ((0, (0.5, 1.0)), (1, (1.0, 1.0)))]
    sdpo = [
        tiny(seed, "sdpo", ((0.5, 0.5), (0.5, 0.5), final))
        for seed, final in ((1, (0.5, 0.5)), (0, (0.0, 1.0)), (2, (1, 1)))
    ]
    content = study_of(analyse(pgpo + sdpo, FAST))
    (row,) = content["comparisons"]
    mean = two_way(np.array([[0.5, 0.0], [0.5, 0.5]]))
    assert (row["arm"], row["against"], row["seeds"]) == ("pgpo", "sdpo", 2)
    assert row["final"]["value"] == mean.value == 0.375
    assert (row["final"]["low"], row["final"]["high"]) == mean.interval()
    assert row["final"]["p"] == row["final"]["p_holm"] == mean.p()
    assert any("pgpo has no seed 2" in note for note in content["notes"])


def test_information_arms_meet_the_controls_of_their_own_dose():
    rows = study_of(analyse(runs(), FAST))["comparisons"]
    assert [(r["arm"], r["against"]) for r in rows if r["kind"] != "baseline"] == [
        ("pgpo-1.0", "constant-1.0"),
        ("pgpo-1.0", "random-1.0"),
    ]
    assert [r["arm"] for r in rows if r["kind"] == "baseline"] == [
        "pgpo-1.0",
        "pgpo-2",
        "constant-1.0",
        "random-1.0",
        "grpo",
    ]
    notes = study_of(analyse(runs(), FAST))["notes"]
    assert "No control of the same dose, and therefore no answer, for: pgpo-2." in notes
    assert any(note.startswith("pgpo-1.0 has no shuffled-1.0, replayed-1.0, inverse-1.0: without") for note in notes)
    for name in ("final", "best", "area"):  # corrected for all of them
        assert all(r[name]["p_holm"] >= r[name]["p"] for r in rows)
        assert min(r[name]["p_holm"] for r in rows) == pytest.approx(
            min(1, len(rows) * min(r[name]["p"] for r in rows))
        )


@pytest.mark.parametrize(
    ("patterns", "arm", "control"),
    [
        (("pgpo*",), "pgpo-1.0", "constant-1.0"),
        (("pgpo*",), "pgpo", "constant"),
        (("pgpo-8",), "pgpo-8", "constant-8"),
        (("token-pgpo*",), "token-pgpo-8", "constant-8"),
        (("sdpo2", "x*"), "x-y-1", "constant-y-1"),
    ],
)
def test_names_of_controls(patterns, arm, control):
    design = Design(information=patterns)
    assert design.control("constant", arm) == control
    assert design.suffix("other") is None


def test_doses_are_compared_and_a_control_that_misses_is_flagged():
    doses = DOSES | {"constant-1.0": 1.6}
    content = analyse(runs(doses=doses), FAST)
    constant, random = study_of(content)["doses"]
    assert constant["ratio"] == pytest.approx(1.6 / 1.5, abs=0.01)
    assert (constant["matched"], random["matched"]) == (False, True)
    assert "the doses do not match: constant-1.0 has 1.0" in conclude(content)
    assert "doses" not in conclude(analyse(runs(), FAST))


def test_the_sentence_follows_from_the_numbers():
    design = {"margin": 0.02}

    def sentence(answer, low=0.01, high=0.09, seeds=10, **changes):
        row = {"measure": "final", "seeds": seeds, "value": 0.05, "low": low, "high": high, "p": 0.01, "p_no": 0.001}
        arm = {
            "arm": "a",
            "answer": answer,
            "missing": [],
            "averages": ["c", "r"],
            "seeds": seeds,
            "level": 0.025,
            "p": 0.2,
        }
        arm |= {"seeds_needed": None, "seeds_if_seen": None, "questions_needed": None, "averaged": [row]} | changes
        return phrase({"answer": answer, "arms": [arm]}, design, 100)

    because = "(a minus the mean of c, r: final +0.050 [+0.010, +0.090])"
    assert sentence("yes") == f"yes {because}"
    assert sentence("yes", high=0.015).startswith("yes, but less than 0.02 (")
    assert sentence("no") == f"no, a gain of 0.02 or more on final is excluded {because}"
    assert sentence("equivalent") == f"equivalent within 0.02 {because}"
    assert sentence("equivalent", averages=["c"]).endswith("(a minus c: final +0.050 [+0.010, +0.090])")
    assert sentence("equivalent", seeds=2, missing=["r"]).endswith(
        "+0.090]; 2 seeds are too few to know their variance; without r)"
    )
    assert "(10 seeds), about 20 to 80 seeds are needed to distinguish 0 from 0.02 (" in sentence(
        "not resolved", seeds_needed=(20, 80), seeds_if_seen=(20, 80)
    )
    assert "20 to 80 seeds are needed to distinguish 0 from 0.02, or 11 to 41 if the observed difference" in sentence(
        "not resolved", seeds_needed=(20, 80), seeds_if_seen=(11, 41)
    )
    assert "cannot be resolved by more seeds: at least 400 questions are needed, not 100" in sentence(
        "not resolved", questions_needed=400
    )
    assert sentence("not resolved", level=0.0).startswith("not resolved, because 10 seeds are between two looks (")
    assert sentence("not resolved", missing=["i"], p=0.01).startswith("not resolved, because there is no i (")
    assert sentence("not resolved", missing=["i"]) == f"not resolved at this sample size (10 seeds) {because}"
    alone = {"measure": "final", "seeds": 1, "value": 0.05, "low": math.nan, "high": math.nan, "p": math.nan}
    assert sentence("not resolved", seeds=1, averaged=[alone]) == (
        "not resolved, because a single seed has no interval (a minus the mean of c, r: final +0.050)"
    )


def test_a_large_planted_difference_is_found_and_pooled():
    world = World(seeds=8, questions=60)
    arms = {"pgpo-1": 0.15, "sdpo": 0.0} | {f"{control}-1": 0.0 for control in Design().controls}
    content = analyse(runs(1, "one", arms, world) + runs(2, "two", arms, world), FAST)
    assert [study_of(content, i)["answers"]["answer"] for i in (0, 1)] == ["yes", "yes"]
    assert content["pooled"]["studies"] == ["one", "two"]
    assert [row["learns"] for row in content["learning"]] == [True, True]
    (pooled,) = content["pooled"]["arms"]
    values = [study_of(content, i)["answers"]["arms"][0]["averaged"][0]["value"] for i in (0, 1)]
    assert pooled["averaged"][0]["value"] == pytest.approx(sum(values) / 2)
    assert re.fullmatch(
        r"Information helps beyond its dose, one, two together: yes \(pgpo-1 minus the mean of constant-1, random-1, shuffled-1, "
        r"replayed-1: final .*, best .*\); one: yes; two: yes\.",
        conclude(content),
    )


def test_studies_without_common_seeds_are_not_pooled():
    other = [replace(run, seed=run.seed + 100) for run in runs(2, "two")]
    content = analyse(runs(1, "one") + other, replace(FAST, pool="all"))
    assert content["pooled"]["answer"] == "not resolved"
    assert "arms have no common seeds" in conclude(content)


def test_conditions_without_a_common_information_arm_are_not_asked_together():
    other = runs(2, "two", {"sdpo": 0.0, "pgpo-2": 0.0, "constant-2": 0.0})
    content = analyse(runs(1, "one") + other, replace(FAST, pool="all"))
    assert content["pooled"]["arms"] == content["interaction"] == []
    assert "not asked of one, two together, because they share no information arm with a control; one: " in conclude(
        content
    )


def test_conditions_with_other_questions_are_reported_apart():
    apart = [runs(seed, name, world=World(seeds=4, questions=n)) for seed, name, n in ((1, "one", 60), (2, "two", 40))]
    content = analyse([*apart[0], *apart[1]], replace(FAST, pool="all"))
    assert (content["pooled"]["studies"], content["pooled"]["answer"], content["interaction"]) == ([], None, [])
    assert "not asked of conditions together, because their held-out questions differ; one: " in conclude(content)
    same = [
        replace(run, data={"validation": digest * 64})
        for digest, name in (("a", "one"), ("b", "two"))
        for run in runs(1, name)
    ]
    assert analyse(same, replace(FAST, pool="all"))["pooled"]["studies"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 29}, r"the same number of steps, but got 29 in lr=1/pgpo-1.0/2; 30 in lr=1/.* and 11 more"),
        ({"samples": 8}, r"the same number of samples per question, but got 8 in lr=1/pgpo-1.0/2; 4 in"),
        ({"questions": {"0": [0.5], "30": [0.5]}}, r"with an evaluation, but got \[0, 30\] in lr=1/pgpo-1.0/2; \[0, 15"),
        ({"questions": {str(s): [0.5] * 19 for s in (0, 15, 30)}}, r"questions, but got \[19\] in lr=1/pgpo-1.0/2; \[20\]"),
        ({"questions": {}}, r"evaluation, but got none in lr=1/pgpo-1.0/2"),
        ({"questions": {str(s): [math.nan] * 20 for s in (0, 15, 30)}}, r"a finite score .* none in lr=1/pgpo-1.0/2\."),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_compared_are_named(change, message):
    mixed = [replace(run, **change) if (run.arm, run.seed) == ("pgpo-1.0", 2) else run for run in runs()[:18]]
    with pytest.raises(ValueError, match=message):
        conditions(mixed, FAST)


def test_what_a_reader_has_to_know_is_noted():
    changed = runs()
    changed[0] = replace(changed[0], questions=changed[0].questions | {"0": [0.25] * 20})
    notes = study_of(analyse(changed, FAST))["notes"]
    assert any("give different answers with the same seed (0)" in note for note in notes)
    late = [
        replace(r, questions={k: v for k, v in r.questions.items() if k != "0"})
        for r in runs(arms={"x": 0.0, "y": 0.0})
    ]
    notes = " ".join(study_of(analyse(late, FAST))["notes"])
    assert "no evaluation at step 0" in notes
    assert "no arm sdpo, so there are no differences to a baseline. Choose another one with `--baseline` (" in notes
    assert "no information arm (pgpo*)" in notes


def test_a_last_evaluation_before_the_last_step_is_noted():
    note = "No run was evaluated after its last step, 31: `final` is the score after step 30."
    assert note in study_of(analyse([replace(run, steps=31) for run in runs()], FAST))["notes"]
    assert not [note for note in study_of(analyse(runs(), FAST))["notes"] if "evaluated after" in note]


def test_runs_that_agree_to_the_letter_are_noted():
    same = [tiny(seed, arm) for seed in (0, 1) for arm in ("sdpo", "pgpo", "constant")]
    content = analyse(same, FAST)
    notes = study_of(content)["notes"]
    assert (
        conclude(content)
        == f"{QUESTION}: not resolved, because runs with the same answers have no interval (pgpo minus constant: final +0.000, "
        "best +0.000)."
    )
    assert any(note.startswith("pgpo and constant gave the same answers in every run") for note in notes)
    assert any(note.startswith("Fewer than 5 seeds") for note in notes)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"margin": 0.0}, "`margin` to be above 0"),
        ({"margin": math.nan}, "`margin` to be above 0"),
        ({"collapse": 1.0}, r"`collapse` to lie in \(0, 1\)"),
        ({"decisive": ("constnat",)}, r"`decisive` to be among `controls` \(constant, random"),
        ({"decisive": ()}, "`decisive` to be among"),
        ({"measures": ("last",)}, r"`measures\[0\]` to be one of final, best, area"),
        ({"measures": ()}, "`measures` "),
        ({"score": "exact"}, "`score` to be one of avg, solution-probability"),
        ({"pool": "best"}, "`pool` to be one of learning, all"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Design(**setting)


def test_every_arm_has_a_colour_of_its_own():
    from pgpo_lightning.studies.figures import arm_style

    for names in ([f"arm{i}" for i in range(11)], ["sdpo", *(f"arm{i}" for i in range(10))]):
        assert len({arm_style(name, names, Design())["color"] for name in names}) == 11


def test_the_same_runs_in_other_hours_give_the_same_numbers():
    slow = [replace(run, seconds=run.seconds * 3, cpu_seconds=1.0) for run in reversed(runs())]
    once, again = analyse(runs(), Design()), analyse(slow, Design())
    assert once.pop("cost") != again.pop("cost")
    assert repr(once) == repr(again)  # NaN is not equal to itself
