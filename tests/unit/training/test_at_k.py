"""avg@k, pass@k and maj@k against their definitions."""

import itertools
import math
import random

import pytest
import torch

from pgpo_lightning.training.at_k import AvgAtK, CutOffFraction, MajorityAtK, MeanLength, PassAtK, PerQuestionMean
from tests.support.metrics import updated


@pytest.mark.parametrize("metric", [PerQuestionMean, AvgAtK, MeanLength, CutOffFraction])
def test_mean_over_questions_of_means_over_samples(metric):
    # Question 9 has three samples and question 2 one: (1/3 + 5 + 2) / 3, while the mean over samples would be 2.
    metric = metric()
    metric.update(torch.tensor([9, 2, 9]), torch.tensor([1.0, 5.0, 0.0]))
    metric.update(torch.tensor([9, 40, 40]), torch.tensor([0, 1, 3]))
    assert metric.compute().item() == pytest.approx((1 / 3 + 5 + 2) / 3, abs=1e-6)
    assert metric.compute().dtype == torch.float32


def test_repeated_questions_count_once():
    once = updated(AvgAtK(), [0, 0, 1, 1], [1.0, 0.0, 0.0, 0.0])
    twice = updated(AvgAtK(), [0, 0, 1, 1, 0, 0], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    assert once.compute() == twice.compute() == 0.25


def test_reset():
    metric = updated(AvgAtK(), [0], [1.0])
    metric.compute()
    metric.reset()
    assert updated(metric, [0], [0.0]).compute() == 0.0


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("metric", [AvgAtK(), PassAtK(2), MajorityAtK()])
def test_no_data_is_nan(metric):
    assert math.isnan(metric.compute())


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"same length, but got shapes \(2,\) and \(3,\)"):
        updated(AvgAtK(), [0, 1], [0.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"but got shapes \(1, 2\) and \(1, 2\)"):
        updated(AvgAtK(), [[0, 1]], [[0.0, 1.0]])
    with pytest.raises(ValueError, match=r"one answer per sample \(2\), but got 1"):
        updated(MajorityAtK(), [0, 1], [0.0, 1.0], ["a"])


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n):
    for k, c in itertools.product(range(1, n + 1), range(n + 1)):
        rewards = [1.0] * c + [0.0] * (n - c)
        subsets = list(itertools.combinations(rewards, k))
        truth = sum(max(subset) for subset in subsets) / len(subsets)
        assert updated(PassAtK(k), [5] * n, rewards).compute().item() == pytest.approx(truth, abs=1e-7)


def test_pass_at_k_of_questions_with_different_numbers_of_samples():
    question, value = [3, 1, 3, 1, 1, 3, 1], [1.0, 0.0, 0.0, 0.7, 0.0, 0.0, 0.7]
    # Question 3: 1 of 3 gives 2/3. Question 1: 2 of 4 gives 1 - 1/6.
    assert updated(PassAtK(2), question, value).compute().item() == pytest.approx((2 / 3 + 5 / 6) / 2, abs=1e-7)
    assert updated(PassAtK(2, threshold=0.7), question, value).compute().item() == pytest.approx(0.75, abs=1e-7)
    assert updated(PassAtK(2, threshold=0.8), question, value).compute().item() == pytest.approx(1 / 3, abs=1e-7)


def test_pass_at_k_is_stable():
    # The binomials have more than 600 digits; the truth is a product of 500 ratios.
    n, c, k = 4000, 3, 500
    truth = 1 - math.prod((n - c - i) / (n - i) for i in range(k))
    assert updated(PassAtK(k), [0] * n, [1.0] * c + [0.0] * (n - c)).compute().item() == pytest.approx(truth, rel=1e-6)


def test_pass_at_1_is_avg():
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(7, (200,), generator=generator)
    value = torch.randint(2, (200,), generator=generator).float()
    one, avg = PassAtK(1), AvgAtK()
    one.update(question, value)
    avg.update(question, value)
    torch.testing.assert_close(one.compute(), avg.compute())


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="at least k=3 samples of question 8, but got 2"):
        updated(PassAtK(3), [1, 1, 1, 8, 8], [1.0] * 5).compute()
    with pytest.raises(ValueError, match="`k` to be at least 1, but got 0"):
        PassAtK(0)


@pytest.mark.parametrize(
    ("answers", "rewards", "truth"),
    [
        (["7", "8", "8"], [1.0, 0.0, 0.0], 0.0),
        (["7", "7", "8"], [1.0, 1.0, 0.0], 1.0),
        (["7", "8", "8", "7"], [0.3, 0.8, 0.8, 0.3], 0.3),  # a tie: the first one given
        (["8", "7", "7", "8"], [0.8, 0.3, 0.3, 0.8], 0.8),
        ([None, None, "8"], [0.0, 0.0, 1.0], 1.0),  # no answer is no vote
        ([None, None], [1.0, 1.0], 0.0),
        (["", None, None], [0.6, 0.0, 0.0], 0.6),  # an empty answer is one
    ],
)
def test_majority(answers, rewards, truth):
    assert updated(MajorityAtK(), [4] * len(answers), rewards, answers).compute().item() == pytest.approx(truth)


def test_majority_against_counting():
    rng = random.Random(0)
    rows = [(rng.randrange(5), rng.choice(["a", "b", "c", None])) for _ in range(60)]
    worth = {(question, answer): rng.random() for question, answer in rows}
    metric = MajorityAtK()
    for start in range(0, 60, 7):
        part = rows[start : start + 7]
        updated(metric, [q for q, _ in part], [worth[row] for row in part], [a for _, a in part])
    truth = 0.0
    for question in range(5):
        votes = [answer for q, answer in rows if q == question and answer is not None]
        truth += worth[question, max(votes, key=lambda answer: (votes.count(answer), -votes.index(answer)))] / 5
    assert metric.compute().item() == pytest.approx(truth, abs=1e-6)
