"""CEPO: the evidence of two teachers against its formula, what they read, and the ends of its settings."""

import math
import random

import pytest
import torch

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.losses.fused import TokenStatistics, linear_statistics
from pgpo_lightning.models.lm_head import source
from pgpo_lightning.modules import CEPO, GRPO, RLSD
from pgpo_lightning.objectives.configs import EvidenceConfig
from pgpo_lightning.teachers.configs import TeacherConfig
from pgpo_lightning.training.mini_batches import TokenInputs
from tests.support.external import LARGER, saved
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


def contrasted_rows():
    """Rows with both prompts, with the right one alone (2, 6), and without a teacher (3); the fifth has no advantage."""
    rows = random_rows(8)
    others = random_rows(8, seed=1)
    for row, other, advantage in zip(rows, others, [-0.5, 0.5, -0.5, 0.5, 0.0, 0.7, -0.3, -0.3], strict=True):
        row.advantage, row.contrast_ids = advantage, other.reprompt_ids
    for i in (2, 3, 6):
        rows[i].contrast_ids = None
    rows[3].reprompt_ids = None
    return rows


def wrong_log_p(module, row, at):
    """Log-probabilities of the response after the prompt with the wrong answer, under the teacher."""
    ids = torch.tensor([[*row.contrast_ids, *row.rollout.response_ids]])
    with torch.no_grad():
        logits = module.teacher.model(ids).logits[0, len(row.contrast_ids) - 1 : -1]
    return logits.log_softmax(-1)[at]


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_cepo_is_grpo_with_advantages_credited_by_the_contrast(mode):
    """A [(1 - lambda) + lambda clip(exp(sign(A) (log T+ - log T-)), 0.5, 1.5)]; without T- RLSD's log T+ - log S."""
    module = alone(CEPO, evidence=EvidenceConfig(mixing=0.8, mixing_steps=10), loss_agg_mode=mode)
    module.objective.current_mixing = module.objective.mixing_at(4)
    assert module.objective.current_mixing == pytest.approx(0.8 * 0.6)
    assert_formula(module, 0.48, mode)


@pytest.mark.parametrize("sizes", [{}, LARGER], ids=["the student's size", "another size"])
def test_another_model_reads_both_answers(tmp_path, sizes):
    """T+ and T- are that model; where there is no wrong answer its evidence is log T - log S, as an own teacher's."""
    teacher = TeacherConfig(model=saved(tmp_path, **sizes))
    module = build(CEPO, tiny_model().double(), half_right, tokenizer=TOKENIZER, teacher=teacher, **LIMITS)
    module.configure_model()
    assert_formula(module.double(), 0.5, "seq-mean-token-mean")
    assert module.teacher.external


def assert_formula(module, mixing, mode):
    rows = contrasted_rows()
    inside = []

    def expected():
        total = 0.0
        for row in rows:
            log_s, log_t, at = log_distributions(module, row)
            delta = torch.zeros(row.length, dtype=torch.float64)
            if row.contrast_ids is not None:
                delta = log_t[at] - wrong_log_p(module, row, at)
            elif row.reprompt_ids is not None:
                delta = log_t[at] - log_s[at].detach()
            factor = (math.copysign(1, row.advantage) * delta).exp()
            inside.append(((factor > 0.5) & (factor < 1.5) & (factor != 1)).sum())
            advantage = row.advantage * (1 - mixing + mixing * factor.clamp(0.5, 1.5))
            loss = -advantage * (log_s[at] - log_s[at].detach()).exp() * capped(module, row, log_s, at)
            total = total + (loss.mean() / len(rows) if mode != "token-mean" else loss.sum())
        return total / (sum(row.length for row in rows) if mode == "token-mean" else 1)

    assert_gradients(module, rows, expected)
    assert sum(inside) > 3  # or every factor would be one of the bounds
    assert module.step_statistics.has_teacher.sum() == 6
    assert module.step_statistics.log_ratio.isfinite().sum() == 6


def test_numbers_by_hand():
    objective = build(CEPO, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS).objective
    nothing = torch.zeros(4)
    # The right answer doubles the probability of the first two tokens, divides that of the third by 1.25, and leaves the last.
    right, wrong = torch.tensor([0.6, 0.6, 0.4, 0.3]).log(), torch.tensor([0.3, 0.3, 0.5, 0.3]).log()
    tokens = TokenStatistics(nothing, torch.full((4,), -1.0), right, nothing, nothing, nothing, nothing)
    advantage = torch.tensor([0.5, -0.5, 0.5, -0.5])
    given = TokenInputs(nothing, nothing, advantage, None, True, contrast=wrong)
    # lambda 0.5: 0.5 (0.5 + 0.5 * 1.5), the factor 2 being clipped; -0.5 (0.5 + 0.5 * 0.5); 0.5 (0.5 + 0.5 * 0.8); -0.5
    expected = torch.tensor([0.625, -0.375, 0.45, -0.5])
    torch.testing.assert_close(-objective.contrasted_loss(tokens, given), expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["frozen", "live", "trust-region", "ema"])
