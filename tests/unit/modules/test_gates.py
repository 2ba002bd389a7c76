"""HAPO's confidence, injection and gates against figures worked out by hand."""

import math
import random

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.policy_gradient import (
    confidence,
    confidence_below,
    group_advantages,
    replaced_index,
    shaped_probability,
)
from pgpo_lightning.modules import HAPO
from pgpo_lightning.objectives.demonstrations import ColumnDemonstrations, SuccessBuffer
from pgpo_lightning.objectives.gates import (
    ConfidenceGate,
    ConstantThreshold,
    Group,
    MatchedRandomGate,
    ProgressThreshold,
    RandomGate,
    SigmoidThreshold,
    StepThreshold,
)
from pgpo_lightning.training.mini_batches import TokenInputs
from tests.support.hapo import HAPO_LIMITS, record
from tests.support.helpers import TOKENIZER, build, half_right, tiny_model

N = 8


def binomial(n, k, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def opens(gate, successes, size=N, step=0):
    return gate.decide([Group(0, successes, size)], step, random.Random(0))[0].open


def test_confidence_is_the_mean_of_the_posterior():
    expected = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert [confidence(s, N - s) for s in range(N + 1)] == pytest.approx(expected, abs=1e-15)


def test_the_gate_is_strict_whatever_binary_fractions_say():
    assert [confidence_below(s, N - s, 0.8) for s in range(N + 1)] == [True] * 7 + [False] * 2
    for closed_at in range(N + 1):  # (1 + S) / 10 is not below (S + 1) / 10
        threshold = sum([0.1] * (closed_at + 1))  # 0.1 + 0.1 + 0.1 is 0.30000000000000004
        assert [confidence_below(s, N - s, threshold) for s in range(N + 1)] == [s < closed_at for s in range(N + 1)]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.8, [1, 1, 1, 1, 0.999, 0.965, 0.745, 0.187, 0.057, 0.003]),
        (0.6, [1, 1, 1, 0.990, 0.942, 0.637, 0.194, 0.005]),
        (0.5, [1, 1, 0.995, 0.944, 0.806, 0.363, 0.058, 0.000]),
        (0.3, [1, 0.943, 0.813, 0.503, 0.255, 0.035, 0.001, 0]),
        (0.2, [1, 0.663, 0.430, 0.168, 0.058, 0.004, 0.000, 0]),
        (0.15, [1, 0.663, 0.430, 0.168, 0.058, 0.004, 0.000, 0]),
        (0.1, [0] * 8),
    ],
)
def test_how_often_the_gate_is_open(threshold, expected):
    rates = [0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99]
    gate = ConfidenceGate(threshold)
    share = [sum(binomial(N, s, mu) for s in range(N + 1) if opens(gate, s)) for mu in rates]
    assert share[: len(expected)] == pytest.approx(expected, abs=6e-4)


def test_with_more_rollouts():
    gate = ConfidenceGate(0.8)
    assert sum(binomial(16, s, 0.9) for s in range(17) if opens(gate, s, 16)) == pytest.approx(0.211, abs=5e-4)
    assert sum(binomial(64, s, 0.9) for s in range(65) if opens(gate, s, 64)) == pytest.approx(0.0099, abs=5e-5)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.8, {0.5: 0.926, 0.8: 0.574, 0.9: 0.368, 0.99: 0.158, 1.0: 0.134}), (0.5, {0.5: 0.5, 0.8: 0.1, 1.0: 0.002})],
)
def test_a_true_thompson_draw_never_stops(threshold, expected):
    gate, rng = ConfidenceGate(threshold, posterior="draw"), random.Random(1)
    for mu, share in expected.items():
        exact = sum(  # P(Beta(a, b) < x) is that of at least a successes in a + b - 1 trials
            binomial(N, s, mu) * sum(binomial(N + 1, k, threshold) for k in range(1 + s, N + 2)) for s in range(N + 1)
        )
        assert exact == pytest.approx(share, abs=2e-3)
        groups = [Group(0, sum(rng.random() < mu for _ in range(N)), N) for _ in range(10000)]
        drawn = sum(decision.open for decision in gate.decide(groups, 0, rng)) / len(groups)
        assert drawn == pytest.approx(exact, abs=0.02)  # four standard errors


def test_advantages_after_injection():
    before = torch.tensor([[1.0] * s + [0.0] * (N - s) for s in range(7)])
    after = before.clone()
    for group in after:
        group[replaced_index(group.tolist(), 0.5, "first", random.Random(0))] = 1.0
    population = group_advantages(after, True, correction=0)
    assert population[:, 0].tolist() == pytest.approx([2.646, 1.732, 1.291, 1.0, 0.775, 0.577, 0.378], abs=6e-4)
    assert population[:, -1].tolist() == pytest.approx([-0.378, -0.577, -0.775, -1, -1.291, -1.732, -2.646], abs=6e-4)
    torch.testing.assert_close(
        group_advantages(after, True) / population, torch.full((7, N), 0.9354), rtol=1e-3, atol=0
    )


