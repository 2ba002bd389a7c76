"""OPD and TGPO against their formulas, with a teacher of another size, and at the ends of their settings."""

import random

import pytest
import torch

from pgpo_lightning.losses.divergence import (
    forward_kl,
    generalised_jsd,
    greedy_cross_entropy,
    reverse_kl,
    sampled_token,
    student_top_k,
)
from pgpo_lightning.losses.fused import Head, Source, TokenStatistics, linear_distillation
from pgpo_lightning.modules import GRPO, OPD, TGPO
from pgpo_lightning.objectives.guided import GuidedPolicyGradient
from pgpo_lightning.teachers.configs import TeacherConfig
from pgpo_lightning.training.mini_batches import TokenInputs
from tests.support.external import LARGER, saved
from tests.support.formulas import assert_gradients, capped, log_distributions
from tests.support.helpers import (
    GRPO_LIMITS,
    LIMITS,
    TOKENIZER,
    accumulate,
    build,
    half_right,
    loader,
    prepare,
    questions,
    random_rows,
    tiny_model,
    trainer,
)


def made(cls, folder, **settings):
    """A module in float64 whose teacher is the model of a folder."""
    limits = LIMITS if "reprompt" in settings or "max_reprompt_len" in settings else GRPO_LIMITS
    teacher = {} if folder is None else {"teacher": TeacherConfig(model=str(folder))}
    module = build(cls, tiny_model().double(), half_right, tokenizer=TOKENIZER, **teacher, **limits | settings)
    module.configure_model()
    return module.double()


