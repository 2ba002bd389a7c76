"""DRIFT: its routes against the formula, difficulty, buffer and stages, and the ends of its settings."""

import random

import pytest
import torch

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.losses.divergence import entropy, generalised_jsd
from pgpo_lightning.modules import DRIFT, GRPO, SDPO
from pgpo_lightning.objectives.configs import DifficultyConfig, RhythmConfig
from pgpo_lightning.objectives.difficulty import PassRates
from pgpo_lightning.objectives.drift import hardest_first, shortest_first
from pgpo_lightning.objectives.gates import Group
from tests.support.formulas import alone, assert_gradients, capped, log_distributions
from tests.support.helpers import (
    GRPO_LIMITS,
    LIMITS,
    TOKENIZER,
    accumulate,
    build,
    half_right,
    prepare,
    random_rows,
    tiny_model,
)
from tests.support.rhythm import one_response

RHYTHM = RhythmConfig(strength=0.8, sensitivity=1.5, maximum=3.0)


def graded(rewards, n=2):
    """Rows of groups of n with these rewards, all of whose responses are finished and have a text of their own."""
    rows = random_rows(len(rewards))
    for i, (row, reward) in enumerate(zip(rows, rewards, strict=True)):
        row.rollout.question = Question("6 * 8?", "48", index=i // n)
        row.rollout.prompt_ids = [7 + i // n] * 5
        row.rollout.text = f"text {i}"
        row.verdict, row.reprompt_ids = Verdict(float(reward)), None
    return rows


def test_drift_is_its_formula():
    """1[wrong] JSD - gamma 1[right] M A ratio, with M from H, l and their teacher's counterparts of whole responses."""
    difficulty = DifficultyConfig(warmup_steps=0, easy_weight=0.5)
    module = alone(DRIFT, num_generations=4, difficulty=difficulty, rhythm=RHYTHM, loss_agg_mode="token-mean")
    module.objective.rates.seen = {2: (1.0, 1)}  # with the group below 0.875: easy
    rows = graded(
        [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 0], n=4
    )  # the last is medium, its success without a teacher
    scalars = prepare(module, rows, random.Random(0))
    assert [scalars[f"drift/{name}"] for name in ("easy", "medium", "hard")] == [0.25, 0.5, 0.25]
    assert scalars["drift/pass_rate"] == pytest.approx((0.5 + 0 + 0.875 + 0.25) / 4)

    def expected():
        total = 0.0
        for i, row in enumerate(rows):
            log_s, log_t, at = log_distributions(module, row)
            if row.verdict.reward == 0:
                if row.reprompt_ids is not None:
                    total = total + (generalised_jsd(log_s, log_t, 0.5) * capped(module, row, log_s, at)).sum()
                continue
            factors = torch.ones(row.length, dtype=torch.float64)
            if i in (0, 1):
                ratio, h_s, h_t = (log_s - log_t)[at], entropy(log_s), entropy(log_t)
                parts = [values.detach().tolist() for values in (ratio, h_s, h_t)]
                factors = torch.tensor(one_response(*parts, **vars(RHYTHM)), dtype=torch.float64)
                assert factors.max() > 1.05
            gamma, advantage = {0: (1.0, 0.5), 1: (1.0, 0.5), 14: (1.0, 0.75)}.get(i, (0.5, 0.25))
            loss = -gamma * factors * advantage * (log_s[at] - log_s[at].detach()).exp()
            total = total + (loss * capped(module, row, log_s, at)).sum()
        return total / sum(row.length for row in rows)

    assert_gradients(module, rows, expected)
    assert [row.reprompt_ids is not None for row in rows] == [
        *(True, True, True, True),  # successes too, for the factors
        *(False,) * 4,  # nothing to show
        *(False, False, False, True),  # easy: successes have no factors
        *(True, True, False, True),  # a success is never shown its own text
    ]
    assert len(module.step_statistics) == 12
    assert module.step_statistics.has_teacher.sum() == 8


def test_successes_on_hard_questions_have_no_weight():
    module = alone(DRIFT, num_generations=8, difficulty=DifficultyConfig(warmup_steps=0))
    rows = graded([1, 0, 0, 0, 0, 0, 0, 0], n=8)
    prepare(module, rows, random.Random(0))
    assert [module.objective.in_loss(row) for row in rows] == [False] + [True] * 7
    assert all(len(route.samples) == n for route, n in zip(module.objective.routes(rows), (7, 0, 0), strict=True))


# ------------------------------------------------------------------------------------------------------ difficulty


def test_the_average_of_the_success_rate():
    rates = PassRates(DifficultyConfig(decay=0.75))
    assert rates.rate(Group(3, 2, 8)) == 0.25  # the first visit
    rates.observe([Group(3, 2, 8)])
    assert rates.rate(Group(3, 8, 8)) == 0.75 * 0.25 + 0.25
    rates.observe([Group(3, 8, 8), Group(4, 0, 8)])
    assert rates.seen == {3: (0.4375, 2), 4: (0.0, 1)}
    assert [rates.difficulty(rate) for rate in (0.0, 0.19, 0.2, 0.8, 0.81, 1.0)] == [
        "hard", "hard", "medium", "medium", "easy", "easy",
    ]  # fmt: skip
    assert [rates.weight(name) for name in ("easy", "medium", "hard")] == [0.5, 1.0, 0.0]
    again = PassRates(DifficultyConfig(decay=0.75))
    again.load_state_dict(rates.state_dict())
    assert again.rate(Group(3, 0, 8)) == rates.rate(Group(3, 0, 8)) == 0.75 * 0.4375


# ----------------------------------------------------------------------------------------------- buffer and stages


def test_a_group_without_success_gets_an_earlier_one_on_a_later_visit():
    module = build(DRIFT, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4,
                   difficulty=DifficultyConfig(warmup_steps=0, hard=0.1), **LIMITS)  # fmt: skip
    module.configure_model()
    first = graded([0, 1, 1, 0], n=4)
    prepare(module, first, random.Random(0))
    assert not any(row.replaced_by for row in first)
    assert len(module.objective.buffer.kept[0]) == 2
    rows = graded([0.2, 0.1, 0.1, 0.3], n=4)
    scalars = prepare(module, rows, random.Random(0))
    assert [row.replaced_by is not None for row in rows] == [False, True, False, False]  # the first of the lowest
    new = rows[1].replaced_by
    assert new.rollout.response_ids == first[2].rollout.response_ids  # the newest
    assert (new.verdict.reward, new.demonstration) == (1.0, True)
    assert new.advantage == pytest.approx(1.0 - (0.2 + 1.0 + 0.1 + 0.3) / 4)  # its reward counts too
    assert scalars["drift/replaced_groups"] == 1
    assert scalars["drift/pass_rate"] == 0.25  # of what was sampled: half of 0.5
    learned = [row.replaced_by or row for row in rows]
    shown = new.rollout.text
    assert all(shown in row.reprompt for row in learned if row is not new)
    assert [module.objective.in_loss(row) for row in learned] == [True] * 4
    accumulate(module, learned)
    assert len(module.step_statistics) == 3  # statistics are of what the student sampled
    unseen = graded([0, 0, 0, 0], n=4)
    for row in unseen:
        row.rollout.question.index = 9
    prepare(module, unseen, random.Random(0))
    assert not any(row.replaced_by for row in unseen)


def test_a_buffered_success_has_the_probabilities_of_now_before_several_updates():
    module = build(DRIFT, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2, updates_per_batch=2,
                   difficulty=DifficultyConfig(warmup_steps=0, hard=0.1), **LIMITS)  # fmt: skip
    module.configure_model()
    prepare(module, graded([1, 0, 1, 0]), random.Random(0))
    rows = graded([0, 0, 1, 0])
    prepare(module, rows, random.Random(0))
    learned = [row.replaced_by or row for row in rows]
    ((_, expected),) = module.learner.log_probs([learned[0]], learned)
    torch.testing.assert_close(learned[0].old_log_probs, expected)
    assert [row.old_log_probs is not None for row in learned] == [True, False, True, False]
    accumulate(module, learned)


def test_without_a_buffer_nothing_is_replaced():
    module = build(DRIFT, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2,
                   difficulty=DifficultyConfig(warmup_steps=0, buffer_size=0), **LIMITS)  # fmt: skip
    module.configure_model()
    for rewards in ([1, 0], [0, 0]):
        rows = graded(rewards)
        prepare(module, rows, random.Random(0))
        assert not any(row.replaced_by for row in rows)
    assert module.objective.state_dict()["buffer"] is None


def success(reward, length, log_prob):
    rollout = Rollout(Question("?", "1"), [1], [5] * length, torch.full((length,), log_prob), "text", True)
    return Sample(rollout, Verdict(reward))


def test_the_stages_choose_their_demonstrations():
    a, b, c, d = success(1.0, 5, -1.0), success(1.0, 2, -0.5), success(0.6, 1, -9.0), success(1.0, 9, -2.0)
    uncertain, short = [a, b, c, d], [a, b, c, d]
    hardest_first(uncertain)
    assert uncertain == [d, a, b, c]
    shortest_first(short)
    assert short == [b, a, d, c]


def test_the_demonstration_depends_on_the_stage():
    module = build(DRIFT, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=3,
                   difficulty=DifficultyConfig(warmup_steps=2), **LIMITS)  # fmt: skip
    module.configure_model()
    for steps, shown in ((0, "text 1"), (1, "text 1"), (2, "text 0")):
        rows = graded([1, 1, 0], n=3)
        rows[0].rollout.response_ids, rows[0].rollout.log_probs = [9, 9], torch.tensor([-1.0, -1.0])
        rows[1].rollout.response_ids, rows[1].rollout.log_probs = [9] * 6, torch.full((6,), -3.0)
        module.steps = steps
        scalars = prepare(module, rows, random.Random(0))
        assert shown in rows[2].reprompt
        assert scalars["drift/warming_up"] == float(steps < 2)


# -------------------------------------------------------------------------------------------------------- the ends


def step(cls, rows, **settings):
    limits = GRPO_LIMITS if cls is GRPO else LIMITS
    module = build(cls, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2, **limits | settings)
    module.configure_model()
    prepare(module, rows, random.Random(0))
    loss = accumulate(module, rows)
    gradients = [p.grad for p in module.model.parameters()]
    assert max(g.abs().max() for g in gradients) > 0
    return loss, gradients, module


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_the_first_stage_is_sdpo_bit_for_bit():
    rewards = [1, 0, 1, 1, 0, 1]  # of two rollouts there is one demonstration to choose
    assert_same(step(DRIFT, graded(rewards)), step(SDPO, graded(rewards)))


def test_successes_without_factors_and_weights_are_grpos_bit_for_bit():
    rewards = [1.0, 0.5, 0.75, 1.0]
    plain = {"difficulty": DifficultyConfig(warmup_steps=0, easy_weight=1.0), "rhythm": RhythmConfig(strength=0.0)}
    assert_same(step(DRIFT, graded(rewards), **plain), step(GRPO, graded(rewards)))
    medium = plain | {"difficulty": DifficultyConfig(warmup_steps=0, easy=1.0)}
    assert_same(step(DRIFT, graded(rewards), **medium), step(GRPO, graded(rewards)))
    factors = {"difficulty": medium["difficulty"], "rhythm": RHYTHM}
    assert not torch.equal(step(DRIFT, graded(rewards), **factors)[1][0], step(GRPO, graded(rewards))[1][0])


def test_state_goes_into_checkpoints_and_back():
    module = build(DRIFT, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2, **LIMITS)
    module.configure_model()
    prepare(module, graded([1, 0, 1, 1]), random.Random(0))
    saved = module.objective.state_dict()
    other = build(DRIFT, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2, **LIMITS).objective
    other.load_state_dict(saved)
    assert other.rates.seen == module.objective.rates.seen == {0: (0.5, 1), 1: (1.0, 1)}
    assert {q: [r for _, r in kept] for q, kept in other.buffer.kept.items()} == {0: [1.0], 1: [1.0, 1.0]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"demonstration_choice": "independent"}, r"`reprompt.demonstration_choice`, .* but got independent"),
        ({"demonstration_source": "none"}, r"`reprompt.demonstration_source` .* none"),
        ({"num_generations": 1}, "`num_generations`"),
    ],
)
def test_settings_that_leave_nothing_to_choose_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(DRIFT, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS | settings)


def test_contradictory_difficulties_are_refused_by_name():
    with pytest.raises(ValueError, match=r"`difficulty.hard` to be at most `difficulty.easy` \(0.3\), but got 0.4"):
        DifficultyConfig(easy=0.3, hard=0.4)
    with pytest.raises(ValueError, match=r"no `difficulty.buffer_after` with `difficulty.buffer_size` 0"):
        DifficultyConfig(buffer_size=0, buffer_after=2)
    with pytest.raises(ValueError, match=r"`rhythm.maximum` to"):
        RhythmConfig(maximum=0.5)