def test_the_worst_failure_is_replaced():
    rng = random.Random(0)
    assert replaced_index([0.3, 0.1, 0.9, 0.1], 0.5, "first", rng) == 1
    assert {replaced_index([0.3, 0.1, 0.9, 0.1], 0.5, "random", rng) for _ in range(50)} == {1, 3}
    assert replaced_index([0.5, 1.0], 0.5, "first", rng) is None


def test_shaping_is_steepest_where_the_probability_is_g():
    log_p = torch.tensor([0.1, 0.001, 0.9]).log().requires_grad_()
    value = shaped_probability(log_p, 0.1)
    p = log_p.detach().exp()
    torch.testing.assert_close(value.detach(), p / (p + 0.1))
    (slope,) = torch.autograd.grad(value.sum(), log_p)
    torch.testing.assert_close(slope, 0.1 * p / (p + 0.1) ** 2)
    assert slope[0].item() == pytest.approx(0.25, rel=1e-6)


def test_thresholds():
    step = StepThreshold(at=5, start=0.8, end=0.1)
    assert [step.value(t) for t in (0, 4, 5, 99)] == [0.8, 0.8, 0.1, 0.1]
    sigmoid = SigmoidThreshold(at=10, width=2, start=0.8, end=0.2)
    assert sigmoid.value(10) == pytest.approx(0.5)
    assert sigmoid.value(12) == pytest.approx(0.2 + 0.6 / (1 + math.e))
    assert sigmoid.value(10**9) == pytest.approx(0.2)
    assert [opens(ConfidenceGate(step), 0, step=t) for t in (4, 5)] == [True, False]
    assert opens(ConfidenceGate(SigmoidThreshold(at=1, width=1, end=0.1)), 0, step=15)  # not quite 0.1


def test_the_threshold_falls_with_progress_and_no_further():
    progress = ProgressThreshold(start=0.8, end=0.1, slope=2.0, decay=0.5)
    assert progress.value(0) == 0.8
    progress.observe(0.1)
    assert progress.value(1) == pytest.approx(0.8)
    progress.observe(0.3)  # average 0.2
    assert progress.value(2) == pytest.approx(0.8 - 2 * 0.1)
    again = ProgressThreshold(start=0.8, end=0.1, slope=2.0, decay=0.5)
    again.load_state_dict(progress.state_dict())
    assert again.value(2) == progress.value(2)
    for _ in range(20):
        progress.observe(1.0)
    assert progress.value(22) == 0.1
    assert ProgressThreshold(slope=1.0, reference=0.5).value(0) == 0.8
    fixed = ProgressThreshold(slope=1.0, reference=0.5)
    fixed.observe(0.75)
    assert fixed.value(1) == pytest.approx(0.55)


def test_an_accumulated_posterior_counts_earlier_visits():
    gate = ConfidenceGate(0.5, memory=0.5)
    gate.observe([Group(3, 0, N)])
    gate.observe([Group(3, 4, N)])  # 4 + 0.5 * 0 successes of 8 + 0.5 * 8
    assert gate.seen == {3: (4.0, 8.0)}
    decision = gate.decide([Group(3, 8, N), Group(4, 8, N)], 0, random.Random(0))
    assert [d.confidence for d in decision] == pytest.approx([(1 + 10) / (2 + 14), 0.9])
    assert not ConfidenceGate(0.8).decide([Group(3, 7, N)], 0, random.Random(0))[0].open
    slow = ConfidenceGate(0.8, memory=1.0)
    slow.observe([Group(3, 0, N)])
    assert slow.decide([Group(3, 7, N)], 0, random.Random(0))[0].open


def test_the_random_gate_opens_as_often_as_the_record_says(tmp_path):
    gate = MatchedRandomGate(record(tmp_path, [1.0, 0.25, 0.0]))
    groups = [Group(i, i % 9, N) for i in range(4000)]
    shares = [sum(d.open for d in gate.decide(groups, step, random.Random(step))) / 4000 for step in range(3)]
    assert shares == [1.0, pytest.approx(0.25, abs=0.03), 0.0]
    with pytest.raises(MisconfigurationException, match="at most the 3 batches"):
        gate.rate(3)
    with pytest.raises(MisconfigurationException, match="the record that this run began with"):
        gate.load_state_dict({"record": [1.0]})
    for rates, first in (([], 1), ([0.5], 2)):
        (tmp_path / str(first)).mkdir()
        with pytest.raises(ValueError, match="`run` to be a run of HAPO with `hapo/gate_open` of every step"):
            MatchedRandomGate(record(tmp_path / str(first), rates, first))


