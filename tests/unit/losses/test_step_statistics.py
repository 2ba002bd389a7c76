"""The information estimators on cases whose answer is known."""

import math

import pytest
import torch

from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.information import information
from pgpo_lightning.losses.step_statistics import StepStatistics


def rows(student, teacher, length, has_teacher=None, kl=None, log_ratio=None, question=None):
    n = len(student)
    zeros = torch.zeros(n)
    return StepStatistics(
        entropy_student=torch.tensor(student),
        entropy_teacher=torch.tensor(teacher),
        kl=zeros if kl is None else torch.tensor(kl),
        log_ratio=zeros if log_ratio is None else torch.tensor(log_ratio),
        sampler_log_ratio=zeros,
        sampler_gap=zeros,
        loss=zeros,
        divergence=zeros,
        weight=zeros + 1,
        length=torch.tensor(length),
        reward=zeros,
        has_teacher=torch.ones(n) if has_teacher is None else torch.tensor(has_teacher),
        question=torch.arange(n).float() if question is None else question.float(),
    )


def test_the_three_aggregations():
    r = rows([1.0, 2.0], [0.5, 0.5], [10.0, 2.0])
    assert information(r, aggregation="sequence-mean").value == pytest.approx((0.5 + 1.5) / 2)
    assert information(r, aggregation="token-mean").value == pytest.approx((5 + 3) / 12)
    assert information(r, aggregation="sequence-sum").value == pytest.approx((5 + 3) / 2)


def test_the_three_estimators():
    r = rows([1.0], [0.4], [3.0], kl=[0.7], log_ratio=[-0.2])
    assert information(r, "entropy-difference").value == pytest.approx(0.6)
    assert information(r, "kl").value == pytest.approx(0.7)
    assert information(r, "log-ratio").value == pytest.approx(-0.2)


def test_rows_without_a_teacher_do_not_count_and_none_gives_zero():
    r = rows([1.0, 9.0], [0.5, math.nan], [4.0, 4.0], has_teacher=[1.0, 0.0])
    assert information(r).value == pytest.approx(0.5)
    none = rows([9.0], [math.nan], [4.0], has_teacher=[0.0])
    assert information(none).value == 0.0
    assert math.isnan(information(none).standard_error)


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "sequence-sum"])
def test_the_standard_error_is_the_spread_of_repeated_batches(aggregation):
    """Draw many batches: the reported error must be the standard deviation of the estimates."""
    generator = torch.Generator().manual_seed(0)
    estimates, errors = [], []
    for _ in range(1500):
        length = torch.randint(5, 40, (64,), generator=generator).float()
        gap = 0.1 + 0.3 * torch.randn(64, generator=generator) + 0.005 * length
        r = rows([0.0] * 64, [0.0] * 64, length.tolist())
        r.entropy_student = gap
        value, error = information(r, aggregation=aggregation)
        estimates.append(value)
        errors.append(error)
    assert torch.tensor(errors).mean().item() == pytest.approx(torch.tensor(estimates).std().item(), rel=0.06)


@pytest.mark.parametrize("aggregation", ["sequence-mean", "token-mean", "sequence-sum"])
def test_the_standard_error_knows_that_siblings_are_alike(aggregation):
    """16 questions, up to 8 siblings each, whose values share most of their spread."""
    generator = torch.Generator().manual_seed(0)
    question = torch.arange(16).repeat_interleave(8)[3:]
    estimates, errors = [], []
    for _ in range(1500):
        length = torch.randint(5, 40, (125,), generator=generator).float()
        shared = 0.3 * torch.randn(16, generator=generator)
        r = rows([0.0] * 125, [0.0] * 125, length.tolist(), question=question)
        r.entropy_student = 0.1 + shared[question] + 0.2 * torch.randn(125, generator=generator)
        value, error = information(r, aggregation=aggregation)
        estimates.append(value)
        errors.append(error**2)
    assert torch.tensor(errors).mean().sqrt().item() == pytest.approx(torch.tensor(estimates).std().item(), rel=0.06)


def test_one_question_has_no_standard_error():
    assert math.isnan(information(rows([1.0, 2.0], [0.5, 0.5], [4.0, 4.0], question=torch.zeros(2))).standard_error)


def test_a_mean_over_micro_batches_is_the_true_mean():
    """Not a mean of means: 1 row in one micro-batch, 3 in the other."""
    a, b = rows([4.0], [0.0], [2.0]), rows([0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0])
    assert information(StepStatistics.concatenate([a, b])).value == pytest.approx(1.0)
    assert information(StepStatistics.from_table(StepStatistics.concatenate([a, b]).table())).value == pytest.approx(
        1.0
    )


def test_mutual_information_of_a_known_case():
    """If the student is the teacher's marginal over two equally likely feedbacks, E[KL] = E[H_S - H_T] = I(Y; F)."""
    teacher = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    student = teacher.mean(0)
    h = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    truth = (h(student) - h(teacher).mean()).item()
    r = rows([h(student).item()] * 2, h(teacher).tolist(), [1.0, 1.0])
    r.kl = (teacher * (teacher / student).log()).sum(-1)
    assert information(r, "entropy-difference").value == pytest.approx(truth, abs=1e-7)
    assert information(r, "kl").value == pytest.approx(truth, abs=1e-7)


def test_from_tokens_averages_each_sequence():
    values = torch.arange(5.0)
    tokens = TokenStatistics(values, values, values + 1, values, values * torch.nan, values, values)
    r = StepStatistics.from_tokens(
        tokens,
        values,
        values - 0.5,
        torch.ones(5),
        torch.tensor([2, 3]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([7, 4]),
        has_teacher=True,  # though its entropy is no number, as in a step whose loss is not finite
    )
    assert r.entropy_student.tolist() == [0.5, 3.0]
    assert r.log_ratio.tolist() == [1.0, 1.0]
    assert r.sampler_log_ratio.tolist() == [0.5, 0.5]
    assert r.sampler_gap.tolist() == [0.5, 0.5]
    assert r.length.tolist() == [2.0, 3.0]
    assert r.has_teacher.tolist() == [1.0, 1.0]
    assert r.question.tolist() == [7.0, 4.0]
    assert r.divergence.tolist() == [0.5, 3.0]
