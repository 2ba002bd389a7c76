"""Sampling and judging, which training and evaluation share: the student answers, the verifier judges."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.core.seeding import generators_kept
from pgpo_lightning.core.types import Question, Rollout, Verdict
from pgpo_lightning.distributed.collectives import gather, together
from pgpo_lightning.distributed.fsdp import Placement, Replicated
from pgpo_lightning.distributed.stopping import SIGNALS
from pgpo_lightning.rewards.batches import Graded, check_workers, graded
from pgpo_lightning.rewards.early_grading import EarlyGrading, early_grading, grades_early
from pgpo_lightning.rewards.grade import Verifier, check_question
from pgpo_lightning.rollout.checks import check_rollouts
from pgpo_lightning.rollout.engine import Engine, NotFiniteError, Sampling
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.training.base_answers import BaseAnswers
from pgpo_lightning.training.configs import RewardConfig


class Actor:
    """Samples responses and has them judged.

    Args:
        engine: Samples responses.
        verifier: Judges them.
        tokenizer: The student's.
        encoder: Encodes prompts.
        max_prompt_length: Longest prompt in tokens.
        reward: How the verifier is called, and what happens when it fails.

    Raises:
        ValueError: If `reward.workers` or `reward.while_sampling` would have no effect.
    """

    def __init__(
        self,
        engine: Engine,
        verifier: Verifier,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
        max_prompt_length: int,
        reward: RewardConfig,
    ) -> None:
        check_workers(verifier, reward.workers)
        self._grades_early = grades_early(verifier, reward.workers, reward.while_sampling, engine)
        self._early: EarlyGrading | None = None
        self.engine, self.verifier = engine, verifier
        self.tokenizer, self.encoder = tokenizer, encoder
        self.max_prompt_length = max_prompt_length
        self.reward = reward
        self.base_answers: BaseAnswers | None = None
        self.verifier_errors = 0
        """Responses that the verifier failed on, of all ranks and up to the last step or evaluation."""
        self._new_verifier_errors = 0  # of this rank, since then
        self._step = 0  # of the last rollouts
        self.seconds: dict[str, float] = {}
        """Seconds of the last step that its phases do not show, by the names of their curves."""

    @contextmanager
    def grading_while_sampling(self) -> Iterator[None]:
        """Context in which responses are graded while :meth:`sample` is still sampling others, where that is wanted.

        What is sampled in it has to be judged in it.
        """
        if not self._grades_early:
            yield
            return
        try:
            with early_grading(self.verifier, self.reward.workers) as self._early:
                yield
                self.seconds = {"timing_s/reward_total": self._early.seconds}
        finally:
            self._early = None

    def sample(
        self,
        model: PreTrainedModel,
        questions: list[Question],
        n: int,
        sampling: Sampling,
        placement: Placement | None = None,
        all_ranks: bool = True,
        step: int = 0,
    ) -> list[Rollout]:
        """Sample `n` responses to every question from the student as it is now.

        Args:
            model: The student.
            questions: What is asked.
            n: Responses per question.
            sampling: How.
            placement: Where the student's weights are.
            all_ranks: Whether all ranks sample at the same time, so that none may leave alone.
            step: Batches trained on so far, for messages.

        Returns:
            The responses to each question next to each other.

        Raises:
            ValueError: If a prompt is too long, or if an engine returns something else than what was asked for.
            NotFiniteError: If the student's logits are not finite; names the step.
        """
        placement = placement or Replicated()
        self._step = step
        # Under sharded weights what fails before the first forward pass would leave the other ranks in it.
        with together() if placement.sharded else nullcontext():
            prompts = [self._encoded(question) for question in questions]
        generate, kept = self.generate, self.base_answers
        if kept is not None and kept.covers(step) and not placement.sharded:
            generate = partial(kept.generate, self.generate)
        handing_over: AbstractContextManager[None] = nullcontext()
        if self._early is not None:
            self._early.step = step
            handing_over = self.engine.handing_over(self._early.put)
        try:
            with self.weights_ready(model, placement), SIGNALS.section(all_ranks), handing_over:
                rollouts = generate(model, questions, prompts, n, sampling)
        except NotFiniteError as error:
            raise NotFiniteError(f"At step {step}: {error}") from error
        check_rollouts(rollouts, questions, n, type(self.engine).__name__)
        if self._early is not None:
            for rollout in rollouts:
                self._early.put(rollout)  # unless it was handed over
        return rollouts

    def weights_ready(self, model: PreTrainedModel, placement: Placement) -> AbstractContextManager[None]:
        """Context in which the engine can generate from the student's current weights without collectives."""
        return self.engine.session(model) if self.engine.has_weights else placement.generation()

    def generate(
        self, model: PreTrainedModel, questions: list[Question], prompts: list[list[int]], n: int, sampling: Sampling
    ) -> list[Rollout]:
        """Sample `n` responses to every prompt of token ids; the question is what its rollouts refer to."""
        return self.engine.generate(model, self.tokenizer, questions, prompts, n, sampling)

    def _encoded(self, question: Question) -> list[int]:
        prompt = self.encoder.question(question)
        if len(prompt) > self.max_prompt_length:  # data that did not come through our data module
            raise ValueError(
                f"Expected prompts of at most `max_prompt_length`={self.max_prompt_length} tokens, but the one of "
                f"{question.source or f'question {question.index}'} has {len(prompt)}."
            )
        return prompt

    def too_long(self, questions: list[Question]) -> list[str | None]:
        """Return why each question's prompt is dropped, null where it is kept."""
        limit, lengths = self.max_prompt_length, map(len, self.encoder.questions(questions))
        return [f"{n} tokens, `max_prompt_length` is {limit}" if n > limit else None for n in lengths]

    def judge(self, rollouts: list[Rollout]) -> list[Verdict]:
        """Return the verifier's verdict on every rollout.

        The verifier may draw from the global generators; what follows does not depend on how much it draws. How responses reach
        it: :mod:`pgpo_lightning.rewards.batches`, and :mod:`pgpo_lightning.rewards.early_grading` for those that it has already.

        Raises:
            VerifierError: If the verifier fails and `reward.on_error` is ``raise``; names the question.
        """
        if self._early is not None:
            return [self._verdict(result) for result in self._early.results(rollouts)]
        with generators_kept(), closing(graded(self.verifier, rollouts, self.reward.workers, self._step)) as results:
            return [self._verdict(result) for result in results]

    def _verdict(self, result: Graded) -> Verdict:
        if isinstance(result, Verdict):
            return result
        if self.reward.on_error == "raise":
            raise result
        if self.verifier_errors + self._new_verifier_errors == 0:
            warnings.warn(
                f"The reward is 0 where the verifier fails, because `reward.on_error` is zero. The first time: {result} "
                "Later ones are only counted: see rollout/verifier_errors.",
                stacklevel=2,
            )
        self._new_verifier_errors += 1
        return Verdict(0.0)

    def count_verifier_errors(self) -> None:
        """Add what has failed since the last time, on all ranks; every rank has to call it."""
        self.verifier_errors += sum(gather(self._new_verifier_errors))
        self._new_verifier_errors = 0

    def check_questions(self, questions: Iterable[Question]) -> None:
        """Let the verifier look at questions before anything is sampled.

        Raises:
            ValueError: If it cannot judge one of them; names the row.
        """
        for question in questions:
            check_question(self.verifier, question)
