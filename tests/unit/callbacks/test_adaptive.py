"""Adaptive multipliers follow their sources' formulas; an adaptive alpha meets its target."""

import math
import random
from statistics import fmean, stdev

import pytest
import torch

from pgpo_lightning.callbacks import (
    AdaptiveInformationMultiplier,
    EffectiveSampleSizeMultiplier,
    KLAdaptiveMultiplier,
    PolyakMultiplier,
)
from pgpo_lightning.callbacks.adaptive import policy_change, slope
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.losses.step_statistics import StepStatistics
from tests.support.directions import DIRECTIONS
from tests.support.fixed_gradients import one_row
from tests.support.helpers import (
    random_rows,
    tiny_sdpo,
)


def test_the_rule_of_rsl_rl():
    multiplier = KLAdaptiveMultiplier(target=0.01, rho_min=0.5, rho_max=2.0)
    expected = 1.0
    kls = [0.0201, 0.0199, 0.0, 0.0051, 0.5, 0.5, 0.5, 0.0049, 1e-9, 1e-9, 1e-9, 1e-9, 1e-9, 0.03]
    for kl in kls:
        assert multiplier.multiplier(StepStatistics.empty(), 0) == expected
        multiplier.decide(kl)
        if kl > 0.02:
            expected = max(0.5, expected / 1.5)
        elif 0 < kl < 0.005:
            expected = min(2.0, expected * 1.5)
    assert expected == pytest.approx(2 / 1.5)


def test_policy_change_is_the_kl_of_the_sampler_to_the_policy():
    """One prompt and responses of one token: the exact KL is known, in both directions, and they differ."""
    module = tiny_sdpo(temperature=1.5, micro_batch_tokens=4000)
    prompt = list(range(5, 12))
    log_p = lambda: module.model(torch.tensor([prompt])).logits[0, -1].detach().div(1.5).log_softmax(0)  # noqa: E731
    old = log_p()
    tokens = torch.multinomial(old.exp(), 4000, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Sample(Rollout(Question("?", "1"), prompt, [t], old[t].view(1), "", True), Verdict(0.0)) for t in tokens]
    assert policy_change(module, rows) == pytest.approx(0.0, abs=1e-9)
    with torch.no_grad():
        module.model.model.norm.weight.mul_(3)  # sharper: the KL to it is larger than the KL from it
    new = log_p()
    forward, reverse = ((a.exp() * (a - b)).sum().item() for a, b in ((old, new), (new, old)))
    terms = (new - old)[tokens].double()
    error = (terms.expm1() - terms).std().item() / 4000**0.5
    measured = policy_change(module, rows)
    assert measured == pytest.approx(forward, abs=3 * error)
    assert abs(measured - reverse) > 3 * error


def test_policy_change_is_a_mean_over_tokens_whatever_the_micro_batches():
    rows = random_rows(8)
    few, many = tiny_sdpo(micro_batch_tokens=30), tiny_sdpo(micro_batch_tokens=10**6)
    changes = []
    for row in rows:
        ids = torch.tensor([row.rollout.prompt_ids + row.rollout.response_ids])
        log_p = many.model(ids).logits[0].log_softmax(-1)
        at = len(row.rollout.prompt_ids) - 1
        now = torch.stack([log_p[at + i, token] for i, token in enumerate(row.rollout.response_ids)])
        changes.append((now - row.rollout.log_probs).detach().double())
    change = torch.cat(changes)
    expected = (change.expm1() - change).mean().item()
    assert policy_change(many, rows) == pytest.approx(expected, rel=1e-4)
    assert policy_change(few, rows) == pytest.approx(expected, rel=1e-4)


def weighted(log_ratio, length):
    values = {name: torch.ones(len(length)) for name in StepStatistics.__dataclass_fields__}
    mean = torch.tensor(log_ratio) / torch.tensor(length)
    return StepStatistics(**values | {"sampler_log_ratio": mean, "length": torch.tensor(length)})