def asked(module, n=8):
    """Rows with the prompts of real questions, prepared by the objective; every third has a reward."""
    rows = random_rows(n, with_reprompt=False)
    for i, row in enumerate(rows):
        row.rollout.question = questions(2)[i // 4]
        row.rollout.prompt_ids = module.encoder.question(row.rollout.question)
        row.verdict.reward = float(i in (0, 3))
    scalars = prepare(module, rows, random.Random(0))
    return rows, scalars


KINDS = {
    "reverse": ({}, lambda s, t, y: reverse_kl(s, t)),
    "forward": ({"divergence_alpha": 0.0}, lambda s, t, y: forward_kl(s, t)),
    "jsd": ({"divergence_alpha": 0.5}, lambda s, t, y: generalised_jsd(s, t, 0.5)),
    "top-k": ({"divergence_alpha": 1.0, "distillation_topk": 9},
              lambda s, t, y: reverse_kl(*student_top_k(s, t, 9, True))),
    "sampled": ({"divergence_alpha": 1.0, "full_logit_distillation": False}, sampled_token),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_opd_pulls_every_response_towards_the_other_model(tmp_path, kind):
    settings, formula = KINDS[kind]
    module = made(OPD, saved(tmp_path, **LARGER), num_generations=4, **settings)
    rows, scalars = asked(module)
    assert [row.reprompt_ids for row in rows] == [row.rollout.prompt_ids for row in rows]
    assert all(module.objective.in_loss(row) for row in rows)
    assert scalars["self_distillation/reprompt_sample_fraction"] == 1

    def expected():
        total = 0.0
        for row in rows:
            log_s, log_t, at = log_distributions(module, row)
            total = total + (formula(log_s, log_t, at[1]) * capped(module, row, log_s, at)).mean() / len(rows)
        return total

    assert_gradients(module, rows, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_opd_from_the_student_itself_has_no_gradient(tmp_path, kind):
    tiny_model().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    module = made(OPD, tmp_path, num_generations=4, **KINDS[kind][0])
    rows, _ = asked(module)
    assert accumulate(module, rows) == 0.0
    assert max(p.grad.abs().max() for p in module.model.parameters()) < 1e-12
    with torch.no_grad():
        for p in module.model.parameters():
            p.mul_(1.1)
    accumulate(module, rows)
    assert max(p.grad.abs().max() for p in module.model.parameters()) > 1e-4


@pytest.mark.parametrize("step", [0, 150, 200])
def test_tgpo_adds_the_teachers_likeliest_tokens(tmp_path, step):
    module = made(TGPO, saved(tmp_path, **LARGER), num_generations=4, guidance=0.2)
    module.steps = step
    rows, scalars = asked(module)
    weight = {0: 0.2, 150: 0.05, 200: 0.0}[step]
    assert scalars["self_distillation/guidance"] == pytest.approx(weight, abs=1e-12)
    assert [row.advantage for row in rows] == pytest.approx([0.5, -0.5, -0.5, 0.5] + [0.0] * 4)
    assert sum(module.objective.in_loss(row) for row in rows) == (8 if weight else 4)
    assert all((row.reprompt_ids == row.rollout.prompt_ids) == (weight > 0) for row in rows)
    if weight:
        rows[1].reprompt_ids = rows[5].reprompt_ids = None  # as where a self-teacher has no context

    def expected():
        total = 0.0
        for row in rows:
            log_s, log_t, at = log_distributions(module, row)
            loss = -row.advantage * (log_s[at] - log_s[at].detach()).exp()
            if row.reprompt_ids is not None:
                loss = loss + weight * greedy_cross_entropy(log_s, log_t)
            total = total + (loss * capped(module, row, log_s, at)).mean() / len(rows)
        return total

    assert_gradients(module, rows, expected)
    assert len(module.step_statistics) == (7 if weight else 4)


def test_the_likeliest_token_by_hand():
    """S = (.5, .3, .2) and T = (.1, .2, .7): the loss is -log .2, and its gradient in the logits (.5, .3, .2 - 1)."""
    log_s = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    log_t = torch.tensor([[0.1, 0.2, 0.7]], dtype=torch.float64).log()
    assert greedy_cross_entropy(log_s, log_t).item() == pytest.approx(1.6094379124)
    eye = torch.eye(3, dtype=torch.float64)
    hidden = log_s.clone().requires_grad_()
    which = GuidedPolicyGradient.divergence
    for compiled in (False, None):
        loss, tokens = linear_distillation(Source(hidden, Head(eye)), [Source(log_t, Head(eye))], torch.tensor([0]),
                                           lambda t, _: t.divergence, which, compiled=compiled)  # fmt: skip
        assert loss.item() == tokens.plain.item() == pytest.approx(1.6094379124)
        (gradient,) = torch.autograd.grad(loss, hidden)
        torch.testing.assert_close(gradient, torch.tensor([[0.5, 0.3, -0.8]], dtype=torch.float64))


def test_the_weight_of_the_paper_by_hand():
    """w_0 = .002 falls by .00001 a step: .0015 after 50, nothing from 200 on. With A = .5, ratio 1 and -log S = 2: -.5 + .003."""
    objective = GuidedPolicyGradient(None)
    assert [objective.guidance_at(step) for step in (0, 50, 199, 200, 300)] == pytest.approx([2e-3, 1.5e-3, 1e-5, 0, 0])
    assert GuidedPolicyGradient(None, 0.3, None).guidance_at(10**6) == 0.3
    objective.current_guidance = objective.guidance_at(50)
    one = torch.tensor([-1.0])
    tokens = TokenStatistics(
        *(torch.tensor([2.0]) if name == "divergence" else one for name in TokenStatistics._fields)
    )
    row = random_rows(1)[0]
    row.rollout.response_ids, row.rollout.log_probs, row.advantage = [7], one, 0.5
    given = TokenInputs.from_samples([row], torch.tensor([1]), 1.0, by_sequence=True)
    assert objective.guided_loss(tokens, given).item() == pytest.approx(-0.5 + 0.003)


@pytest.mark.parametrize("settings", [{"guidance": 0.0}, {"guidance": 0.5, "guidance_steps": 3}], ids=str)
@pytest.mark.parametrize("passes", [1, 2])
def test_without_guidance_a_run_is_grpo_bit_for_bit(tmp_path, settings, passes):
    folder, found = saved(tmp_path / "teacher", **LARGER), []
    for cls, given in ((GRPO, {}), (TGPO, {"teacher": TeacherConfig(model=folder)} | settings)):
        module = build(cls, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, num_iterations=passes,
                       optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), **given, **GRPO_LIMITS)  # fmt: skip
        module.steps = 3
        trainer(tmp_path, max_steps=2 * passes).fit(module, loader(questions(4)))
        assert module.steps == 5
        found.append(torch.cat([p.detach().flatten() for p in module.model.parameters()]))
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.cat([p.detach().flatten() for p in tiny_model().parameters()]))


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (OPD, {}, "`teacher.model` to be the folder or Hub id of the teacher, but got none"),
        (OPD, {"teacher": TeacherConfig("frozen")}, "`teacher.model` to be the folder or Hub id"),
        (TGPO, {}, "`teacher.model` or `reprompt`, because a teacher made of the student"),
        (TGPO, {"teacher": TeacherConfig(model="toy"), "guidance": -1.0}, "`guidance` to be at least 0"),
        (TGPO, {"teacher": TeacherConfig(model="toy"), "guidance_steps": 0}, "`guidance_steps` to be at least 1"),
        (TGPO, {"teacher": TeacherConfig(model="toy"), "num_generations": 1}, "`num_generations` of at least 2"),
    ],
)
def test_settings_without_a_meaning_are_refused(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        build(cls, tiny_model(), half_right, tokenizer=TOKENIZER, **GRPO_LIMITS, **settings)
