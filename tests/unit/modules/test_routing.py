"""Routes of SRPO and I-SDPO: who is distilled, who is reinforced, and what the ends of the routing are."""

import random

import pytest
import torch

from pgpo_lightning.losses.divergence import entropy, generalised_jsd
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.modules import GRPO, SDPO, SRPO
from tests.support.formulas import alone, assert_gradients, capped, log_distributions
from tests.support.helpers import LIMITS, TOKENIZER, accumulate, build, half_right, prepare, random_rows, tiny_model


def told_rows(rewards, context="The answer is 5."):
    """Rows of groups of two whose questions tell the teacher something."""
    rows = random_rows(len(rewards))
    for row, reward in zip(rows, rewards, strict=True):
        row.verdict.reward, row.reprompt_ids = float(reward), None
        row.rollout.question.privileged_context = context
    return rows


def grouped(rewards, base=SRPO, **settings):
    module = alone(base, num_generations=2, **settings)
    rows = told_rows(rewards)
    prepare(module, rows, random.Random(0))
    return module, rows


def test_a_group_is_distilled_only_if_all_of_it_failed():
    module, rows = grouped([0, 0, 1, 0, 1, 1], route="group")
    assert [row.reprompt_ids is not None for row in rows] == [True, True, False, False, False, False]
    distilled, reinforced = module.objective.routes(rows)
    assert distilled.samples == rows[:2]
    assert reinforced.samples == rows[2:4]  # the last two have no advantage
    _, rows = grouped([0, 0, 1, 0, 1, 1])
    assert [row.reprompt_ids is not None for row in rows] == [True, True, False, True, False, False]


def test_group_routing_is_its_formula():
    """1[S = 0] w JSD(S, T) + 1[S >= 1] GRPO, w = exp(-H(T)) / mean, over the tokens of all responses (I-SDPO)."""
    certain = TokenWeights("token", 1.0, None, "teacher-certainty")
    module, rows = grouped([0, 0, 1, 0, 1, 1, 0, 0], route="group", loss_agg_mode="token-mean", token_weights=certain)

    def expected():
        made = [(row, *log_distributions(module, row)) for row in rows]
        lost = {0, 1, 6, 7}
        weights = torch.cat([(-entropy(log_t)).exp() for i, (_, _, log_t, _) in enumerate(made) if i in lost])
        total = 0.0
        for i, (row, log_s, log_t, at) in enumerate(made):
            if i in lost:
                loss = (-entropy(log_t)).exp() / weights.mean() * generalised_jsd(log_s, log_t, 0.5)
            else:
                advantage = {2: 0.5, 3: -0.5}.get(i, 0.0)
                loss = -advantage * (log_s[at] - log_s[at].detach()).exp()
            total = total + (loss * capped(module, row, log_s, at)).sum()
        return total / sum(row.length for row in rows)

    assert_gradients(module, rows, expected)
    assert module.step_statistics.has_teacher.sum() == 4


@pytest.mark.parametrize(
    ("rewards", "base"), [([0, 0, 0, 0], SDPO), ([1, 0, 0, 1], GRPO)], ids=["all fail", "none fails"]
)
def test_the_ends_of_group_routing_are_sdpo_and_grpo_bit_for_bit(rewards, base):
    found = []
    for cls, settings in ((SRPO, {"route": "group"}), (base, {})):
        limits = {name: value for name, value in LIMITS.items() if cls is not GRPO or name != "max_reprompt_len"}
        module = build(cls, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2, **limits | settings)
        module.configure_model()
        rows = told_rows(rewards)
        prepare(module, rows, random.Random(0))
        loss = accumulate(module, rows)
        found.append((loss, [p.grad for p in module.model.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert max(g.abs().max() for g in found[0][1]) > 0


def test_group_routing_without_a_context_for_failures_is_refused():
    with pytest.raises(ValueError, match=r"`reprompt.include_environment_feedback` true with `route` group"):
        build(
            SRPO, tiny_model(), half_right, tokenizer=TOKENIZER, route="group", include_environment_feedback=False,
            **LIMITS,
        )  # fmt: skip
    with pytest.raises(ValueError, match="`route` to be one of sample, group"):
        build(SRPO, tiny_model(), half_right, tokenizer=TOKENIZER, route="question", **LIMITS)