def test_the_second_pass_says_what_the_first_would_say_of_its_prompt(kind, temperature):
    module = alone(CEPO, teacher_regularization=kind, temperature=temperature)
    rows = [row for row in contrasted_rows() if row.contrast_ids is not None]
    found = module.learner.contrast_log_probs(rows)
    for row in rows:
        row.reprompt_ids = row.contrast_ids
    sequences = module.learner.pack([(row.rollout.prompt_ids, row.rollout.response_ids) for row in rows])
    with torch.no_grad():
        teacher = module.learner.teacher_sources(rows)
        student = source(module.model, sequences)
        tokens = linear_statistics(student, teacher, sequences.targets, temperature=temperature)
    torch.testing.assert_close(found, tokens.log_p_teacher, rtol=1e-10, atol=1e-12)
    assert not found.requires_grad


def test_a_teacher_that_stands_still_reads_a_wrong_answer_once_per_batch(monkeypatch):
    for kind, iterations, times in (("frozen", 2, 1), ("live", 2, 2), ("frozen", 1, 2)):
        module = alone(CEPO, teacher_regularization=kind, num_iterations=iterations)
        rows, seen = contrasted_rows(), []
        make = module.teacher.sources
        module.teacher.sources = lambda *given, seen=seen, make=make: (seen.append(1), make(*given))[1]
        assert accumulate(module, rows) == accumulate(module, rows)
        # One route reads two prompts, one a single prompt.
        assert len(seen) == 3 * times


# ------------------------------------------------------------------------------------------------- what they read


def sample(reward, answer=None, text="some text", gold="79", index=0):
    rollout = Rollout(Question("6 * 8 + 31?", gold, index=index), [7, 8], [9, 10], torch.zeros(2), text, True)
    return Sample(rollout, Verdict(reward, answer=answer))


def texts(group, **evidence):
    reprompt = {name: evidence.pop(name) for name in ("dont_reprompt_on_self_success",) if name in evidence}
    module = build(
        CEPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=len(group),
        evidence=EvidenceConfig(**evidence), **LIMITS, **reprompt,
    )  # fmt: skip
    return [module.objective.contrast.texts(each, group) for each in group]


def test_the_answers_that_are_shown():
    group = [sample(1.0, "79"), sample(0.2, "12"), sample(0.1, "13"), sample(0.1, "14")]
    assert texts(group) == [("79", "13")] * 4  # the lowest reward, the first of equals, also to the rollout itself
    assert texts([sample(1.0, "79"), sample(0.5, "80")]) == [("79", None)] * 2  # neither was rejected
    assert texts([sample(1.0), sample(0.0, None, " unread " + "x" * 60)])[0] == ("79", "unread " + "x" * 43)
    assert texts([sample(1.0), sample(0.0, None, " ")])[0] == ("79", None)
    assert texts([sample(1.0, gold=None), sample(0.0, "3", gold=None)])[0][0] is None
    assert texts([sample(1.0, gold=62), sample(0.0, "3", gold=62)])[0] == ("62", "3")


def test_the_responses_that_are_shown():
    group = [sample(0.6, text="fair"), sample(1.0, text="good"), sample(0.3, text="bad"), sample(0.0, text="worst")]
    shown = texts(group, shown="response")
    assert shown == [("good", "worst"), ("fair", "worst"), ("good", "worst"), ("good", "bad")]  # never its own
    shown = texts(group, shown="response", dont_reprompt_on_self_success=False)
    assert shown == [("good", "worst")] * 4
    assert texts([sample(0.0, text="a"), sample(0.0, text="b")], shown="response") == [("79", "b"), ("79", "a")]
    assert texts([sample(1.0, text="a"), sample(0.0, text="b")], shown="response") == [("79", "b"), ("a", None)]


def test_the_two_prompts_differ_by_the_answer_alone():
    module = build(CEPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2, **LIMITS)
    module.configure_model()
    rows = [sample(1.0, "79"), sample(0.0, "12"), sample(1.0, "79", index=1), sample(0.8, "79", index=1)]
    scalars = prepare(module, rows, random.Random(0))
    for row in rows:
        assert "Correct solution:\n\n79\n" in row.reprompt
        assert row.reprompt in TOKENIZER.decode(row.reprompt_ids)
    for row in rows[:2]:
        assert TOKENIZER.decode(row.contrast_ids) == TOKENIZER.decode(row.reprompt_ids).replace("79", "12")
    assert [row.contrast_ids for row in rows[2:]] == [None, None]
    assert scalars["self_distillation/contrasted_fraction"] == 0.5
    assert scalars["self_distillation/reprompt_sample_fraction"] == 1.0
    assert scalars["self_distillation/reprompt_trimmed_fraction"] == 0.0
    assert scalars["critic/advantages/mixing"] == 0.5