@pytest.mark.parametrize(
    ("settings", "weights", "rho"),
    [
        ({}, [1.0, 1.0, 1.0], 1.0),
        ({}, [2.0, 2.0], 1.0),  # a common factor is no disagreement
        ({}, [1.0, 3.0], math.sqrt(16 / 10 / 2)),
        ({"scaling_rule": "linear"}, [1.0, 3.0], 0.8),
        ({"scaling_rule": "linear", "base_ratio": 0.9}, [1.0, 3.0], 0.8 / 0.9),
        ({"base_ratio": 0.7}, [1.0, 3.0], 1.0),
        ({"clip": 2.0, "scaling_rule": "linear"}, [1.0, 3.0], 9 / 5 / 2),
        ({}, [math.exp(300), 1.0, 1.0, 1.0], 0.5),  # overflows if it is computed as it is written
        ({"rho_min": 0.6}, [math.exp(300), 1.0, 1.0, 1.0], 0.6),
    ],
)
def test_effective_sample_size(settings, weights, rho):
    multiplier = EffectiveSampleSizeMultiplier(**settings)
    lengths = [float(3 + i) for i in range(len(weights))]
    statistics = weighted([math.log(weight) for weight in weights], lengths)
    assert multiplier.bounded(multiplier.multiplier(statistics, 0)) == pytest.approx(rho, rel=1e-5)


def test_no_sequence_is_no_disagreement():
    assert EffectiveSampleSizeMultiplier().multiplier(StepStatistics.empty(), 0) == 1.0


@pytest.mark.parametrize("name", DIRECTIONS)
def test_slope_is_what_a_linear_loss_loses_in_the_step(name):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (5, 3))
    unused = torch.nn.Parameter(torch.zeros(2))
    optimizer = DIRECTIONS[name]([{"params": [a, unused]}, {"params": [b], "lr": torch.tensor(0.01)}])
    for k in range(6):
        gradients = [(1 + k) * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in (a, b)]
        before = [p.detach().clone() for p in (a, b)]
        a.grad, b.grad = (g.clone() for g in gradients)
        expected = slope(optimizer)
        optimizer.step()
        lost = -sum((g * (p.detach() - p0)).sum() for g, p, p0 in zip(gradients, (a, b), before, strict=True))
        assert expected == pytest.approx(float(lost), rel=1e-6)


def steps(multiplier, information):
    """Rho of every step of a run with such an information, as the callback would decide it."""
    for k, value in enumerate(information):
        multiplier.history.append(multiplier.bounded(multiplier.multiplier(one_row(1.0 + value, 1.0), k)))
    return multiplier.history


def test_alpha_solves_for_the_mean_and_for_the_spread():
    """With information x and 0 in turn, exp(alpha x) and 1: the mean and the spread have closed forms."""
    information = [0.1, 0.0] * 3
    mean = AdaptiveInformationMultiplier(target_mean=1.2, window=4, warmup=4, sensitivity=2.0)
    assert steps(mean, information)[:4] == pytest.approx([math.exp(0.2), 1.0] * 2, rel=1e-5)
    assert mean.history[4:] == pytest.approx([1.4, 1.0], rel=1e-5)
    assert mean.sensitivity == pytest.approx(math.log(1.4) / 0.1, rel=1e-5)
    spread = AdaptiveInformationMultiplier(target_spread=0.2, window=4, warmup=4)
    steps(spread, information)
    assert spread.sensitivity == pytest.approx(math.log(1 + 0.2 * math.sqrt(3)) / 0.1, rel=1e-5)


@pytest.mark.parametrize("size", [0.004, 0.05])
def test_a_target_is_met_whatever_the_size_of_the_information(size):
    rng = random.Random(0)
    information = [size * (1 + 0.2 * rng.gauss(0, 1)) for _ in range(110)]
    mean = steps(AdaptiveInformationMultiplier(target_mean=1.1), information)
    assert fmean(mean[10:]) == pytest.approx(1.1, abs=0.005)
    spread = steps(AdaptiveInformationMultiplier(target_spread=0.05, rho_max=4.0, sensitivity_max=1e3), information)
    assert stdev(spread[10:]) == pytest.approx(0.05, abs=0.015)


