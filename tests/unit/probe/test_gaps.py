"""Gaps of the self-teacher, from tables of rewards made by hand."""

import numpy as np
import pytest

from pgpo_lightning.probe.gaps import gap, kept, question_draws, ratio


def tables(questions=60, samples=8, seed=0):
    """Scores of student, plain teacher and a teacher that 30 % of the rollouts do not have."""
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(0, 1, (questions, 1))
    draw = lambda p: (rng.random((questions, samples)) < p).astype(float)  # noqa: E731
    student, none, teacher = draw(difficulty), draw(difficulty), draw(difficulty**0.3)
    return student, none, np.where(rng.random(teacher.shape) < 0.3, np.nan, teacher)


def test_gaps_are_sums_over_rollouts():
    student, none, teacher = tables()
    made = gap(student, none, teacher, 0.5, question_draws(len(student)))
    count = net = net_failed = recovered = again = failed = 0
    for s, n, t in zip(student.flat, none.flat, teacher.flat, strict=True):
        shown = n if np.isnan(t) else t
        count += 1
        net += shown - n
        if s == 0:
            failed += 1
            net_failed += shown - n
            recovered += shown
            again += n
    assert made.net.value == pytest.approx(net / count)
    assert made.net_failed.value == pytest.approx(net_failed / count)
    assert made.recovery.value == pytest.approx(recovered / failed)
    assert made.recovery_net.value == pytest.approx((recovered - again) / failed)
    assert made.coverage == pytest.approx(1 - np.isnan(teacher).mean())
    # g = (1 - acc_S) * (rec - rec_none) where successes keep the prompt, and g(c) = net + g(none)
    assert made.net_failed.value == pytest.approx((1 - student.mean()) * made.recovery_net.value)
    resampled = gap(student, none, none, 0.5, question_draws(len(student)))
    assert resampled.net.value == resampled.net.error == 0
    assert made.gap.value == pytest.approx(made.net.value + resampled.gap.value)


def test_the_error_is_that_of_paired_questions():
    student, none, teacher = tables(questions=300)
    made = gap(student, none, teacher, 0.5, question_draws(len(student)))
    assert made.net.error == pytest.approx(made.by_question.std() / 300**0.5, rel=0.08)
    unpaired = (np.where(np.isnan(teacher), none, teacher).mean(axis=1).var() + none.mean(axis=1).var()) / 300
    assert made.net.error < 0.7 * unpaired**0.5


def test_a_context_that_nobody_gets_brings_exactly_nothing():
    student, none, teacher = tables()
    made = gap(student, none, np.full_like(teacher, np.nan), 0.5, question_draws(len(student)))
    assert (made.coverage, made.net.value, made.net.error, made.recovery_net.value) == (0, 0, 0, 0)


def test_without_failures_there_is_no_recovery():
    ones = np.ones((4, 2))
    made = gap(ones, ones, ones, 0.5, question_draws(4))
    assert np.isnan([made.recovery.value, made.coverage_failed]).all()
    assert made.net_failed.value == 0
    assert np.isnan(ratio(np.ones(3), np.zeros(3), question_draws(3)).value)


def test_tables_have_one_shape_and_the_control_covers_all():
    student, none, teacher = tables()
    with pytest.raises(ValueError, match="Expected tables of one shape"):
        gap(student, none[:-1], teacher, 0.5, question_draws(60))
    with pytest.raises(ValueError, match="Expected `none` to cover every rollout"):
        gap(student, teacher, teacher, 0.5, question_draws(60))


def test_what_a_control_keeps():
    whole = np.array([0.5, 0.25, 0.0, 0.25])
    assert kept(whole / 2, whole, question_draws(4)) == pytest.approx((0.5, 0.5, 0.5))
    assert np.isnan(kept(whole, 0 * whole, question_draws(4))[0])
