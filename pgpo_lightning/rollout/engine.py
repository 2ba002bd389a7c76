"""The interface of an engine, which samples responses from the current student."""

from abc import ABC, abstractmethod
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
        max_tokens: Most response tokens, end-of-sequence included.
        temperature: Logits are divided by it.
        top_p: Nucleus; 1.0 samples from the whole distribution. Anything else than 1.0 makes the recorded log-probabilities
            those of another distribution than the one sampled from, so it is for evaluation only.
        seeds: One per question, of all of its responses: samples then depend on neither batch nor rank. Null draws from the
            global generator of torch.
    """

    max_tokens: Count
    temperature: Temperature = 1.0
    top_p: Nucleus = 1.0
    seeds: list[Annotated[int, Range(most=2**63)]] | None = None


class NotFiniteError(RuntimeError):
    """The model gave NaN or infinity where a token was to be drawn."""


class Engine(ABC):
    """Samples responses from the current student.

    Attributes:
        has_weights: Whether it has weights of its own, to which the student's are copied: whole ones, without adapter.
    """

    has_weights = False

    def prepare(self, model: PreTrainedModel, longest: int) -> None:  # noqa: B027
        """Find out at start-up whether and how the student can be sampled from. Called before weights are sharded.

        Args:
            model: The student.
            longest: Most tokens of prompt and response together.

        Raises:
            MisconfigurationException: If it cannot; names the architecture.
        """

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

        The student is handed in with every call, so that an engine with weights of its own cannot be left with old ones.

        Args:
            model: The student as it is now.
            tokenizer: Of the student; has end-of-sequence and padding tokens.
            questions: What is asked.
            prompts: Their token ids, in the same order.
            n: Responses per prompt.
            sampling: How. An engine that ignores its `seeds` makes evaluation depend on the batch size.

        Returns:
            ``len(questions) * n`` rollouts, those to one question next to each other.
        """


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return every token that ends a response: the model's own, which may be several, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
