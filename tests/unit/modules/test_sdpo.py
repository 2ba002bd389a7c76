"""SDPO's step against a plain re-computation, and its invariances."""

import pytest
import torch

from pgpo_lightning.losses.divergence import divergence, entropy, sampled_token, student_top_k
from pgpo_lightning.losses.information import information
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.modules import SDPO
from pgpo_lightning.training.configs import MismatchConfig
from tests.support.helpers import (
    LIMITS,
    TOKENIZER,
    accumulate,
    build,
    half_right,
    random_rows,
    tiny_model,
    tiny_sdpo,
)


def detached(rows_seed=0, **settings):
    module = tiny_sdpo(**settings)
    with torch.no_grad():  # a teacher that is not the student
        for p in module.teacher.parameters():
            p.mul_(1.5)
    return module


def plain_loss(module, rows, denominator, cap=2.0):
    """SDPO's formula, one row at a time, from the models' own logits."""
    total = 0.0
    for row in rows:
        if row.reprompt_ids is None:
            continue
        y = torch.tensor(row.rollout.response_ids)
        ids = lambda prompt, y=y: torch.tensor([[*prompt, *y.tolist()]])  # noqa: E731
        log_s = (
            module.model(ids(row.rollout.prompt_ids)).logits[0, len(row.rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        )
        with torch.no_grad():
            log_t = (
                module.teacher.model(ids(row.reprompt_ids)).logits[0, len(row.reprompt_ids) - 1 : -1].log_softmax(-1)
            )
        log_s_y = log_s[torch.arange(len(y)), y]
        if not module.objective.full_logits:
            d = sampled_token(log_s, log_t, y)
        else:
            a, b = log_s, log_t
            if module.objective.divergence.top_k is not None:
                a, b = student_top_k(a, b, module.objective.divergence.top_k, module.objective.divergence.add_tail)
            d = divergence(a, b, module.objective.divergence.alpha)
        weight = (log_s_y.detach() - row.rollout.log_probs).exp().clamp(max=cap) if cap else 1.0
        if denominator == "tokens":
            total = total + (d * weight).sum() / sum(r.length for r in rows if r.reprompt_ids is not None)
        else:
            total = total + (d * weight).mean() / len(rows)
    return total


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


CASES = [
    {},
    {"divergence_alpha": 0.0},
    {"alpha": 1.0},
    {"divergence_alpha": 0.1},
    {"distillation_topk": 5},
    {"distillation_topk": 5, "distillation_add_tail": False},
    {"divergence_alpha": 1.0, "full_logit_distillation": False},
    {"loss_agg_mode": "token-mean"},
    {"is_clip": None},
    {"is_clip": 0.7},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_loss_and_gradient_equal_the_formula(settings):
    module = detached(**settings)
    rows = random_rows(6)
    rows[1].reprompt_ids = None  # a masked row stays in the denominator
    loss = accumulate(module, rows)
    ours = gradients(module.model)
    module.model.zero_grad()
    tokens = "tokens" if settings.get("loss_agg_mode") == "token-mean" else "rows"
    plain = plain_loss(module, rows, tokens, settings.get("is_clip", 2.0))
    plain.backward()
    assert loss == pytest.approx(plain.item(), rel=1e-5)
    for a, b in zip(ours, gradients(module.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert max(g.abs().max() for g in ours) > 2e-4


@pytest.mark.parametrize("loss_agg_mode", ["seq-mean-token-mean", "token-mean"])
def test_micro_batches_do_not_change_anything(loss_agg_mode):
    results = []
    for budget in (1, 150, 10_000):
        module = detached(micro_batch_tokens=budget, loss_agg_mode=loss_agg_mode)
        rows = random_rows(8)
        loss = accumulate(module, rows)
        results.append((loss, gradients(module.model), information(module.step_statistics)))
    for loss, grads, signal in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert signal.value == pytest.approx(results[0][2].value, abs=1e-6)
        assert signal.standard_error == pytest.approx(results[0][2].standard_error, abs=1e-6)
        for a, b in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_masked_rows_cost_no_forward_pass():
    module = detached()
    rows = random_rows(6)
    for row in rows[:4]:
        row.reprompt_ids = None
    seen = []
    for model in (module.model, module.teacher.model):
        model.get_decoder().register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["input_ids"].size(0)), with_kwargs=True
        )
    accumulate(module, rows)
    assert sum(seen) == 2 * 2
    assert len(module.step_statistics) == 2


def test_no_row_with_a_teacher_gives_zero_gradients_and_no_information():
    module = detached()
    rows = random_rows(4, with_reprompt=False)
    assert accumulate(module, rows) == 0.0
    assert all((g == 0).all() for g in gradients(module.model))
    assert information(module.step_statistics).value == 0.0


def test_statistics_are_those_of_the_sequences():
    module = detached()
    rows = random_rows(3)
    accumulate(module, rows)
    got = module.step_statistics
    order = [(got.length == row.length).nonzero()[0, 0].item() for row in rows]
    assert len(set(order)) == 3, "the example needs rows of different lengths"
    for row, i in zip(rows, order, strict=True):
        y = row.rollout.response_ids
        with torch.no_grad():
            log_s = module.model(torch.tensor([[*row.rollout.prompt_ids, *y]])).logits[
                0, len(row.rollout.prompt_ids) - 1 : -1
            ]
            log_t = module.teacher.model(torch.tensor([[*row.reprompt_ids, *y]])).logits[
                0, len(row.reprompt_ids) - 1 : -1
            ]
        log_s, log_t = log_s.log_softmax(-1), log_t.log_softmax(-1)
        at_y = (torch.arange(len(y)), torch.tensor(y))
        assert got.entropy_student[i].item() == pytest.approx(entropy(log_s).mean().item(), abs=1e-5)
        assert got.entropy_teacher[i].item() == pytest.approx(entropy(log_t).mean().item(), abs=1e-5)
        assert got.log_ratio[i].item() == pytest.approx((log_t - log_s)[at_y].mean().item(), abs=1e-5)
        expected = (log_s[at_y] - row.rollout.log_probs).mean().item()
        assert got.sampler_log_ratio[i].item() == pytest.approx(expected, abs=1e-5)
        assert got.reward[i].item() == row.verdict.reward


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"demonstration_choice": "best"}, "`reprompt.demonstration_choice` to be one of"),
        ({"divergence_alpha": 1.2}, r"`divergence.alpha` to lie in \[0, 1\], but got 1.2"),
        ({"full_logit_distillation": False}, "`divergence.alpha` 1 with `divergence.full_logit_distillation` false"),
        ({"full_logit_distillation": False, "alpha": 1.0, "distillation_topk": 5}, "no `divergence.distillation_topk`"),
        ({"distillation_add_tail": True}, "`divergence.distillation_topk` with `divergence.distillation_add_tail`"),
        ({"distillation_topk": 0}, "`divergence.distillation_topk` to be at least 1"),
        ({"teacher_regularization": "emma"}, "`teacher.regularization` to be one of"),
        ({"teacher_update_rate": 2.0}, "`teacher.update_rate` to lie in"),
        ({"max_reprompt_len": 64}, "`reprompt.max_reprompt_len` to exceed `max_prompt_length`"),
        (
            {"reprompt_template": "{prompt}{solution}"},
            r"`reprompt.reprompt_template` to contain the placeholder \{feedback\}",
        ),
        ({"num_generations": 0}, "`num_generations` to be at least 1"),
        (
            {"num_generations": 1, "include_environment_feedback": False},
            "`num_generations` to be at least 2 without `reprompt.include_environment_feedback`, but got 1",
        ),
        ({"temperature": 0.0}, r"`temperature` to lie in \[0.0001, 100\]"),
        ({"eval_top_p": 1.5}, r"`evaluation.top_p` to lie in \[0.001, 1\]"),
        ({"loss_agg_mode": "mean"}, "`update.loss_agg_mode` to be one of"),
        ({"on_verifier_error": "ignore"}, "`reward.on_error` to be one of"),
        ({"max_skipped_steps": -1}, "`update.max_skipped_steps` to be at least 0"),
        ({"is_clip": 0.0}, "`mismatch.importance_weight_cap` to be above 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_name_the_field(settings, message):
    with pytest.raises(ValueError, match=message):
        build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, **(LIMITS | settings))


def test_an_alias_stands_for_its_field_and_is_not_given_beside_it():
    assert MismatchConfig(is_clip=0.7) == MismatchConfig(importance_weight_cap=0.7)
    with pytest.raises(ValueError, match=r"only one of `mismatch.importance_weight_cap` and `mismatch.is_clip`"):
        MismatchConfig(importance_weight_cap=3.0, is_clip=0.7)


def test_a_setting_that_stands_in_a_group_says_where():
    with pytest.raises(ValueError, match=r"Expected `teacher.update_rate`, where `teacher_update_rate` stands now"):
        SDPO(tiny_model(), half_right, teacher_update_rate=0.1)


@pytest.mark.parametrize("budget", [150, 10_000])
@pytest.mark.parametrize("loss_agg_mode", ["seq-mean-token-mean", "token-mean"])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_information_weights_share_out_the_step(unit, loss_agg_mode, budget):
    allocation = TokenWeights(unit, sensitivity=0.5, maximum=2.0)
    module = detached(allocation=allocation, loss_agg_mode=loss_agg_mode, micro_batch_tokens=budget)
    module.scalars = {}
    rows = random_rows(6)
    rows[1].reprompt_ids = None
    loss = accumulate(module, rows)
    ours = gradients(module.model)
    module.model.zero_grad()
    losses, weights, coefficients = [], [], []
    active = [row for row in rows if row.reprompt_ids is not None]
    for row in active:
        y = torch.tensor(row.rollout.response_ids)

        def log_p(model, prompt, y=y):
            logits = model(torch.tensor([[*prompt, *y.tolist()]])).logits[0, len(prompt) - 1 : -1]
            return logits.log_softmax(-1)

        log_s, log_t = (
            log_p(module.model, row.rollout.prompt_ids),
            log_p(module.teacher.model, row.reprompt_ids).detach(),
        )
        gain = (entropy(log_s) - entropy(log_t)).detach()
        gain = gain.mean().expand(len(y)) if unit == "sequence" else gain
        weights.append((0.5 * gain).exp().clamp(0.5, 2.0))
        ratio = (log_s[torch.arange(len(y)), y].detach() - row.rollout.log_probs).exp().clamp(max=2.0)
        losses.append(divergence(log_s, log_t, 0.5) * ratio)
        by_token = loss_agg_mode == "token-mean"
        scale = 1 / sum(r.length for r in active) if by_token else 1 / len(y) / len(rows)
        coefficients.append(torch.full((len(y),), scale))
    losses, weights, coefficients = (torch.cat(parts) for parts in (losses, weights, coefficients))
    assert weights.std() > 0.005
    mean = (weights * coefficients).sum() / coefficients.sum()
    expected = (losses * weights / mean * coefficients).sum()
    expected.backward()
    assert module.scalars["information/allocation_mean"] == pytest.approx(mean.item(), rel=1e-5)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(ours, gradients(module.model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_information_weights_of_no_sensitivity_change_nothing():
    results = []
    for allocation in (None, TokenWeights("token", 0.0), TokenWeights("sequence", 0.0)):
        module = detached(allocation=allocation)
        module.scalars = {}
        results.append([accumulate(module, random_rows(6)), *gradients(module.model)])
    for other in results[1:]:
        assert other[0] == pytest.approx(results[0][0], rel=1e-6)
        for a, b in zip(other[1:], results[0][1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


def test_settings_of_the_token_weights_are_checked():
    with pytest.raises(ValueError, match=r"`token_weights.unit` to be one of token, sequence, but got 'row'"):
        TokenWeights("row")
    with pytest.raises(ValueError, match=r"`token_weights.maximum` to be at least 1"):
        TokenWeights(maximum=0.5)


def test_a_model_that_came_as_an_object_is_saved_once():
    module = tiny_sdpo(teacher_regularization="live")
    assert {name.split(".")[0] for name in module.state_dict()} == {"model"}