# ------------------------------------------------------------------------------------------------------- the ends


def step(cls, rows, steps=0, prepared=None, **settings):
    """Loss and gradients of a step of float32 weights after so many batches."""
    limits = GRPO_LIMITS if cls is GRPO else LIMITS
    module = build(cls, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=2, **limits | settings)
    module.configure_model()
    module.steps = steps
    for row in rows:
        row.reprompt_ids = row.contrast_ids = None
    prepare(module, rows, random.Random(0))
    if prepared is not None:
        prepared(rows)
    loss = accumulate(module, rows)
    gradients = [p.grad for p in module.model.parameters()]
    assert max(g.abs().max() for g in gradients) > 0
    return loss, gradients, module


def graded_rows(rewards):
    """Rows with prompts of one length, so that a teacher does not change their order in a pass, and with it the rounding."""
    rows = random_rows(len(rewards))
    for row, reward in zip(rows, rewards, strict=True):
        row.rollout.prompt_ids = [7 + row.rollout.question.index] * 5
        row.verdict = Verdict(reward, answer=str(reward))
    return rows


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_without_evidence_cepo_is_grpo_bit_for_bit():
    rows = graded_rows([1.0, 0.0, 1.0, 0.0])
    annealed = step(CEPO, rows, steps=25)
    assert annealed[2].objective.current_mixing == 0
    assert all(row.contrast_ids is None and row.reprompt_ids is not None for row in rows)  # it reads for the log alone
    assert_same(annealed, step(GRPO, rows))
    started = step(CEPO, rows)
    assert not torch.equal(started[1][0], annealed[1][0])


def test_where_nothing_was_rejected_the_codes_rule_is_grpo_and_the_papers_is_rlsd():
    rows = graded_rows([1.0, 0.75, 0.5, 0.75])
    code = step(CEPO, rows, evidence=EvidenceConfig(without_wrong_answer="grpo"))
    assert all(row.reprompt_ids is None for row in rows)
    assert not code[2].step_statistics.has_teacher.any()
    assert_same(code, step(GRPO, rows))
    paper = step(CEPO, rows)
    reprompts = [row.reprompt_ids for row in rows]

    def same_prompts(rows):
        for row, ids in zip(rows, reprompts, strict=True):
            row.reprompt_ids = ids

    assert_same(paper, step(RLSD, rows, prepared=same_prompts, evidence_clip=0.5, teacher_regularization="live"))
    assert not torch.equal(paper[1][0], code[1][0])


def test_the_weight_falls_to_zero_in_25_batches():
    objective = build(CEPO, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS).objective
    assert [objective.mixing_at(step) for step in (0, 5, 20, 25, 60)] == pytest.approx([0.5, 0.4, 0.1, 0.0, 0.0])
    objective.mixing_steps = None
    assert objective.mixing_at(60) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include_environment_feedback": False}, "no `reprompt.include_environment_feedback` with `evidence.shown` answer"),
        ({"remove_thinking_from_demonstration": False}, "no `reprompt.remove_thinking_from_demonstration` with"),
        ({"demonstration_choice": "independent"}, "no `reprompt.demonstration_choice` with `evidence.shown` answer"),
        ({"num_generations": 1}, "`num_generations`"),
    ],
)  # fmt: skip
def test_settings_that_cepo_does_not_read_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        build(CEPO, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS | settings)


def test_odd_evidence_is_refused_by_name():
    for name, value in (("mixing", 1.5), ("mixing_steps", 0), ("clip", -0.1), ("shown", "text")):
        with pytest.raises(ValueError, match=rf"`evidence.{name}` to "):
            EvidenceConfig(**{name: value})
    with pytest.raises(ValueError, match=r"`evidence.without_wrong_answer` to be one of rlsd, grpo"):
        EvidenceConfig(without_wrong_answer="none")


def test_questions_without_any_answer_are_refused():
    objective = build(CEPO, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS).objective
    objective.check_questions([Question("?", None), Question("?", "3")])
    with pytest.raises(ValueError, match="training questions with an `answer`"):
        objective.check_questions([Question("?", None), Question("?", " ")])


def test_tokens_without_a_second_log_probability_are_refused():
    objective = build(CEPO, tiny_model(), half_right, tokenizer=TOKENIZER, **LIMITS).objective
    nothing = torch.zeros(1)
    with pytest.raises(ValueError, match="`contrast` of the tokens"):
        objective.contrasted_loss(
            TokenStatistics(*[nothing] * 7), TokenInputs(nothing, nothing, nothing, None, taught=True)
        )
