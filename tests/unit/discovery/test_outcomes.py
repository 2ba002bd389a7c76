"""What a run has spent when it finds its first success."""

from pgpo_lightning.discovery.outcomes import outcome
from tests.support.attempts import attempt


def rows(success=None, count=6, size=2):
    return [attempt(i + 1, i // size, success=i + 1 == success) for i in range(count)]


def test_the_batch_of_the_success_is_paid_and_its_update_is_not():
    found = outcome("sdpo", 3, 1, rows(success=3), budget=6)
    assert (found.found, found.complete, found.question, found.seed) == (True, True, 3, 1)
    # Four attempts of 5 + 10 tokens and half a second, one update of 2 x 30 tokens and 2 x .25 s.
    assert found.spent == {"generations": 3.0, "tokens": 4 * 15 + 60.0, "seconds": 2.0 + 0.5}


def test_without_a_success_everything_is_paid_and_the_run_is_censored():
    whole = outcome("sdpo", 0, 0, rows(), budget=6)
    assert (whole.found, whole.complete) == (False, True)
    assert whole.spent == {"generations": 6.0, "tokens": 6 * (15 + 30.0), "seconds": 6 * 0.75}
    assert not outcome("sdpo", 0, 0, rows(count=4), budget=6).complete
    assert not outcome("sdpo", 0, 0, [], budget=6).complete


def test_a_success_beyond_the_budget_does_not_count():
    late = outcome("sdpo", 0, 0, rows(success=5), budget=4)
    assert (late.found, late.complete, late.spent["generations"]) == (False, True, 4.0)


def test_a_run_that_goes_on_after_its_success_is_not_complete():
    assert not outcome("sdpo", 0, 0, rows(success=1, count=4), budget=6, stop=False).complete
