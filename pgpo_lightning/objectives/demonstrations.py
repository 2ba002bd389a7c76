"""Where HAPO's demonstrations come from: a column of the data, or the run's own earlier successes. All of them are verified."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from pgpo_lightning.core.settings import Count, Text, checked
from pgpo_lightning.core.types import Question


@dataclass(frozen=True)
class Demonstration:
    """A response that the verifier accepts.

    Attributes:
        ids: Its tokens, end-of-sequence included.
        reward: The verifier's.
    """

    ids: list[int]
    reward: float


Verify = Callable[[Question, str], Demonstration | str]
"""From a question and the text of a response to a demonstration, or to why it is none."""


class Demonstrations(ABC):
    """A source of demonstrations. Its state is the same on every rank, and in checkpoints."""

    def check(self, questions: list[Question], verify: Verify) -> None:  # noqa: B027  (not every source has any)
        """Look at the training questions before anything is generated.

        Raises:
            ValueError: If there is nothing to learn from; names the row.
        """

    @abstractmethod
    def choose(self, question: Question, verify: Verify, rng: random.Random) -> Demonstration | None:
        """Return a demonstration for a question, or none if there is none."""

    def observe(self, successes: list[tuple[int, Demonstration]]) -> None:  # noqa: B027
        """Take note of the rollouts of all ranks that succeeded in this step, each with the index of its question."""

    keeps_successes = False
    """Whether :meth:`observe` has a use for them."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # noqa: B027
        """Take it over."""


@checked
class ColumnDemonstrations(Demonstrations):
    """Worked solutions in a column of the data; each is put to the run's own verifier when training starts.

    A row without one is trained on without a demonstration.

    Args:
        column: Its name. The text is what the model would answer, thinking included.
        on_rejected: What happens to a demonstration that the verifier does not accept, or that is longer than
            `max_response_length`: ``drop`` goes on without it and says how many there were, ``raise`` stops.

    Raises:
        ValueError: If `on_rejected` is neither.
    """

    def __init__(self, column: Text = "solution", on_rejected: Literal["drop", "raise"] = "drop") -> None:
        self.column = column
        self.on_rejected = on_rejected
        self._verified: dict[tuple[int, str], Demonstration | str] = {}

    def check(self, questions: list[Question], verify: Verify) -> None:
        """See :meth:`Demonstrations.check`."""
        outcomes = [(question, self._outcome(question, verify)) for question in questions]
        if questions and all(outcome is None for _, outcome in outcomes):
            there = ", ".join(questions[0].columns) or "none"
            raise ValueError(
                f"Expected `column` to name a column with demonstrations, but no training question has `{self.column}`. The "
                f"columns of {_where(questions[0])} beside prompt and answer: {there}."
            )
        rejected = [(question, outcome) for question, outcome in outcomes if isinstance(outcome, str)]
        if not rejected:
            return
        first, why = rejected[0]
        count = f"{len(rejected)} of {len(questions)} training questions"
        told = f"the demonstrations of {count}; the first is that of {_where(first)}: {why}"
        if not any(isinstance(outcome, Demonstration) for _, outcome in outcomes):
            raise ValueError(f"Expected to keep at least one demonstration, but had to drop {told}.")
        rank_zero_warn(f"Dropped {told}.")

    def choose(self, question: Question, verify: Verify, rng: random.Random) -> Demonstration | None:
        """See :meth:`Demonstrations.choose`."""
        outcome = self._outcome(question, verify)
        return outcome if isinstance(outcome, Demonstration) else None

    def _outcome(self, question: Question, verify: Verify) -> Demonstration | str | None:
        text = question.columns.get(self.column)
        if text is not None and not isinstance(text, str):
            raise ValueError(f"Expected a text in column `{self.column}` of {_where(question)}, but got {text!r:.80}.")
        if text is None or not text.strip():
            return None
        key = (question.index, text)
        if key not in self._verified:
            outcome = self._verified[key] = verify(question, text)
            if isinstance(outcome, str) and self.on_rejected == "raise":
                raise ValueError(
                    f"Expected `{self.column}` of {_where(question)} to be a demonstration, but {outcome}. Mend the row, or set "
                    "`on_rejected` to drop."
                )
        return self._verified[key]


@checked
class SuccessBuffer(Demonstrations):
    """The run's own earlier successes on the same question. It needs no data, and knows nothing where nothing ever succeeded.

    They are kept on every rank and in checkpoints: `size` responses of 4 bytes a token for every question.

    Args:
        size: Successes kept per question, the newest; DRIFT keeps 3.
        choice: Which of them: the ``newest``, which is the least off-policy, or a ``random`` one.

    Raises:
        ValueError: If a setting is out of range; names it.
    """

    keeps_successes = True

    def __init__(self, size: Count = 3, choice: Literal["newest", "random"] = "newest") -> None:
        self.size = size
        self.choice = choice
        self.kept: dict[int, list[tuple[Tensor, float]]] = {}

    def choose(self, question: Question, verify: Verify, rng: random.Random) -> Demonstration | None:
        """See :meth:`Demonstrations.choose`."""
        kept = self.kept.get(question.index)
        if not kept:
            return None
        ids, reward = kept[-1] if self.choice == "newest" else rng.choice(kept)
        return Demonstration(ids.tolist(), reward)

    def observe(self, successes: list[tuple[int, Demonstration]]) -> None:
        """See :meth:`Demonstrations.observe`."""
        for question, success in successes:
            kept = self.kept.setdefault(question, [])
            kept.append((torch.tensor(success.ids, dtype=torch.int32), success.reward))
            del kept[: -self.size]

    def state_dict(self) -> dict[str, Any]:
        """Return what is kept."""
        return {"kept": {question: list(kept) for question, kept in self.kept.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self.kept = {question: list(kept) for question, kept in state_dict["kept"].items()}


def _where(question: Question) -> str:
    return question.source or f"question {question.index}"
