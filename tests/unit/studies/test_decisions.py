"""The answer of an information arm: every control and measure for a yes, and what tells the other words apart."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.study_simulation import CASES, DESIGN, one_condition
from pgpo_lightning.studies.analysis import analyse
from pgpo_lightning.studies.comparisons import conditions
from pgpo_lightning.studies.decisions import ONE_SIDED, Question, decide, decide_arm, question
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.sequential import SequentialPlan
from pgpo_lightning.studies.simulation import World, simulated_condition
from tests.support.inference import noise
from tests.support.studies import runs, tiny

CONTROLS = ("constant", "random", "shuffled", "replayed", "inverse")


def table(value, spread=0.001, seeds=6):
    return value + spread * np.array([[-1.0], [0.0], [1.0]] * (seeds // 3))


def asked(values=None, averaged=0.1, spread=0.001, missing=(), seeds=6, mean_of_best=None, **best):
    """A question whose differences to the controls are these; `best` and `mean_of_best` override those of the best score."""
    values = dict.fromkeys(CONTROLS, 0.1) | (values or {})
    controls = {
        name: {"final": table(value, spread, seeds), "best": table(best.get(name, value), spread, seeds)}
        for name, value in values.items()
        if name not in missing
    }
    mean = {
        "final": table(averaged, spread, seeds),
        "best": table(averaged if mean_of_best is None else mean_of_best, spread, seeds),
    }
    return Question("pgpo", controls, mean, CONTROLS[:4], tuple(missing))


def answer(*args, **kwargs):
    return decide_arm(asked(*args, **kwargs), Design())["answer"]


def test_yes_needs_every_control_on_every_measure():
    assert answer() == "yes"
    for control in CONTROLS:
        assert answer({control: 0.0}) == "not resolved"
        assert answer(**{control: 0.0}) == "not resolved"  # on the best score only
        assert answer(missing=[control]) == "not resolved"
    assert answer(spread=0.5) == "not resolved"


def test_each_comparison_has_the_full_level():
    """Intersection-union: ten comparisons with p just below 0.025 are a yes, without a correction for their number."""
    spread = 0.1 / 1.0
    found = decide_arm(asked(spread=spread), Design())
    assert 0.0025 < found["p"] < ONE_SIDED
    assert found["answer"] == "yes"
    assert decide_arm(asked(spread=spread), Design(), family=10)["answer"] == "not resolved"


def test_no_and_equivalent_are_about_the_mean_of_the_exchangeable_controls():
    assert answer({"constant": 0.0}, averaged=0.0) == "equivalent"
    assert answer({"constant": -0.1}, averaged=-0.1) == "no"
    assert answer({"constant": 0.0}, mean_of_best=-0.1) == "no"  # a gain of the best score is excluded
    assert answer({"constant": 0.0}, averaged=0.03) == "not resolved"
    assert answer({"constant": 0.0}, averaged=0.0, spread=0.03) == "not resolved"
    assert answer(missing=["inverse"], averaged=-0.1) == "no"  # no needs no control but those of the mean


def test_the_level_of_no_is_divided_by_the_measures():
    found = decide_arm(asked({"constant": 0.0}, averaged=-0.02, spread=0.042), Design())
    assert ONE_SIDED / 2 < found["averaged"][0]["p_no"] < ONE_SIDED
    assert found["answer"] == "not resolved"
    final = Design(measures=("final",))
    only = Question("pgpo", {"constant": {"final": table(0.0)}}, {"final": table(-0.02, 0.042)}, ("constant",))
    assert decide_arm(only, final)["answer"] == "no"


def test_between_looks_there_is_no_answer_and_at_a_look_its_level_holds():
    plan = SequentialPlan((6, 12), "pocock")
    found = decide_arm(asked(), Design(), plan)
    assert (found["answer"], found["level"]) == ("yes", plan.level(6, ONE_SIDED))
    between = decide_arm(asked(seeds=9), Design(), plan)
    assert (between["answer"], between["level"]) == ("not resolved", 0.0)
    assert all(np.isnan(row["low"]) for row in between["comparisons"])
    assert decide_arm(asked(), Design(), plan, family=3)["level"] == plan.level(6, ONE_SIDED / 3)


def test_a_family_is_yes_if_any_arm_is_and_no_only_if_all_are():
    yes, no, same = asked(), asked({"constant": -0.1}, averaged=-0.1), asked({"constant": 0.0}, averaged=0.0)
    unclear = asked(spread=0.5)
    assert decide([yes, no, unclear], DESIGN)["answer"] == "yes"
    assert decide([no, unclear], DESIGN)["answer"] == "not resolved"
    assert decide([no, same], DESIGN)["answer"] == "no"
    assert decide([same, same], DESIGN)["answer"] == "equivalent"
    assert decide([], DESIGN)["answer"] is None
    assert [arm["level"] for arm in decide([no, same], DESIGN)["arms"]] == [ONE_SIDED / 2] * 2


def test_the_mean_of_the_controls_is_narrower_than_one_control():
    world = World(seeds=8, questions=30)
    condition = simulated_condition({"pgpo": 0.0} | dict.fromkeys(CONTROLS, 0.0), world, 0, DESIGN)
    found = decide_arm(question(condition, DESIGN, "pgpo"), DESIGN)
    widths = [row["high"] - row["low"] for row in found["comparisons"] if row["measure"] == "final"]
    assert found["averaged"][0]["high"] - found["averaged"][0]["low"] < np.mean(widths)
    assert found["averages"] == list(CONTROLS[:4])
    values = [row["value"] for row in found["comparisons"] if row["measure"] == "final"]
    assert found["averaged"][0]["value"] == pytest.approx(np.mean(values[:4]))


def test_conditions_share_the_error_rate():
    arms = {"sdpo": 0.0, "pgpo-1": 0.0, "constant-1": 0.0}
    content = analyse(runs(1, "one", arms) + runs(2, "two", arms), Design(draws=0))
    assert [study["answers"]["arms"][0]["level"] for study in content["studies"]] == [ONE_SIDED / 2] * 2
    assert all(arm["level"] == ONE_SIDED for arm in content["pooled"]["arms"])


def test_the_score_may_be_the_probability_of_the_solution():
    exact = {"0": [0.5, 0.5], "30": [0.75, 0.25]}
    run = tiny(scores=((0.5, 0.5), (0.5, 1.0), (0.0, 0.25)))
    run.solution_probabilities = exact
    condition = conditions([run], Design(score="solution-probability"))[0]
    assert condition.steps == [0, 30]
    assert condition.arms["sdpo"].tables["final"].tolist() == [[0.75, 0.25]]
    assert condition.arms["sdpo"].tables["area"].tolist() == [[0.625, 0.375]]
    # A collapse is defined on avg@k, whichever score decides.
    assert condition.arms["sdpo"].collapsed == [30]
    message = "to have an evaluation of the solution-probability, but got none in s/pgpo/1"
    with pytest.raises(ValueError, match=message):
        conditions([run, tiny(1, "pgpo")], Design(score="solution-probability"))


def test_without_a_difference_a_yes_is_rarer_than_its_level_and_intervals_cover():
    found = one_condition(CASES[0], World(seeds=5, questions=40), 200, draws=50)
    assert found["covered"] == pytest.approx(0.95, abs=noise(0.95, 200))
    assert found["averaged"] == pytest.approx(0.95, abs=noise(0.95, 200))
    assert found["yes"] <= 0.025
    assert found["false"] <= 0.025 + noise(0.025, 200)
    assert found["narrower"] < 0.9


def test_rare_collapses_of_one_side_are_not_covered_but_runs_that_live_are():
    """What the report says of its own intervals: with a collapse in twenty runs, few seeds often show none."""
    collapse = replace(CASES[4], collapse={"pgpo": 0.05})
    found = one_condition(collapse, World(seeds=5, questions=40), 200, draws=50)
    assert found["covered"] < 0.9
    assert found["living"] == pytest.approx(0.95, abs=noise(0.95, 200))
    assert found["shares"] < 0.05
