"""Divergences of any two distributions, in float64: non-negative, bounded, symmetric where the definition is."""

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from pgpo_lightning.losses.divergence import (
    Divergence,
    divergence,
    entropy,
    forward_kl,
    generalised_jsd,
    reverse_kl,
    student_top_k,
)

ALPHA = st.floats(0.01, 0.99)
ROUNDING = 1e-12


@st.composite
def distributions(draw, count=2):
    """Log-probabilities over a few tokens, from nearly uniform to nearly certain."""
    size = draw(st.integers(2, 7))
    logits = st.lists(st.floats(-15, 15), min_size=size, max_size=size)
    return tuple(torch.tensor(draw(logits), dtype=torch.float64).log_softmax(-1) for _ in range(count))


@given(pair=distributions(), alpha=st.sampled_from([0.0, 1.0]) | ALPHA)
def test_a_divergence_is_not_negative_and_zero_between_equals(pair, alpha):
    student, teacher = pair
    assert divergence(student, teacher, alpha) >= -ROUNDING
    assert divergence(student, student, alpha).abs() <= ROUNDING
    bound = Divergence(alpha).bound
    assert bound is None or divergence(student, teacher, alpha) <= bound + ROUNDING


@given(pair=distributions(), alpha=ALPHA)
def test_a_divergence_is_positive_between_others(pair, alpha):
    student, teacher = pair
    assume((student.exp() - teacher.exp()).abs().max() > 1e-3)
    assert generalised_jsd(student, teacher, alpha) > 0
    assert forward_kl(student, teacher) > 0
    assert reverse_kl(student, teacher) > 0


@given(pair=distributions(), alpha=ALPHA)
def test_the_generalised_jsd_is_symmetric_under_exchange_with_one_minus_alpha(pair, alpha):
    student, teacher = pair
    there, back = generalised_jsd(student, teacher, alpha), generalised_jsd(teacher, student, 1 - alpha)
    torch.testing.assert_close(there, back, rtol=1e-9, atol=ROUNDING)


@given(pair=distributions(), alpha=ALPHA)
def test_the_generalised_jsd_is_that_of_its_definition(pair, alpha):
    s, t = (log_p.exp() for log_p in pair)
    mixture = (1 - alpha) * s + alpha * t
    expected = (1 - alpha) * (s * (s / mixture).log()).sum() + alpha * (t * (t / mixture).log()).sum()
    torch.testing.assert_close(generalised_jsd(*pair, alpha), expected, rtol=1e-9, atol=1e-13)


@given(pair=distributions())
def test_the_two_kls_are_each_others_exchange(pair):
    student, teacher = pair
    torch.testing.assert_close(forward_kl(student, teacher), reverse_kl(teacher, student), rtol=1e-12, atol=ROUNDING)
    cross = -(teacher.exp() * student).sum()
    torch.testing.assert_close(forward_kl(student, teacher), cross - entropy(teacher), rtol=1e-9, atol=1e-11)


@given(pair=distributions(), alpha=st.sampled_from([0.0, 1.0]) | ALPHA, k=st.integers(1, 7))
def test_a_bucket_for_the_rest_hides_some_divergence_and_adds_none(pair, alpha, k):
    """The inequality of data processing."""
    student, teacher = pair
    reduced = student_top_k(student, teacher, k, add_tail=True)
    for log_p in reduced:
        assert math.isclose(log_p.exp().sum(), 1, rel_tol=1e-12)
    assert -ROUNDING <= divergence(*reduced, alpha) <= divergence(student, teacher, alpha) + ROUNDING


@given(pair=distributions(), alpha=st.sampled_from([0.0, 1.0]) | ALPHA, data=st.data())
def test_the_order_of_the_tokens_does_not_matter(pair, alpha, data):
    student, teacher = pair
    order = torch.tensor(data.draw(st.permutations(range(len(student)))))
    torch.testing.assert_close(
        divergence(student[order], teacher[order], alpha), divergence(student, teacher, alpha), rtol=1e-9, atol=ROUNDING
    )
