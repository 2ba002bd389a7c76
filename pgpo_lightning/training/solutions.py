"""A held-out score without sampling noise: the probability that the student writes the worked solution of a question."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.rollout.prompts import PromptEncoder

LogProbs = Callable[[list[Sample], list[Sample], float], list[tuple[Sample, Tensor]]]
"""From samples, all samples of this rank and a temperature to samples with the log-probabilities (nats) of their tokens."""


@dataclass(frozen=True)
class WorkedSolutions:
    """Scores questions by the probability of their worked solution and its end token, at temperature 1 without top-p.

    Args:
        column: Name of the column with the solution. Its text is the whole response, thinking included.
        encoder: Encodes prompts as for sampling.
        max_response_length: Longest response in tokens, end token included.
    """

    column: str
    encoder: PromptEncoder
    max_response_length: int

    def check(self, questions: Iterable[Question]) -> None:
        """Check that every question has a solution that the student may write.

        Raises:
            ValueError: If one has none, or one that is too long; names row and field.
        """
        for question in questions:
            self.tokens(question)

    def tokens(self, question: Question) -> list[int]:
        """Return the token ids of the question's solution, end token included.

        Raises:
            ValueError: As :meth:`check`.
        """
        where = question.source or f"question {question.index}"
        text = question.columns.get(self.column)
        if not isinstance(text, str) or not text.strip():
            got = f"{text!r:.80}" if self.column in question.columns else "no such column"
            raise ValueError(
                f"Expected column `{self.column}` of {where} to hold a worked solution as text, because "
                f"`evaluation.solution_column` names it, but got {got}. Mend the row, or set `evaluation.solution_column` to "
                "null."
            )
        ids = [*self.encoder.tokens(text), self.encoder.tokenizer.eos_token_id]
        if len(ids) > self.max_response_length:
            raise ValueError(
                f"Expected the solution in column `{self.column}` of {where} to have at most "
                f"`max_response_length`={self.max_response_length} tokens with its end token, but it has {len(ids)}. Shorten it, "
                "raise `max_response_length`, or set `evaluation.solution_column` to null."
            )
        return ids

    def probabilities(self, questions: list[Question], log_probs: LogProbs) -> list[float]:
        """Return the probability of each question's solution under the student as it is now.

        Args:
            questions: With different `index`.
            log_probs: Computes log-probabilities of responses, such as
                :meth:`~pgpo_lightning.training.learner.Learner.log_probs`.
        """
        samples = []
        for question in questions:
            ids, prompt = self.tokens(question), self.encoder.question(question)
            rollout = Rollout(question, prompt, ids, torch.zeros(len(ids)), question.columns[self.column], True)
            samples.append(Sample(rollout, Verdict(0.0), demonstration=True))
        found = {
            sample.rollout.question.index: math.exp(values.double().sum().item())
            for sample, values in log_probs(samples, samples, 1.0)
        }
        return [found[question.index] for question in questions]
