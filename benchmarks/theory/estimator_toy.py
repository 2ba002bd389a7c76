"""A bank of the toy model's own rollouts with what student and teacher say of every token, computed once."""

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.theory.estimator_views import View, token_statistics
from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.types import Question, Sample
from pgpo_lightning.data.toy import questions
from pgpo_lightning.losses.fused_backward import TokenStatistics
from pgpo_lightning.models.lm_head import source
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rewards import BoxedAnswer
from pgpo_lightning.teachers.configs import RepromptConfig
from pgpo_lightning.training.objective import Preparation

_AT_ONCE = 64  # questions whose logits are held at a time


class Bank(NamedTuple):
    """Rollouts that have a teacher, one question after the other.

    Attributes:
        tokens: View to the statistics of all response tokens, ``(N,)`` each.
        lengths: Tokens of each rollout, ``(sequences,)``.
        question: Number of each rollout's question, ``(sequences,)``.
        questions: Number of questions, those without any such rollout included.
    """

    tokens: dict[View, TokenStatistics]
    lengths: Tensor
    question: Tensor
    questions: int


def toy_module(siblings: int, seed: int) -> SDPO:
    """Return SDPO on the shipped model with the limits of ``configs/quickstart.yaml``, teacher included."""
    limits = {"max_prompt_length": 64, "max_response_length": 32, "reprompt": RepromptConfig(max_reprompt_len=160)}
    module = SDPO("toy", BoxedAnswer(), num_generations=siblings, seed=seed, **limits)
    module.configure_model()
    return module


def toy_bank(number: int, siblings: int, seed: int, looks: list[View]) -> Bank:
    """Sample, judge and show as a training step does, and keep what the estimators need.

    Args:
        number: Number of questions.
        siblings: Rollouts per question.
        seed: Seed of the rollouts.
        looks: What the estimators get to see.
    """
    module = toy_module(siblings, seed)
    asked = questions("train")[:number]
    parts: dict[View, list[TokenStatistics]] = {view: [] for view in looks}
    lengths: list[Tensor] = []
    owners: list[int] = []
    for start in range(0, len(asked), _AT_ONCE):
        rows = rows_with_teacher(module, asked[start : start + _AT_ONCE], start, seed)
        if not rows:
            continue
        with torch.no_grad():
            sequences = module.learner.pack([(row.rollout.prompt_ids, row.rollout.response_ids) for row in rows])
            student, (teacher,) = source(module.model, sequences), module.learner.teacher_sources(rows)
            logits = student.head(student.hidden), teacher.head(teacher.hidden)
        for view in looks:
            parts[view].append(token_statistics(*logits, sequences.targets, view))
        lengths.append(sequences.lengths)
        owners += [row.rollout.question.index for row in rows]
    if not lengths:
        raise ValueError(
            f"Expected rollouts with a teacher, but none of {number} questions has one: raise `questions`."
        )
    tokens = {view: TokenStatistics(*map(torch.cat, zip(*each, strict=True))) for view, each in parts.items()}
    return Bank(tokens, torch.cat(lengths), torch.tensor(owners), len(asked))


def rows_with_teacher(module: SDPO, asked: list[Question], start: int, seed: int) -> list[Sample]:
    """Return the rows that would be in the loss of a step on some questions."""
    with seeded(seed, "estimator", start) as rng:
        rollouts = module.sample(asked, module.num_generations, module.training_sampling)
        rows = [Sample(rollout, verdict) for rollout, verdict in zip(rollouts, module.judge(rollouts), strict=True)]
        module.objective.prepare(rows, Preparation(rng, module.steps, module.learner))
    return [row for row in rows if module.objective.in_loss(row)]
