"""HAPO: confidence, gates and injection against figures worked out by hand, and the whole step against plain autograd."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.checkpoints.finding import newest_checkpoint
from pgpo_lightning.commands.main import main
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.toy import ToyArithmetic
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.policy_gradient import (
    confidence,
    confidence_below,
    group_advantages,
    replaced_index,
    shaped_probability,
)
from pgpo_lightning.modules import GRPO, HAPO
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.objectives.demonstrations import ColumnDemonstrations, Demonstration, SuccessBuffer
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
from pgpo_lightning.studies.spec import read_study
from pgpo_lightning.training.mini_batches import TokenInputs
from tests.support import CONFIGS, hapo_worker
from tests.support.helpers import TOKENIZER, build, config, half_right, loader, questions, tiny_model, trainer

MATCHED = {"random": ["hapo-0.8"], "random-injected": ["hapo-0.8"], "random-0.2": ["hapo-0.2"]}
HAPO_LIMITS = {"max_prompt_length": 64, "max_response_length": 32}
N = 8


def binomial(n, k, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def opens(gate, successes, size=N, step=0):
    return gate.decide([Group(0, successes, size)], step, random.Random(0))[0].open


# ---------------------------------------------------------------------------------------------------- formulas


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


# ------------------------------------------------------------------------------------------------------- gates


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


def record(folder, rates, first=1, curve="hapo/gate_open"):
    curves = {curve: [list(range(first, first + len(rates))), rates]}
    run = RunRecord("s", "a", 0, len(rates), 8, 1.0, 1.0, curves if rates else {}, {})
    run.save(folder / "run.json")
    return str(folder)


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


def test_a_run_longer_than_the_gates_record_is_refused_at_the_start(tmp_path):
    with pytest.raises(MisconfigurationException, match="at most the 1 batches"):
        fit(tmp_path / "run", steps=2, gate=MatchedRandomGate(record(tmp_path, [1.0])))


# ---------------------------------------------------------------------------------------------- demonstrations


def accept(question, text):
    return Demonstration([1], 1.0) if "good" in text else "its reward is 0"


def rows(*texts):
    return [Question("?", "1", index=i, source=f"f:{i}", columns={"solution": text}) for i, text in enumerate(texts)]


def test_a_demonstration_that_the_verifier_refuses_is_dropped_and_named():
    source = ColumnDemonstrations()
    with pytest.warns(
        UserWarning, match="Dropped the demonstrations of 1 of 3 .* the first is that of f:1: its reward is 0"
    ):
        source.check(rows("good", "bad", None), accept)
    chosen = [source.choose(question, accept, random.Random(0)) for question in rows("good", "bad", None)]
    assert chosen == [Demonstration([1], 1.0), None, None]


@pytest.mark.parametrize(
    ("given", "texts", "message"),
    [
        (
            {"on_rejected": "raise"},
            ("good", "bad"),
            "Expected `solution` of f:1 to be a demonstration, but its reward is 0",
        ),
        ({}, ("bad", "bad"), "keep at least one demonstration, but had to drop .* 2 of 2 .*f:0"),
        ({"column": "other"}, ("good",), "no training question has `other`. The columns of f:0 .*: solution"),
        ({}, ("good", 7), "Expected a text in column `solution` of f:1, but got 7"),
    ],
)
def test_bad_demonstrations_are_named(given, texts, message):
    with pytest.raises(ValueError, match=message):
        ColumnDemonstrations(**given).check(rows(*texts), accept)


def test_the_runs_own_verifier_judges_demonstrations():
    module = build(HAPO, tiny_model(), half_right, tokenizer=TOKENIZER, **HAPO_LIMITS)
    for question in questions(8):
        text = question.columns["solution"]
        verdict = module.objective.verify(question, text)
        if half_right(question, text):
            assert verdict == Demonstration([*TOKENIZER(text).input_ids, TOKENIZER.eos_token_id], 1.0)
        else:
            assert verdict == "its reward is 0"
    module.max_response_length = 5
    assert "tokens, `max_response_length` is 5" in module.objective.verify(questions(1)[0], text)


def test_the_buffer_keeps_the_newest_successes_of_each_question():
    buffer = SuccessBuffer(size=2)
    question = questions(1)[0]
    assert buffer.choose(question, accept, random.Random(0)) is None
    buffer.observe([(question.index, Demonstration([i], 1.0)) for i in range(4)] + [(7, Demonstration([9], 1.0))])
    assert buffer.choose(question, accept, random.Random(0)) == Demonstration([3], 1.0)
    other = SuccessBuffer(size=2, choice="random")
    other.load_state_dict(buffer.state_dict())
    assert {other.choose(question, accept, random.Random(i)).ids[0] for i in range(20)} == {2, 3}


# -------------------------------------------------------------------------------------------------- whole steps


def fit(folder, steps=1, module=HAPO, items=8, **settings):
    known = {"optimizer": lambda p: torch.optim.SGD(p, lr=1e-2), "num_generations": 4} | HAPO_LIMITS
    made = module(tiny_model(), half_right, tokenizer=TOKENIZER, **(known | settings))
    t = trainer(folder, max_steps=steps)
    t.fit(made, loader(questions(items), 4))
    return made, t


def weights(module):
    return [p.detach().clone() for p in module.model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_agg_mode": "token-mean", "norm_adv_by_std_in_grpo": False},
        {"updates_per_batch": 2, "num_iterations": 2},
    ],
)
def test_a_gate_that_never_opens_is_grpo(tmp_path, settings):
    settings = {
        "norm_adv_by_std_in_grpo": True, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)
    } | settings  # fmt: skip
    steps = 2 * settings.get("updates_per_batch", 1) * settings.get("num_iterations", 1)
    grpo, _ = fit(tmp_path, steps, GRPO, **settings)
    hapo, _ = fit(tmp_path, steps, gate=ConfidenceGate(1 / 6), **settings)
    assert hapo.scalars["hapo/injected_groups"] == 0
    assert same(grpo, hapo)
    open_gate, _ = fit(tmp_path, steps, gate=ConfidenceGate(0.9), **settings)
    assert not same(grpo, open_gate)


def naive_loss(model, learned, old, by_sequence, with_advantage):
    """The objective of a step as the paper writes it, one response at a time."""
    total = 0.0
    for row, old_log_p in zip(learned, old, strict=True):
        prompt, y = row.rollout.prompt_ids, row.rollout.response_ids
        logits = model(torch.tensor([[*prompt, *y]])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.log_softmax(-1)[torch.arange(len(y)), torch.tensor(y)]
        if row.demonstration:
            p = log_p.exp()
            loss = -(row.advantage if with_advantage else 1.0) * p / (p + 0.1)
        else:
            ratio = (log_p - (log_p.detach() if old_log_p is None else old_log_p)).exp()
            loss = -torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.28) * row.advantage)
        total = total + (loss.mean() / len(learned) if by_sequence else loss.sum() / sum(r.length for r in learned))
    return total


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("loss_agg_mode", ["seq-mean-token-mean", "token-mean"])
@pytest.mark.parametrize("with_advantage", [True, False])
def test_the_step_is_that_of_a_naive_implementation(tmp_path, iterations, loss_agg_mode, with_advantage):
    module, _ = fit(
        tmp_path, iterations, max_grad_norm=None, is_clip=None, num_iterations=iterations, clip_ratio_c=None,
        loss_agg_mode=loss_agg_mode, demonstration_advantage=with_advantage,
    )  # fmt: skip
    learned = [row.replaced_by or row for row in module.last_samples]
    given = [row for row in learned if row.demonstration]
    assert 0 < len(given) < 4  # half of the demonstrations were refused
    groups = torch.tensor([row.verdict.reward for row in learned]).view(-1, 4)
    expected = group_advantages(groups, True).view(-1)
    for row, advantage in zip(learned, expected.tolist(), strict=True):
        assert row.advantage == (1.0 if row.demonstration and not with_advantage else pytest.approx(advantage))
    assert all(row.old_log_probs is None for row in given)
    start = tiny_model()
    old = [row.old_log_probs for row in learned]
    for _ in range(iterations):
        start.zero_grad()
        naive_loss(start, learned, old, loss_agg_mode == "seq-mean-token-mean", with_advantage).backward()
        with torch.no_grad():
            for p in start.parameters():
                p -= 1e-2 * p.grad
    for naive, ours in zip(start.parameters(), module.model.parameters(), strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-4, atol=2e-7)


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
    weight = module.importance_weight(tokens, given)
    assert weight.tolist() == [1.0, 2.0]  # log-probabilities of a sampler mean nothing for the first


def test_one_minus_confidence_as_a_weight(tmp_path):
    plain, _ = fit(tmp_path)
    weighted, _ = fit(tmp_path, confidence_weight=True)
    for i in range(0, 16, 4):
        a, b = (module.last_samples[i : i + 4] for module in (plain, weighted))
        c = (1 + sum(row.verdict.reward for row in a)) / 6
        for row, other in zip(a, b, strict=True):
            if row.replaced_by is not None:
                assert other.replaced_by.advantage == pytest.approx((1 - c) * row.replaced_by.advantage)


def test_what_is_reported_is_the_students_own(tmp_path):
    module, t = fit(tmp_path, gate=ConfidenceGate(0.9))
    own = module.last_samples
    learned = [row.replaced_by or row for row in own]
    given = [row for row in learned if row.demonstration]
    assert given
    assert not any(row.demonstration for row in own)
    metrics = t.callback_metrics
    assert float(metrics["critic/score/mean"]) == pytest.approx(sum(r.verdict.reward for r in own) / 16)
    assert float(metrics["response_length/total"]) == sum(row.length for row in own)
    assert len(module.step_statistics) == sum(row.advantage != 0 and not row.demonstration for row in learned)
    assert module.step_statistics.sampler_gap.max() < 1e-4
    successes = [sum(row.verdict.reward for row in own[i : i + 4]) for i in range(0, 16, 4)]
    scalars = module.scalars
    assert scalars["hapo/injected_groups"] == len(given) / 4
    assert scalars["hapo/confidence"] == pytest.approx(sum((1 + s) / 6 for s in successes) / 4)
    assert scalars["hapo/gate_open"] == sum((1 + s) / 6 < 0.9 for s in successes) / 4 == 1
    assert scalars["critic/informative_groups"] == sum(0 < s < 4 for s in successes) / 4
    assert scalars["hapo/threshold"] == 0.9
    active = [row for row in learned if row.advantage]
    share = sum(row.length for row in active if row.demonstration) / sum(row.length for row in active)
    assert scalars["hapo/teacher_token_share"] == pytest.approx(share)
    assert scalars["hapo/advantage"] == pytest.approx(sum(row.advantage for row in given) / len(given))


def test_accuracy_where_the_gate_is_closed(tmp_path):
    module, _ = fit(tmp_path, gate=ConfidenceGate(0.3))
    groups = [sum(row.verdict.reward for row in module.last_samples[i : i + 4]) for i in range(0, 16, 4)]
    closed = [s for s in groups if (1 + s) / 6 >= 0.3]
    assert 0 < len(closed) < 4
    assert module.scalars["hapo/closed_success"] == pytest.approx(sum(closed) / (4 * len(closed)))


def test_a_success_serves_from_the_next_visit_on(tmp_path):
    class Finishing(HAPO):
        def sample(self, *arguments):
            return [replace(rollout, finished=True) for rollout in super().sample(*arguments)]

    settings = {"module": Finishing, "gate": ConfidenceGate(2.0), "items": 4}
    first, _ = fit(tmp_path, steps=1, demonstrations=SuccessBuffer(), **settings)
    assert first.scalars["hapo/injected_groups"] == 0
    again, _ = fit(tmp_path, steps=2, demonstrations=SuccessBuffer(), **settings)
    assert again.scalars["hapo/injected_groups"] > 0
    kept = {tuple(ids.tolist()) for kept in first.demonstrations.kept.values() for ids, _ in kept}
    given = [row.replaced_by for row in again.last_samples if row.replaced_by is not None]
    assert {tuple(row.rollout.response_ids) for row in given} <= kept


def test_measuring_the_gradients_apart_changes_nothing(tmp_path):
    plain, _ = fit(tmp_path, steps=2)
    measured, _ = fit(tmp_path, steps=2, gradient_parts_every_n_steps=2)
    assert same(plain, measured)
    assert "hapo/gradient_cosine" not in measured.scalars  # not in the second batch
    measured, _ = fit(tmp_path, steps=1, gradient_parts_every_n_steps=2)
    given, sampled, cosine = (
        measured.scalars[f"hapo/gradient_{name}"] for name in ("norm_demonstrations", "norm_rollouts", "cosine")
    )
    together = given**2 + sampled**2 + 2 * cosine * given * sampled
    assert given > 0
    assert together**0.5 == pytest.approx(measured.scalars["actor/grad_norm"], rel=1e-4)


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
        (lambda: hapo(ties="last"), "`ties` to be one of first, random"),
        (lambda: hapo(std="none"), "`std` to be one of sample, population"),
        (
            lambda: hapo(std="population", norm_adv_by_std_in_grpo=False),
            "`norm_adv_by_std_in_grpo` with `std` population",
        ),
        (lambda: hapo(shaping=0.0), "`shaping` to be above 0"),
        (lambda: hapo(gradient_parts_every_n_steps=-1), "`gradient_parts_every_n_steps` to be at least 0"),
        (lambda: hapo(num_generations=1), "`num_generations` of at least 2"),
    ],
)
def test_bad_settings_name_the_field(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def hapo(**settings):
    return build(HAPO, tiny_model(), half_right, tokenizer=TOKENIZER, **(HAPO_LIMITS | settings))


# ------------------------------------------------------------------------------------------------ the command line


def settings_of(folder, steps, **model):
    path = Path(config(folder, steps, module="HAPO", model={"max_response_length": 32} | model))
    settings = yaml.safe_load(path.read_text())
    del settings["model"]["init_args"]["max_reprompt_len"]
    settings["summary"] = {"picture": False}
    path.write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(path)]


REMEMBERING = {
    "class_path": "ConfidenceGate",
    "init_args": {
        "posterior": "draw",
        "memory": 0.5,
        "threshold": {"class_path": "ProgressThreshold", "init_args": {"slope": 1.0}},
    },
}


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path):
    buffer = {"class_path": "SuccessBuffer", "init_args": {"choice": "random"}}
    model = {"gate": REMEMBERING, "ties": "random", "demonstrations": buffer}  # all that has a state or draws lots
    main(settings_of(tmp_path / "whole", 6, **model))
    main(settings_of(tmp_path / "cut", 4, **model))  # the second epoch has begun: some questions are seen again
    main([*settings_of(tmp_path / "cut", 6, **model), "--ckpt_path", "last"])
    saved = [
        torch.load(newest_checkpoint(tmp_path / name / "checkpoints"), weights_only=True) for name in ("whole", "cut")
    ]
    for name, value in saved[0]["state_dict"].items():
        assert torch.equal(value, saved[1]["state_dict"][name]), name
    states = [json.dumps(s["pgpo_lightning"]["hapo"], default=torch.Tensor.tolist) for s in saved]
    assert states[0] == states[1]
    assert len(saved[0]["pgpo_lightning"]["hapo"]["gate"]["state"]["seen"]) > 10
    curves = [read_scalars(tmp_path / name) for name in ("whole", "cut")]
    assert len(curves[0]["hapo/injected_groups"]) == 6
    assert any(share > 0 for step, share in curves[0]["hapo/injected_groups"].items() if step > 4)  # after the cut
    assert {t: v for t, v in curves[0].items() if "hapo" in t} == {t: v for t, v in curves[1].items() if "hapo" in t}
    assert "hapo/gate_open" in RunRecord.load(tmp_path / "whole").curves
    other = settings_of(
        tmp_path / "cut", 6, **(model | {"gate": {"class_path": "RandomGate", "init_args": {"rate": 1}}})
    )
    with pytest.raises(MisconfigurationException, match=r"`model.gate` is {.*RandomGate.* was {.*ConfidenceGate"):
        main([*other, "--ckpt_path", "last"])


def test_a_column_that_is_not_there_stops_before_anything_is_generated(tmp_path, monkeypatch):
    monkeypatch.setattr("pgpo_lightning.rollout.transformers_engine.TransformersEngine.generate", None)
    source = {"class_path": "ColumnDemonstrations", "init_args": {"column": "worked"}}
    with pytest.raises(ValueError, match=r"no training question has `worked`.*toy train:0.* domain, a, b, c, solution"):
        main(settings_of(tmp_path / "run", 2, demonstrations=source))


# ----------------------------------------------------------------------------------------------------- several ranks


def test_two_processes_are_one(tmp_path):
    hapo_worker.main(str(tmp_path / "one"), 1)
    subprocess.run(
        [sys.executable, "-m", "tests.support.hapo_worker", str(tmp_path / "two"), "2"],
        check=True,
        timeout=580,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    one = torch.load(tmp_path / "one.0", weights_only=True)
    two = [torch.load(tmp_path / f"two.{rank}", weights_only=True) for rank in range(2)]
    assert two[0]["state"] == two[1]["state"] == one["state"]
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    torch.testing.assert_close(two[0]["weights"], one["weights"], rtol=1e-4, atol=1e-6)
    assert not torch.equal(one["weights"], one["start"])
    assert one["scalars"][-1]["hapo/injected_groups"] > 0
    for mine, theirs in zip(one["scalars"], two[0]["scalars"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)


# -------------------------------------------------------------------------------------------------- hard questions


def test_hard_questions_are_there_and_few_are_answered():
    from benchmarks.toy_base import accuracy, solution_probabilities
    from pgpo_lightning.data.toy import BASE_MODEL, held_out
    from pgpo_lightning.data.toy import questions as toy
    from pgpo_lightning.data.toy_hard import HARD, hard

    numbers = [(a, b, int(c)) for (a, b), summands in HARD.items() for c in summands.split()]
    assert len(set(numbers)) == len(numbers) == 94
    assert (len(toy("train", hard=True)), len(toy("test", hard=True))) == (316, 60)
    for split in ("train", "test"):
        for question in toy(split, hard=True):
            a, b, c = (question.columns[name] for name in "abc")
            assert hard(a, b, c)
            assert held_out(a, b, c) == (split == "test")
    sample = toy("test", hard=True)
    assert accuracy(BASE_MODEL, sample, samples=8, temperature=1.0, top_p=1.0).float().mean() < 0.05
    assert solution_probabilities(BASE_MODEL, sample).max() < 0.05
    assert solution_probabilities(BASE_MODEL, toy("test")[:60]).mean() > 0.3
    data = ToyArithmetic(hard=True, domains=["physics"])
    data.setup("fit")
    assert len(data.questions["train"]) == 79


@pytest.mark.parametrize("study", ["hapo", "hapo-rare"])
def test_the_studies_have_the_arms_and_controls_that_they_say(study):
    spec = read_study(CONFIGS / "studies" / f"{study}.yaml")
    runs = spec.runs()
    assert len(runs) == len(spec.conditions) * len(spec.arms) * 5
    by_arm = {run.arm: run for run in runs if run.seed == 0}
    assert by_arm["grpo"].settings["model"]["init_args"]["norm_adv_by_std_in_grpo"]  # as HAPO by default
    for arm, run in by_arm.items():
        assert run.needs == tuple(f"{run.condition}/{of}/seed=0" for of in MATCHED.get(arm, ()))