def test_alpha_knows_the_past_only_and_passes_over_steps_without_a_teacher():
    make = lambda: AdaptiveInformationMultiplier(target_mean=1.3, window=3, warmup=2)  # noqa: E731
    a, b = steps(make(), [0.1, 0.2, 0.3, 0.1]), steps(make(), [0.1, 0.2, 0.3, 0.9])
    assert a[:3] == b[:3]
    multiplier = make()
    steps(multiplier, [0.1, 0.2, 0.3, 0.1])
    recent = multiplier.recent
    assert multiplier.multiplier(StepStatistics.empty(), 4) == 1.0
    assert multiplier.recent == recent


@pytest.mark.parametrize("information", [[-0.1, -0.2] * 3, [0.0] * 6, [1e-9] * 6])
def test_alpha_stays_where_no_alpha_meets_the_target(information):
    multiplier = AdaptiveInformationMultiplier(target_mean=1.3, warmup=2, sensitivity=4.0)
    steps(multiplier, information)
    assert multiplier.sensitivity == 4.0


def test_alpha_is_the_smallest_that_reaches_a_spread():
    """Far above it both values are at their bound and the spread is gone."""
    multiplier = AdaptiveInformationMultiplier(target_spread=0.1, warmup=4, rho_max=1.5)
    steps(multiplier, [0.1, 0.2] * 3)
    assert stdev(multiplier.bounded(math.exp(multiplier.sensitivity * i)) for i in multiplier.recent[:-1]) >= 0.1
    assert multiplier.sensitivity < 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLAdaptiveMultiplier(target=0.0), "`target` to be above 0, but got 0.0"),
        (lambda: KLAdaptiveMultiplier(factor=1.0), r"`factor` to lie in \(1, 10\], but got 1.0"),
        (lambda: KLAdaptiveMultiplier(rho_min=0.0), r"`rho_min` to lie in \(0, 1\], but got 0.0"),
        (lambda: KLAdaptiveMultiplier(rho_max=0.9), r"`rho_max` to lie in \[1, 1000\], but got 0.9"),
        (lambda: EffectiveSampleSizeMultiplier("root"), "`scaling_rule` to be one of sqrt, linear, but got 'root'"),
        (lambda: EffectiveSampleSizeMultiplier(base_ratio=0.0), r"`base_ratio` to lie in \(0, 1\], but got 0.0"),
        (lambda: EffectiveSampleSizeMultiplier(clip=0.0), "`clip` to be above 0, but got 0.0"),
        (lambda: EffectiveSampleSizeMultiplier(rho_min=1.5), r"`rho_min` to lie in \[0, 1\], but got 1.5"),
        (lambda: PolyakMultiplier(c=0.0), "`c` to be above 0, but got 0.0"),
        (lambda: PolyakMultiplier(optimum=-1.0), "`optimum` to be at least 0, but got -1.0"),
        (lambda: PolyakMultiplier(rho_min=3.0), "`rho_min` to be at most `rho_max`, but got 3.0 and 2.0"),
        (lambda: AdaptiveInformationMultiplier(), "one of `target_mean` and `target_spread`, but got None and None"),
        (lambda: AdaptiveInformationMultiplier(1.1, 0.1), "one of `target_mean` and `target_spread`"),
        (lambda: AdaptiveInformationMultiplier(0.9), "`target_mean` to be at least 1, but got 0.9"),
        (lambda: AdaptiveInformationMultiplier(2.0), r"below `rho_max` \(2.0\), but got 2.0"),
        (lambda: AdaptiveInformationMultiplier(None, 0.0), "`target_spread` to be above 0"),
        (lambda: AdaptiveInformationMultiplier(1.1, warmup=1), "`warmup` to be at least 2, but got 1"),
        (
            lambda: AdaptiveInformationMultiplier(1.1, sensitivity_max=0.5),
            "`sensitivity_max` to be at least",
        ),
        (lambda: AdaptiveInformationMultiplier(1.1, sensitivity=-1.0), "`sensitivity` to be at least 0"),
    ],
)
def test_bad_settings_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()
