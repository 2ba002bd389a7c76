"""What an objective is: which samples are learnt from, by which loss per token, and what is divided by.

An objective is a plain object without a Trainer. The module asks it to prepare samples (:meth:`Objective.prepare`); the
:class:`~pgpo_lightning.training.learner.Learner` asks it for routes, and each route for the loss of its tokens.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from transformers import PreTrainedModel

from pgpo_lightning.core.types import Sample
from pgpo_lightning.losses.divergence import Divergence
from pgpo_lightning.losses.fused import TokenStatistics
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.teachers.base import Teacher
from pgpo_lightning.teachers.self_teaching import SelfTeaching
from pgpo_lightning.training.mini_batches import TokenInputs

if TYPE_CHECKING:
    from pgpo_lightning.training.learner import Learner

TokenLoss = Callable[[TokenStatistics, TokenInputs], Tensor]
"""From what student and teacher say about n tokens, and what was known before, to a loss per token, shape ``(n,)``.

`divergence`, `log_p_student` and `entropy_student` of the statistics carry gradients. Importance weights are applied outside.
"""


@dataclass(frozen=True)
class Route:
    """Samples that share a loss, and never a forward pass with those of another route.

    Attributes:
        samples: In the loss; there may be none.
        token_loss: The loss of their tokens.
        taught: Whether the teacher runs over them too.
        factors: Factors of the token advantages that depend on whole responses, from statistics and lengths to ``(N,)``, without
            gradient; the loss then costs one more product with each head of student and teacher.
        contrasted: Whether it also gives the log-probabilities of the responses after a second prompt, `Sample.contrast_ids`.
    """

    samples: list[Sample]
    token_loss: TokenLoss
    taught: bool = False
    contrasted: bool = False
    factors: Callable[[TokenStatistics, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Preparation:
    """What :meth:`Objective.prepare` may use.

    Attributes:
        rng: Source of random choices.
        step: Batches trained on so far.
        learner: Gives log-probabilities under the current policy, and holds the teacher.
        seed: Seed of the run, the same on every rank.
    """

    rng: random.Random
    step: int
    learner: "Learner"
    seed: int = 0

    @property
    def teacher(self) -> Teacher:
        """The self-teacher.

        Raises:
            RuntimeError: If there is none.
        """
        if self.learner.teacher is None:
            raise RuntimeError("Expected a learner with a teacher, but got one without.")
        return self.learner.teacher


class Objective(ABC):
    """Turns the rollouts of a batch into losses."""

    divergence: Divergence | None = None
    """Which divergence between student and teacher is computed and logged; null without a teacher."""

    loss_is_divergence: bool = False
    """Whether the loss is that divergence, so that its minimum is known to be near 0."""

    token_weights: TokenWeights | None = None
    """Weights of the tokens or responses of taught routes, by their information."""

    contrasted: bool = False
    """Whether the teacher reads two prompts for a response, so that it runs twice over it."""

    teaching: SelfTeaching | None = None
    """The self-teacher, if the objective has one."""

    @property
    def recomputes_logits(self) -> bool:
        """Whether a loss depends on whole responses, so that the backward pass computes the logits a second time."""
        return self.token_weights is not None and self.token_weights.unit == "sequence"

    @property
    def has_reference(self) -> bool:
        """Whether the teacher is no self-teacher but the initial model, for a KL divergence from it."""
        return False

    def make_teacher(self, student: PreTrainedModel, loading: dict[str, Any], longest: int) -> Teacher | None:
        """Return the teacher, made from the student's weights (or its adapter) as they are now; null for none.

        Args:
            student: The model that is trained.
            loading: See :meth:`SelfTeaching.make`.
            longest: See :meth:`SelfTeaching.make`.
        """
        return None if self.teaching is None else self.teaching.make(student, loading, longest)

    @abstractmethod
    def prepare(self, samples: list[Sample], given: Preparation) -> dict[str, float]:
        """Give samples what their loss needs, in place: reprompts, advantages, weights.

        Args:
            samples: All samples of this rank's batch, those to one question next to each other.
            given: What may be used.

        Returns:
            Scalars to log.
        """

    @abstractmethod
    def in_loss(self, sample: Sample) -> bool:
        """Whether a sample takes part in the loss. The others cost no forward pass."""

    @abstractmethod
    def routes(self, samples: list[Sample]) -> list[Route]:
        """Return the samples in the loss by routes, taught ones first; as many routes on every rank, some perhaps empty."""

    @abstractmethod
    def normalizer(self, samples: list[Sample]) -> int:
        """Return the number of tokens that ``token-mean`` divides by."""

    def diagnose(self, samples: list[Sample], step: int, gradients: Callable[[], list[Tensor]]) -> dict[str, float]:
        """Measure something about the gradient of an optimizer step before it is computed; return scalars to log.

        Args:
            samples: Samples of the optimizer step.
            step: Batches trained on so far.
            gradients: Computes the gradients of what :meth:`routes` returns now, one tensor per parameter that has one.
        """
        return {}

    def check_questions(self, questions: list[Any]) -> None:
        """Look at the training questions before anything is sampled."""
        if self.teaching is not None:
            self.teaching.check_questions(questions)

    # What only some objectives have.

    def check_length(self, count_batches: Callable[[], float]) -> None:  # noqa: B027
        """Raise if the objective does not know what to do for the batches of the run.

        Args:
            count_batches: Returns their number, infinity if it is not known.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside weights."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027
        """Take it over."""


class MissingObjective:
    """Stands for the objective of a module until its ``__init__`` has set one; to read it is an error that says so."""

    def __get__(self, module: Any, owner: type) -> Any:
        """Return the objective that torch has registered because it has weights, if there is one.

        Raises:
            MisconfigurationException: If there is none.
        """
        if module is None:
            return self
        registered = vars(module).get("_modules", {}).get("objective")
        if registered is None:
            raise MisconfigurationException(
                f"Expected {owner.__name__} to set `self.objective` in its `__init__`, as every subclass of OnPolicyModule "
                "must, but got none."
            )
        return registered


def split_taught(samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return the samples that have a teacher's prompt, and the others."""
    taught = [sample for sample in samples if sample.reprompt_ids is not None]
    return taught, [sample for sample in samples if sample.reprompt_ids is None]