def test_the_random_gate_gives_as_many_demonstrations_as_the_record_says(tmp_path):
    folder = record(tmp_path, [0.9, 0.9], curve="hapo/injected_groups")
    gate = MatchedRandomGate(folder, match="injected")
    groups = [Group(i, 8 if i % 2 else i % 8, N) for i in range(4000)]  # every other one has no failure
    decisions = gate.decide(groups, 0, random.Random(0))
    assert [d.open for d in decisions] == [i % 2 == 0 for i in range(4000)]  # 0.9 of all is more than there are
    gate.record[1] = 0.4
    decisions = gate.decide(groups, 1, random.Random(1))
    assert sum(d.open for d in decisions) / 4000 == pytest.approx(0.4, abs=0.03)
    assert not any(d.open for d, group in zip(decisions, groups, strict=True) if group.successes == N)
    assert decisions[0].confidence == pytest.approx(0.1)
    assert not any(d.open for d in gate.decide([Group(0, N, N)], 1, random.Random(0)))
    with pytest.raises(ValueError, match="with `hapo/gate_open` of every step"):
        MatchedRandomGate(folder)
    with pytest.raises(ValueError, match="`match` to be one of open, injected"):
        MatchedRandomGate(folder, match="all")


def test_the_slope_of_a_demonstration_at_p_equal_g_is_a_quarter_of_its_advantage():
    module = build(HAPO, tiny_model(), half_right, tokenizer=TOKENIZER, **HAPO_LIMITS)
    log_p = torch.tensor([0.1, 0.1]).log().requires_grad_()
    zero = torch.zeros(2)
    tokens = TokenStatistics(zero, log_p, zero, zero, zero, zero, zero)
    assert tokens.log_p_student is log_p
    given = TokenInputs(
        torch.tensor([0.0, -9.0]), zero + 1, torch.tensor([2.646, 2.646]), None, False, torch.tensor([True, False])
    )
    loss = module.objective.token_loss(tokens, given)
    (slope,) = torch.autograd.grad(loss.sum(), log_p)
    assert slope.tolist() == pytest.approx([-2.646 / 4, -2.646], rel=1e-6)  # the other token is GRPO's
    module.configure_model()
    weight = module.learner.importance_weight(tokens, given)
    assert weight.tolist() == [1.0, 2.0]  # log-probabilities of a sampler mean nothing for the first


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConfidenceGate(0.0), "`threshold` to be above 0"),
        (lambda: ConfidenceGate(posterior="median"), "`posterior` to be one of mean, draw"),
        (lambda: ConfidenceGate(memory=0.0), r"`memory` to lie in \(0, 1\]"),
        (lambda: ConstantThreshold(-1), "`level` to be above 0"),
        (lambda: StepThreshold(at=0), "`at` to be at least 1"),
        (lambda: SigmoidThreshold(at=3, width=0), "`width` to be above 0"),
        (lambda: SigmoidThreshold(at=3, width=1, start=-0.5), "`start` to be at least 0"),
        (lambda: ProgressThreshold(start=0.2, end=0.3), r"`end` to be at most `start` \(0.2\)"),
        (lambda: ProgressThreshold(decay=1.5), r"`decay` to lie in \[0, 1\]"),
        (lambda: RandomGate(1.5), r"`rate` to lie in \[0, 1\]"),
        (lambda: MatchedRandomGate("nowhere"), "there is no nowhere"),
        (lambda: SuccessBuffer(0), "`size` to be at least 1"),
        (lambda: SuccessBuffer(choice="best"), "`choice` to be one of newest, random"),
        (lambda: ColumnDemonstrations(on_rejected="keep"), "`on_rejected` to be one of drop, raise"),
        (lambda: hapo(ties="last"), "`injection.ties` to be one of first, random"),
        (lambda: hapo(std="none"), "`policy_gradient.std` to be one of sample, population"),
        (
            lambda: hapo(std="population", norm_adv_by_std_in_grpo=False),
            "`policy_gradient.norm_adv_by_std_in_grpo` with `policy_gradient.std` population",
        ),
        (lambda: hapo(shaping=0.0), "`injection.shaping` to be above 0"),
        (lambda: hapo(gradient_parts_every_n_steps=-1), "`injection.gradient_parts_every_n_steps` to be at least 0"),
        (lambda: hapo(num_generations=1), "`num_generations` of at least 2"),
    ],
)
def test_bad_settings_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def hapo(**settings):
    return build(HAPO, tiny_model(), half_right, tokenizer=TOKENIZER, **(HAPO_LIMITS | settings))
