"""The comparison of methods and its report."""

import io
import math

import pytest

from pgpo_lightning.discovery.analysis import analyse, log_rank
from pgpo_lightning.discovery.figure import draw_discovery
from pgpo_lightning.discovery.outcomes import AXES, Outcome
from pgpo_lightning.discovery.pass_rates import PassRate, qualified
from pgpo_lightning.discovery.report_text import markdown
from pgpo_lightning.discovery.spec import Prediction, Questions


def runs(method, times, budget=10):
    """One question per row of times, one seed per column; null has no success."""
    return [
        Outcome(method, q, s, t is not None, dict.fromkeys(AXES, float(t or budget)), True)
        for q, row in enumerate(times)
        for s, t in enumerate(row)
    ]


FAST, SLOW = runs("fast", [[1, 2], [2, 3], [1, None]]), runs("base", [[5, 8], [9, None], [None, None]])


def test_the_log_rank_test_by_hand():
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    first, second = runs("a", [[1, 2]]), runs("b", [[3, None]])
    # At 1: 2 of 4 at risk, expected 1/2, variance 1/4. At 2: 1 of 3, 1/3, 2/9. At 3: none of them. Observed 2.
    statistic = (2 - 5 / 6) ** 2 / (1 / 4 + 2 / 9)
    assert log_rank(first, second, "generations") == pytest.approx(math.erfc(math.sqrt(statistic / 2)))
    # The same numbers in a second question double sum and variance; an unsolved question says nothing.
    twice = (4 - 10 / 6) ** 2 / (2 * (1 / 4 + 2 / 9))
    both = log_rank(
        runs("a", [[1, 2]] * 2 + [[None, None]]), runs("b", [[3, None]] * 2 + [[None, None]]), "generations"
    )
    assert both == pytest.approx(math.erfc(math.sqrt(twice / 2)))
    assert math.isnan(log_rank(runs("a", [[None]]), runs("b", [[None]]), "tokens"))
    assert math.isnan(log_rank(runs("a", [[4]]), runs("b", [[4]]), "tokens")), "both succeed at the same time"


def test_the_content_by_hand():
    pytest.importorskip("statsmodels", reason="statsmodels is not installed")
    expected = [Prediction("fast", "base", (0.0, 0.3), "hope"), Prediction("fast", "base", (0.5, 0.9), "hope", at=3)]
    content = analyse([*SLOW, *FAST], "base", 10, expected, draws=200)
    base, fast = content["methods"]
    assert (fast["found"], fast["runs"], base["found"]) == (5, 6, 3)
    assert fast["discovery_at"]["10"]["value"] == pytest.approx(5 / 6)
    assert fast["generations"]["mean"]["value"] == pytest.approx((1 + 2 + 2 + 3 + 1 + 10) / 6)
    (row,) = content["comparisons"]
    assert row["generations"]["difference"]["value"] == pytest.approx(2 / 6)
    assert row["generations"]["ratio"]["value"] == pytest.approx(19 / 52)
    assert row["generations"]["ratio"]["high"] < 1
    assert row["generations"]["p"] == row["generations"]["p_holm"] < 0.05
    seen = [(each["at"], round(each["seen"]["value"], 3), each["inside"]) for each in content["predictions"]]
    assert seen == [(10, 0.333, False), (3, 0.833, True)]
    text = markdown(content, [PassRate(0, "", 1, 100)], "x.png")
    assert "| 0 | 0.0100 (1/100) | 2/2 | 2/2 |" in text
    assert "| fast | +0.33 [" in text
    picture = io.BytesIO()
    draw_discovery(content, picture)
    assert picture.getvalue().startswith(b"\x89PNG")


def test_one_method_alone_has_no_comparisons():
    content = analyse(SLOW, "best-of-k", 10, [Prediction("fast", "base", (0, 1), "r")], draws=20)
    assert content["comparisons"] == []
    assert "not seen" in markdown(content, [], "x.png")
    with pytest.raises(ValueError, match="runs with at least one attempt"):
        analyse([], "base", 10)


def test_questions_qualify_by_their_rate():
    rates = [PassRate(i, "", successes, 100) for i, successes in enumerate([0, 2, 50, 1, 3])]
    assert [row.index for row in qualified(rates, Questions(below=0.03, above=0.0))] == [1, 3]
    assert [row.index for row in qualified(rates, Questions(below=0.03))] == [0, 1, 3]
    assert [row.index for row in qualified(rates, Questions(below=0.04, above=0.0, count=2))] == [1, 3]
    with pytest.raises(ValueError, match=r"at least 3 questions .* but got 2 among 5"):
        qualified(rates, Questions(below=0.03, above=0.0, count=3))
