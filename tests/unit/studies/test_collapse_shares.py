"""Collapsed runs apart from the scores: shares, exact tests, and the runs that live."""

import numpy as np
import pytest
from scipy.stats import barnard_exact, fisher_exact

from pgpo_lightning.studies.analysis import analyse
from pgpo_lightning.studies.collapse_shares import collapsed_share, compare_collapse, mcnemar
from pgpo_lightning.studies.comparisons import Arm, Condition
from pgpo_lightning.studies.design import Design
from pgpo_lightning.studies.report_text import markdown
from tests.support.studies import runs

DESIGN = Design(draws=0)


def arm(name, steps, scores, seeds=None):
    table = np.array(scores)[:, None] * np.ones((1, 4))
    return Arm(name, seeds or list(range(len(steps))), table, dict.fromkeys(("final", "best", "area"), table), steps)


def test_the_runs_that_live_have_a_mean_of_their_own():
    found = collapsed_share(arm("sdpo", [None, 15, None, 30], [0.6, 0.1, 0.5, 0.0]), "final")
    assert (found["count"], found["share"], found["step"]) == (2, 0.5, 22.5)
    assert (found["low"], found["high"]) == pytest.approx((0.0676, 0.9324), abs=1e-4)
    assert (found["living"]["value"], found["living"]["seeds"]) == (pytest.approx(0.55), 2)
    assert found["steps"] == {"0": None, "1": 15, "2": None, "3": 30}
    nobody = collapsed_share(arm("sdpo", [1, 1], [0.0, 0.0]), "final")["living"]
    assert nobody["seeds"] == 0
    assert np.isnan(nobody["value"])


def test_shares_of_the_same_seeds_are_compared_by_mcnemar():
    one = arm("pgpo", [1, 1, 1, 1, 1, None], [0.0, 0.0, 0.0, 0.0, 0.0, 0.7])
    two = arm("sdpo", [None, None, None, None, 1, None], [0.5, 0.5, 0.5, 0.5, 0.0, 0.6])
    (row,) = compare_collapse(Condition("c", {"sdpo": two, "pgpo": one}), DESIGN)
    assert (row["test"], row["collapsed"], row["runs"]) == ("McNemar", [5, 1], [6, 6])
    assert row["p"] == mcnemar(4, 0) == 0.125
    assert (row["living"]["value"], row["living"]["seeds"]) == (pytest.approx(0.1), 1)


def test_shares_of_other_seeds_are_compared_by_fisher():
    one = arm("pgpo", [1, 1, 1, 1, 1], [0.0] * 5)
    two = arm("sdpo", [None] * 6, [0.5] * 6, seeds=[7, 8, 9, 10, 11, 12])
    (row,) = compare_collapse(Condition("c", {"sdpo": two, "pgpo": one}), DESIGN)
    assert (row["test"], row["living"]["seeds"]) == ("Fisher", 0)
    assert row["p"] == pytest.approx(fisher_exact([[5, 0], [0, 6]]).pvalue)
    assert row["p"] > barnard_exact([[5, 0], [0, 6]]).pvalue > 0


def test_mcnemar_is_the_sign_test_of_the_pairs_that_differ():
    assert mcnemar(5, 1) == pytest.approx(2 * (6 + 1) / 2**6)
    assert mcnemar(1, 5) == mcnemar(5, 1)
    assert mcnemar(3, 3) == 1.0


def test_a_report_has_the_tables_only_where_a_run_collapsed():
    content = analyse(runs(), DESIGN)
    assert "No run collapsed." in markdown(content, {})
    broken = runs()
    broken[0].questions["30"] = [0.0] * 20
    text = markdown(analyse(broken, DESIGN), {})
    assert "| arm | collapsed | at step | mean of all runs | mean of the runs that live |" in text
    assert "| sdpo | 1/4 [0.01, 0.81] | 30 | " in text
