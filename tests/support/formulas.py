"""A step's loss and gradients against a formula, in float64: autograd on the whole logits of one response at a time."""

from dataclasses import replace

import pytest
import torch

from tests.support.helpers import LIMITS, TOKENIZER, accumulate, build, half_right, random_rows, tiny_model


def alone(base, **settings):
    """A module in float64 whose frozen teacher is not the student."""
    settings = {"teacher_regularization": "frozen"} | LIMITS | settings
    module = build(base, tiny_model().double(), half_right, tokenizer=TOKENIZER, **settings)
    module.configure_model()
    with torch.no_grad():
        for p in module.teacher.parameters():
            p.mul_(1.5)
    return module


def log_distributions(module, row):
    """Log-probabilities of student and teacher at the response, ``(L, V)``; the student's in place of a teacher there is not."""
    y = row.rollout.response_ids

    def run(model, prompt):
        return model(torch.tensor([[*prompt, *y]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    log_s = run(module.model, row.rollout.prompt_ids)
    with torch.no_grad():
        log_t = log_s.detach() if row.reprompt_ids is None else run(module.teacher.model, row.reprompt_ids)
    return log_s, log_t, (torch.arange(len(y)), torch.tensor(y))


def assert_gradients(module, rows, expected):
    """Compare loss and gradients of the step with a formula's, for one pass and for many."""
    value = expected()
    theirs = torch.autograd.grad(value, list(module.model.parameters()))
    for budget in (60, 10_000):
        module.learner.update = replace(module.learner.update, micro_batch_tokens=budget)
        module.model.zero_grad()
        assert accumulate(module, rows) == pytest.approx(value.item(), rel=1e-5)
        for p, g in zip(module.model.parameters(), theirs, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-8)
    assert max(g.abs().max() for g in theirs) > 1e-4


def capped(module, row, log_s, at):
    return (log_s[at].detach() - row.rollout.log_probs).exp().clamp(max=module.learner.importance_weight_cap)


def routed_rows():
    rows = random_rows(8)
    for row, advantage in zip(rows, [-0.5, 0.5, -0.5, 0.5, 0.7, -0.3, 0.0, -0.3], strict=True):
        row.advantage = advantage
    for i in (1, 3, 4, 5, 6):  # of these the sixth has no advantage either
        rows[i].reprompt_ids = None
    return rows
