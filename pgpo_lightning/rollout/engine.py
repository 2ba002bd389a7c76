"""The interface of an engine, which samples responses from the current student."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pgpo_lightning.core.settings import Count, Nucleus, Range, Temperature, checked
from pgpo_lightning.core.types import Question, Rollout


@checked
@dataclass
class Sampling:
    """How responses are sampled.

    Args:
        max_tokens: Maximum response tokens, end-of-sequence included.
        temperature: Logits are divided by it.
        top_p: Nucleus sampling; 1.0 samples from the whole distribution. For evaluation only, unless it is 1.0: otherwise the
            recorded log-probabilities are not those of the distribution that is sampled from.
        seeds: One seed per question, for all of its responses. Samples then depend neither on the batch nor on the rank. Null
            draws from torch's global generator.
    """

    max_tokens: Count
    temperature: Temperature = 1.0
    top_p: Nucleus = 1.0
    seeds: list[Annotated[int, Range(most=2**63)]] | None = None


class NotFiniteError(RuntimeError):
    """The logits of a token to be sampled contain NaN or infinity."""


class Engine(ABC):
    """Samples responses from the current student.

    Attributes:
        has_weights: Whether the engine holds a copy of the student's weights. Then it is called outside of the context in which
            sharded weights are gathered, and reads them in :meth:`session`, for example with
            :func:`~pgpo_lightning.rollout.weight_sync.stream_weights`.
        repeats: Set by a class, not inherited: whether responses depend on the arguments of :meth:`generate` alone, bit for bit,
            whatever was sampled before. Needed for `evaluation.base_answers`.
        max_sequences: Maximum responses decoded at the same time; null for all. Absent in an engine that decides itself.
        hands_over: Whether :meth:`generate` passes a rollout to :attr:`receive`, if that is set, as soon as it is finished.
            Needed for grading while others are still being sampled.
        receive: Takes a finished rollout, from any thread. :meth:`generate` returns the same object later, in its place.
    """

    has_weights = False
    hands_over = False
    max_sequences: int | None
    receive: Callable[[Rollout], None] | None = None

    def check(self) -> None:  # noqa: B027
        """Check at start-up, before the model is loaded, that the engine can run here. `pgpo plan` does not ask.

        Raises:
            MisconfigurationException: If it cannot.
        """

    def prepare(self, model: PreTrainedModel, longest: int) -> None:  # noqa: B027
        """Find out at start-up how the student can be sampled. Called before weights are sharded.

        Args:
            model: The student.
            longest: Maximum tokens of prompt and response together.

        Raises:
            MisconfigurationException: If it cannot be sampled; names the architecture.
        """

    @contextmanager
    def session(self, model: PreTrainedModel) -> Iterator[None]:
        """Context of the calls of :meth:`generate` for one set of weights. An engine with weights of its own syncs them here.

        Where weights are sharded, all ranks enter and leave it together, however often each calls :meth:`generate`.

        Args:
            model: The student with its current weights, in the caller's autocast.
        """
        yield

    def check_evaluation(self, batches: list[int]) -> None:  # noqa: B027
        """Check that an evaluation can be distributed over ranks like this.

        Args:
            batches: Number of batches of every rank.

        Raises:
            MisconfigurationException: If it cannot; names the numbers.
        """

    @contextmanager
    def at_once(self, responses: int | None) -> Iterator[None]:
        """Context in which at most so many responses are decoded at the same time, for an engine with `max_sequences`.

        Args:
            responses: Null for as many as usual.

        Raises:
            AttributeError: If the engine has no such setting.
        """
        if responses is None:
            yield
            return
        usual, self.max_sequences = self.max_sequences, responses
        try:
            yield
        finally:
            self.max_sequences = usual

    @contextmanager
    def handing_over(self, receive: Callable[[Rollout], None]) -> Iterator[None]:
        """Context in which rollouts are handed over as soon as they are finished, by an engine that does so.

        Args:
            receive: See :attr:`receive`.
        """
        self.receive = receive
        try:
            yield
        finally:
            self.receive = None

    @abstractmethod
    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: list[Question],
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
    ) -> list[Rollout]:
        """Sample `n` responses to every prompt.

        Every call receives the student, so that an engine with a copy of its weights can update the copy.

        Args:
            model: The student with its current weights.
            tokenizer: The student's tokenizer, with end-of-sequence and padding tokens.
            questions: The questions.
            prompts: Their token ids, in the same order.
            n: Responses per prompt.
            sampling: Sampling settings. With an engine that ignores `seeds`, evaluation depends on the batch size.

        Returns:
            ``len(questions) * n`` rollouts. Rollouts of one question are adjacent.
        """


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return all end-of-sequence tokens: the model's, which may be several, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
