"""Several conditions: interaction, which of them are pooled, and arms tuned on seeds on which they are not scored."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.study_simulation import several_conditions
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.inference import two_way
from pgpo_lightning.studies.pooling import aligned, interaction, learning, poolable, pooled
from pgpo_lightning.studies.simulation import World, simulated_condition
from pgpo_lightning.studies.tuned import tuned
from tests.support.inference import noise

DESIGN = Design(draws=0)
ARMS = {"sdpo": 0.0, "pgpo": 0.0} | dict.fromkeys(DESIGN.controls, 0.0)
WORLD = World(seeds=6, questions=40)


def group(number, level=0.65, **gains):
    return simulated_condition(ARMS | gains, replace(WORLD, level=level), 0, DESIGN, condition=number)


def test_conditions_in_which_the_baseline_does_not_learn_are_not_pooled():
    groups = [group(0), group(1, level=0.45), group(2)]
    assert [learning(one, DESIGN)["learns"] for one in groups] == [True, False, True]
    assert [one.name for one in poolable(groups, DESIGN)] == ["condition-0", "condition-2"]
    assert [one.name for one in poolable(groups, replace(DESIGN, pool="all"))] == [one.name for one in groups]
    assert poolable(groups, replace(DESIGN, baseline="nobody")) == []
    assert learning(groups[0], replace(DESIGN, baseline="nobody")) == {"study": "condition-0", "learns": False}
    row = learning(groups[1], DESIGN)
    mean = two_way(groups[1].arms["sdpo"].tables["final"] - groups[1].arms["sdpo"].base)
    assert (row["value"], (row["low"], row["high"])) == (mean.value, mean.interval())


def test_the_rule_of_pooling_does_not_look_at_the_arms_that_are_compared():
    changed = [group(0, pgpo=-0.3), group(1, level=0.45, pgpo=0.3), group(2)]
    assert [one.name for one in poolable(changed, DESIGN)] == ["condition-0", "condition-2"]


def test_differences_are_about_the_controls_and_seeds_that_all_conditions_have():
    one, two = group(0), group(1)
    del two.arms["shuffled"]
    del two.arms["replayed"]
    two.arms["constant"].seeds = [0, 1, 2, 3, 4, 9]
    questions = aligned([one, two], DESIGN, "pgpo")
    assert [list(each.controls) for each in questions] == [["constant", "random", "inverse"]] * 2
    assert [each.averages for each in questions] == [("constant", "random")] * 2
    assert {len(each.averaged["final"]) for each in questions} == {5}
    assert questions[0].missing == ("shuffled", "replayed")
    found = pooled([one, two], DESIGN)["arms"][0]
    assert (found["seeds"], found["missing"]) == (5, ["shuffled", "replayed"])
    mean = np.mean([each.averaged["final"] for each in questions], axis=0)
    assert found["averaged"][0]["value"] == pytest.approx(two_way(mean).value)
    del two.arms["constant"], two.arms["random"], two.arms["inverse"]
    assert aligned([one, two], DESIGN, "pgpo") == []


def test_an_interaction_is_the_difference_of_two_differences():
    rows = interaction([group(0, pgpo=0.1), group(1, pgpo=-0.1), group(2)], DESIGN)
    assert [(row["first"], row["second"]) for row in rows] == [
        ("condition-0", "condition-1"),
        ("condition-0", "condition-2"),
        ("condition-1", "condition-2"),
    ]
    assert rows[0]["value"] == pytest.approx(0.2, abs=0.05)
    assert rows[0]["p_holm"] < 0.01
    assert all(row["p_holm"] >= row["p"] for row in rows)
    smallest = min(rows, key=lambda row: row["p"])
    assert smallest["p_holm"] == pytest.approx(3 * smallest["p"])


def test_a_tuned_arm_is_scored_on_the_seeds_that_did_not_choose():
    one, two = group(0), group(1)
    for arm in ARMS:
        # Seeds 0, 2 and 4 say the first condition, the others the second one.
        for condition, scores in ((one, [0.9, 0.1, 0.1, 0.1, 0.1, 0.1]), (two, [0.2] * 6)):
            condition.arms[arm].tables["final"] = np.array(scores)[:, None] * np.ones((1, 40))
    found = tuned([one, two], DESIGN)["arms"][0]
    assert found["chosen"] == {"condition-1": 3, "condition-0": 3}
    assert found["value"] == pytest.approx((3 * 0.2 + 3 * 0.1) / 6)


def test_tuning_needs_conditions_seeds_and_the_same_questions():
    one, two = group(0), group(1)
    content = tuned([one, two], DESIGN)
    assert [row["arm"] for row in content["arms"]] == ["sdpo", "pgpo", *DESIGN.controls]
    assert ("pgpo", "constant") in [(row["arm"], row["against"]) for row in content["comparisons"]]
    assert tuned([one], DESIGN)["arms"] == []
    fewer = simulated_condition(ARMS, replace(WORLD, questions=20), 0, DESIGN)
    assert tuned([one, fewer], DESIGN)["arms"] == []
    two.arms["sdpo"].seeds = [0, 1, 2, 13, 14, 15]
    assert [row["arm"] for row in tuned([one, two], DESIGN)["arms"]] == ["pgpo", *DESIGN.controls]


def test_over_simulated_studies_nothing_is_found_where_nothing_is():
    found = several_conditions((0.0, 0.0, 0.0), World(seeds=5, questions=40, level=0.65), 150)
    assert found["any_yes"] <= 0.025 + noise(0.025, 150)
    assert found["pooled_yes"] <= 0.025 + noise(0.025, 150)
    assert found["interaction"] <= 0.05 + noise(0.05, 150)
    assert found["pooled"] == pytest.approx(0.95, abs=noise(0.95, 150))
    assert abs(found["bias"]) < found["naive_bias"]
