"""Metrics over several samples per question do not depend on the order of the samples, or on how updates share them out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pgpo_lightning.training.at_k import AvgAtK, CutOffFraction, MajorityAtK, MeanLength, PassAtK

SAMPLES = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from(["a", "b", "c", None])),
    min_size=1,
    max_size=25,
)
METRICS = {"avg": AvgAtK, "length": MeanLength, "cut off": CutOffFraction, "pass": lambda: PassAtK(k=1)}


def computed(metric, *updates):
    """Value and standard error after updates with lists of (question, value, answer)."""
    for samples in updates:
        question, value, answers = zip(*samples, strict=True)
        more = (list(answers),) if isinstance(metric, MajorityAtK) else ()
        metric.update(torch.tensor(question), torch.tensor(value), *more)
    return metric.compute().item(), metric.standard_error().item()


@pytest.mark.parametrize("name", METRICS)
@given(samples=SAMPLES, data=st.data())
def test_neither_order_nor_updates_matter(name, samples, data):
    order = data.draw(st.permutations(samples))
    cut = data.draw(st.integers(0, len(samples)))
    parts = [part for part in (order[:cut], order[cut:]) if part]
    one, other = computed(METRICS[name](), samples), computed(METRICS[name](), *parts)
    assert other == pytest.approx(one, rel=1e-6, abs=1e-7, nan_ok=True)


@given(samples=SAMPLES, data=st.data())
def test_the_order_of_the_questions_does_not_matter_to_the_majority(samples, data):
    """Among equally frequent answers to a question the first counts: within a question the order is kept."""
    rank = data.draw(st.permutations(range(5)))
    order = sorted(samples, key=lambda sample: rank[sample[0]])
    assert computed(MajorityAtK(), order) == pytest.approx(
        computed(MajorityAtK(), samples), rel=1e-6, abs=1e-7, nan_ok=True
    )


@given(samples=SAMPLES)
def test_scores_are_between_the_worst_and_the_best_sample(samples):
    values = [value for _, value, _ in samples]
    assert min(values) <= computed(AvgAtK(), samples)[0] <= max(values)
    majority = computed(MajorityAtK(), samples)[0]
    assert 0 <= majority <= max(values)


@given(questions=st.lists(st.lists(st.booleans(), min_size=5, max_size=8), min_size=1, max_size=4), k=st.integers(1, 4))
def test_another_attempt_never_lowers_the_chance_of_a_success(questions, k):
    samples = [(i, float(success), None) for i, successes in enumerate(questions) for success in successes]
    fewer, more = (computed(PassAtK(k=attempts), samples)[0] for attempts in (k, k + 1))
    assert fewer <= more + 1e-7
    average = sum(sum(successes) / len(successes) for successes in questions) / len(questions)
    assert computed(PassAtK(k=1), samples)[0] == pytest.approx(average, rel=1e-6)
