"""Rivals of PGPO against their formulas: question weights, routing, certainty weights, bounded entries, credited advantages."""

import math

import pytest
import torch

from pgpo_lightning.losses.divergence import (
    Softening,
    clipped_divergence,
    entropy,
    generalised_jsd,
    softened_reverse_kl,
)
from pgpo_lightning.losses.policy_gradient import credited_advantages
from pgpo_lightning.losses.token_weights import TokenWeights, question_weights
from pgpo_lightning.modules import GRPO, RLSD, SDPO, SRPO
from pgpo_lightning.objectives import distillation
from tests.support.formulas import alone, assert_gradients, capped, log_distributions, routed_rows
from tests.support.helpers import LIMITS, TOKENIZER, accumulate, build, half_right, prepare, random_rows, tiny_model


def test_question_weights():
    rates = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    everyone = torch.cat([rates, torch.tensor([0.75, 0.0], dtype=torch.float64)])
    mean = ((0.25 * 0.75) ** 0.5 * 2 + 0.5) / 3
    expected = torch.tensor([0.0, (0.25 * 0.75) ** 0.5 / mean, 0.5 / mean, 0.0], dtype=torch.float64)
    torch.testing.assert_close(question_weights(rates, everyone, 0.5), expected)
    assert question_weights(everyone, everyone, 0.5).sum() == pytest.approx(3)
    assert (question_weights(rates[::3], rates[::3], 0.5) == 0).all()


def test_weights_of_questions_multiply_their_rows_and_zero_costs_nothing(monkeypatch):
    module = alone(SDPO, question_weight_exponent=0.5, num_generations=4)
    rows = random_rows(12)
    for row, reward in zip(rows, [1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1], strict=True):
        row.verdict.reward = float(reward)
    prompts = [row.reprompt_ids for row in rows]
    monkeypatch.setattr(module.objective.teaching.builder, "attach", lambda *_: {})
    other = torch.tensor([0.5, 1.0], dtype=torch.float64)  # of another rank
    monkeypatch.setattr(distillation, "gather", lambda mine: [mine, other])
    scalars = prepare(module, rows, None)
    assert prompts == [row.reprompt_ids for row in rows]
    assert scalars["self_distillation/weighted_questions"] == pytest.approx(2 / 3)
    mean = (0.1875**0.5 + 0.5 + 0.5) / 3
    weights = [0.1875**0.5 / mean] * 4 + [0.5 / mean] * 4 + [0.0] * 4

    def expected():
        total = 0.0
        for row, weight in zip(rows, weights, strict=True):
            log_s, log_t, at = log_distributions(module, row)
            loss = generalised_jsd(log_s, log_t, 0.5) * capped(module, row, log_s, at)
            total = total + weight * loss.mean() / len(rows)
        return total

    assert_gradients(module, rows, expected)
    assert len(module.step_statistics) == 8
    assert module.objective.normalizer(rows) == sum(row.length for row in rows)


@pytest.mark.parametrize("dynamic", [False, True])
def test_failures_are_distilled_and_the_others_reinforced_over_all_tokens(dynamic):
    allocation = TokenWeights("token", 1.3, None, "teacher-certainty") if dynamic else None
    module = alone(SRPO, loss_agg_mode="token-mean", allocation=allocation)
    rows = routed_rows()

    def expected():
        made = [(row, *log_distributions(module, row)) for row in rows]
        weights = torch.cat([(-1.3 * entropy(log_t)).exp() for row, _, log_t, _ in made if row.reprompt_ids])
        mean, total = weights.mean(), 0.0
        for row, log_s, log_t, at in made:
            if row.reprompt_ids is not None:
                w = (-1.3 * entropy(log_t)).exp() / mean if dynamic else 1.0
                loss = w * generalised_jsd(log_s, log_t, 0.5)
            else:
                ratio = (log_s[at] - log_s[at].detach()).exp()
                loss = -row.advantage * ratio
            total = total + (loss * capped(module, row, log_s, at)).sum()
        return total / sum(row.length for row in rows)

    assert_gradients(module, rows, expected)
    assert module.step_statistics.has_teacher.sum() == 3
    assert len(module.step_statistics) == 7


def test_certainty_weights_without_routing():
    module = alone(SDPO, loss_agg_mode="token-mean", allocation=TokenWeights("token", 0.8, None, "teacher-certainty"))
    rows = random_rows(5)

    def expected():
        made = [(row, *log_distributions(module, row)) for row in rows]
        weights = [(-0.8 * entropy(log_t)).exp() for _, _, log_t, _ in made]
        total = sum(
            (w * generalised_jsd(log_s, log_t, 0.5) * capped(module, row, log_s, at)).sum()
            for w, (row, log_s, log_t, at) in zip(weights, made, strict=True)
        )
        return total / torch.cat(weights).mean() / sum(row.length for row in rows)

    assert_gradients(module, rows, expected)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"entry_clip": 0.05}, lambda a, b: clipped_divergence(a, b, 0.5, 0.05)),
        ({"entry_clip": 0.05, "divergence_alpha": 0.0}, lambda a, b: clipped_divergence(a, b, 0.0, 0.05)),
        (
            {"divergence_alpha": 1.0, "softening": Softening(0.4, 25.0)},
            lambda a, b: softened_reverse_kl(a, b, Softening(0.4, 25.0)),
        ),
    ],
    ids=["clip", "forward clip", "softened"],
)
def test_bounded_entries_and_softened_targets_reach_the_step(settings, loss):
    module = alone(SDPO, is_clip=None, **settings)
    rows = random_rows(4)
    assert_gradients(
        module, rows, lambda: sum(loss(*log_distributions(module, row)[:2]).mean() for row in rows) / len(rows)
    )


