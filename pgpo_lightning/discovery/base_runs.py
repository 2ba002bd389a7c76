"""Attempts of the base model, whose weights stay as they are: best-of-k and the multi-turn methods."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from pgpo_lightning.core.errors import UserError
from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.types import Question, Rollout, Sample
from pgpo_lightning.discovery.attempts import Attempt, AttemptsFile, batch_of
from pgpo_lightning.discovery.conversation import feedback_turn, newest_that_fit, turns
from pgpo_lightning.discovery.methods import Kind
from pgpo_lightning.modules.on_policy import OnPolicyModule


class BaseRuns:
    """Makes attempts with the module's own engine, encoder, verifier and templates.

    Args:
        module: With its model loaded, on its device.
        size: Attempts per batch of best-of-k. Multi-turn has one.
        conversation_tokens: Longest prompt of the multi-turn methods; null for `reprompt.max_reprompt_len`.

    Raises:
        ValueError: If the module has no self-teacher, whose templates the multi-turn methods use.
    """

    def __init__(self, module: OnPolicyModule, size: int, conversation_tokens: int | None = None) -> None:
        teaching = module.objective.teaching
        if teaching is None:
            raise ValueError(
                f"Expected `model` to be a module with a self-teacher, such as SDPO, but got {type(module).__name__}."
            )
        self.module, self.size, self.builder = module, size, teaching.builder
        self.limit = conversation_tokens or self.builder.max_reprompt_len

    def run(self, kind: Kind, question: Question, seed: int, file: AttemptsFile, budget: int, stop: bool) -> None:
        """Make the attempts that are missing.

        The random numbers of a batch are a function of seed and position. Best-of-k draws what a run that trains draws before its
        weights have moved.

        Args:
            kind: Of the method.
            question: What is asked.
            seed: Of the run.
            file: Gets the attempts, and has those that were made.
            budget: Most attempts.
            stop: End with the first success.

        Raises:
            ValueError: If a failed attempt has no feedback to go on with.
        """
        attempts = file.repair()
        left_out = 0
        while len(attempts) < budget and not (stop and any(attempt.success for attempt in attempts)):
            start, batch = time.perf_counter(), len(attempts) // file.size
            if kind == "best-of-k":
                with torch.no_grad(), seeded(seed, "train", batch, 0):
                    rollouts = self.module.sample([question], self.size, self.module.training_sampling)
            else:
                _check_feedback(attempts, question)
                ids, left_out = self._prompt(kind, question, attempts, left_out)
                with torch.no_grad(), seeded(seed, "discover", batch):
                    rollouts = self._answer(question, ids)
            verdicts = self.module.judge(rollouts)
            samples = [Sample(rollout, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]
            threshold = self.module.reward.success_threshold
            made = batch_of(samples, threshold, batch, time.perf_counter() - start, 0.0)
            file.append(made)
            attempts += made

    def _prompt(
        self, kind: Kind, question: Question, attempts: Sequence[Attempt], left_out: int
    ) -> tuple[list[int], int]:
        render = partial(feedback_turn if kind == "feedback" else turns, question, builder=self.builder)
        given: dict[str, Any] = {} if question.tools is None else {"tools": question.tools}
        return newest_that_fit(attempts, render, self.module.encoder.messages, self.limit, left_out, **given)

    def _answer(self, question: Question, ids: list[int]) -> list[Rollout]:
        module = self.module
        with module.actor.weights_ready(module.model, module.placement):
            return module.actor.generate(module.model, [question], [ids], 1, module.training_sampling)


def _check_feedback(attempts: Sequence[Attempt], question: Question) -> None:
    """Raise if the last attempt failed and says nothing that the next one could use."""
    if attempts and not attempts[-1].success and not (attempts[-1].feedback or "").strip():
        raise no_feedback("a multi-turn method", question)


def no_feedback(who: str, question: Question) -> UserError:
    """Return the error of a method that needs feedback where the verifier gives none."""
    return UserError(
        f"Expected `verifier` to give feedback on failed attempts, which {who} needs, but an attempt at question "
        f"{question.index} of {question.source or 'an unnamed source'} has none. Set its option for feedback, such as "
        "`model.init_args.verifier.init_args.feedback` of BoxedAnswer, or leave the method out."
    )