def test_credited_advantages():
    advantages = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    log_ratio = torch.tensor([0.1, 3.0, 0.1, 3.0, 0.0, -3.0], dtype=torch.float64)
    factor = torch.tensor([1.10517091808, 1.2, 0.90483741804, 0.8, 1.0, 1.2], dtype=torch.float64)
    got = credited_advantages(advantages, log_ratio, 0.3, 0.2)
    torch.testing.assert_close(got, advantages * (0.7 + 0.3 * factor))
    assert (got.sign() == advantages.sign()).all()
    assert torch.equal(credited_advantages(advantages, log_ratio, 0.0, 0.2), advantages)


def test_rlsd_is_grpo_with_credited_advantages():
    module = alone(RLSD, mixing=0.8, mixing_steps=10, evidence_clip=0.2)
    module.objective.current_mixing = module.objective.mixing_at(4)
    assert module.objective.current_mixing == pytest.approx(0.8 * 0.6)
    rows = routed_rows()

    def expected():
        total = 0.0
        for row in rows:
            log_s, log_t, at = log_distributions(module, row)
            evidence = (torch.tensor(row.advantage).sign() * (log_t[at] - log_s[at].detach())).exp().clamp(0.8, 1.2)
            advantage = row.advantage * (0.52 + 0.48 * evidence)
            loss = -advantage * (log_s[at] - log_s[at].detach()).exp() * capped(module, row, log_s, at)
            total = total + loss.mean() / len(rows)
        return total

    assert_gradients(module, rows, expected)


def test_a_teacher_that_says_nothing_finite_is_not_taken_for_none():
    module = alone(RLSD)
    with torch.no_grad():
        next(module.teacher.parameters()).fill_(torch.nan)
    assert not math.isfinite(accumulate(module, routed_rows()))


SAMPLED = {"full_logit_distillation": False, "alpha": 1.0}


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (SDPO, {"entry_clip": 0.0}, "`divergence.entry_clip` to be above 0"),
        (SDPO, {"question_weight_exponent": -1.0}, r"`question_weight_exponent` to lie in \[0, 10\]"),
        (
            SDPO,
            {"question_weight_exponent": 0.5, "num_generations": 1},
            "`num_generations` of at least 2 with `question",
        ),
        (SDPO, {"softening": Softening()}, "`divergence.alpha` 1 with `divergence.softening`.* 0.5"),
        (
            SDPO,
            {"softening": Softening(), "alpha": 1.0, "entry_clip": 0.1},
            "no `divergence.entry_clip` with `divergence.soft",
        ),
        (
            SDPO,
            {"softening": Softening(), "alpha": 1.0, "distillation_topk": 5},
            "no `divergence.distillation_topk` with `divergence.s",
        ),
        (SDPO, SAMPLED | {"entry_clip": 0.1}, "no `divergence.entry_clip` with `divergence.full_logit"),
        (SDPO, SAMPLED | {"softening": Softening()}, "no `divergence.softening` with `divergence.full"),
        (SDPO, {"teacher_period": 5}, "no `teacher.period` with the ema teacher"),
        (SRPO, {"num_generations": 1}, "`num_generations` of at least 2"),
        (SRPO, {"clip_ratio_low": 2.0}, r"`policy_gradient.clip_ratio_low` to lie in \[0, 1\]"),
        (RLSD, {"mixing": 1.5}, r"`mixing` to lie in \[0, 1\]"),
        (RLSD, {"evidence_clip": -0.1}, r"`evidence_clip` to lie in \[0, 1\]"),
        (RLSD, {"mixing_steps": 0}, "`mixing_steps` to be at least 1"),
        (RLSD, {"teacher_regularization": "frozen", "teacher_period": 3}, "no `teacher.period` with the frozen"),
    ],
)
def test_contradictory_settings_name_the_field(base, settings, message):
    with pytest.raises(ValueError, match=message):
        build(base, tiny_model(), half_right, tokenizer=TOKENIZER, **(LIMITS | settings))


def test_settings_of_other_modules_are_unknown():
    for base, name in (
        (RLSD, "divergence_alpha"),
        (RLSD, "allocation"),
        (GRPO, "entry_clip"),
        (SDPO, "clip_ratio_low"),
        (SRPO, "question_weight_exponent"),
    ):
        with pytest.raises(TypeError, match=name):
            base(tiny_model(), half_right, **{name: 0.5})


def test_the_signal_of_the_token_weights_is_checked():
    with pytest.raises(ValueError, match=r"`token_weights.signal` to be one of information, teacher-certainty"):
        TokenWeights(signal="student")
