"""The records of one optimizer step: question -> rollout -> verdict -> sample of the loss."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

Message = dict[str, Any]
"""One chat turn: ``{"role": ..., "content": ...}``, texts; with tools perhaps ``tool_calls``, ``name`` and the like."""


@dataclass
class Question:
    """One row of the data.

    Args:
        prompt: The user's text, or a list of chat messages that ends with a user turn.
        answer: The gold answer, as the verifier gets it.
        system: An optional system message, put before ``prompt``.
        privileged_context: Optional text that only the self-teacher may see (TRL's column of that name). It is the feedback
            of every rollout for which the verifier returns none.
        index: Position in its split; identifies the question in metrics and per-question results.
        source: Origin of the row (``file:line``), for error messages.
        columns: The columns of the row beside the prompt, for verifiers that need them.
        tools: JSON schemas of the tools that the chat template shows, if there are any.
        repeated: Names in `columns` whose values are fields above.
    """

    prompt: str | list[Message]
    answer: Any
    system: str | None = None
    privileged_context: str | None = None
    index: int = 0
    source: str = ""
    columns: dict[str, Any] = field(default_factory=dict)
    tools: list[dict[str, Any]] | None = None
    repeated: tuple[str, ...] = ()

    def other_columns(self) -> dict[str, Any]:
        """Return the columns whose values are in no other field."""
        return {name: value for name, value in self.columns.items() if name not in self.repeated}

    def messages(self) -> list[Message]:
        """Return the conversation that the student answers, as chat messages."""
        turns = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else list(self.prompt)
        return [{"role": "system", "content": self.system}, *turns] if self.system is not None else turns


@dataclass
class Verdict:
    """A verifier's result for one response.

    Args:
        reward: The score; at least ``reward.success_threshold`` counts as a success.
        feedback: Optional text about this response (an error message, a failing test). Only the self-teacher of this
            response sees it.
        answer: The answer that was read from the response, for majority voting; ``None`` without one.
        curves: Numbers to log, by name: each becomes the curve ``rewards/<name>``, its mean over the rollouts that have it.
    """

    reward: float
    feedback: str | None = None
    answer: str | None = None
    curves: dict[str, float] = field(default_factory=dict, repr=False)


@dataclass
class Rollout:
    """One response that the student sampled.

    Args:
        question: What was asked.
        prompt_ids: Token ids of the prompt, chat template included.
        response_ids: Token ids of the response; the end-of-sequence token, if it was sampled, is the last of them.
        log_probs: Log-probability (nats) of each response token under the sampler, shape ``(len(response_ids),)``,
            fp32 on the CPU.
        text: The decoded response without special tokens.
        finished: Whether the response ended by itself; ``False`` means that it was cut off at the length limit.
    """

    question: Question
    prompt_ids: list[int]
    response_ids: list[int]
    log_probs: Tensor
    text: str
    finished: bool


@dataclass
class Sample:
    """One rollout with everything that its loss needs.

    Args:
        rollout: The sampled response.
        verdict: What the verifier said.
        reprompt_ids: Token ids of the self-teacher's prompt, or ``None`` if the row has no teacher (SDPO).
        reprompt: The same as text, for the log.
        advantage: Group-relative advantage (GRPO).
        weight: Factor of the row's loss; 0 takes the row out of it.
        old_log_probs: Log-probabilities of the response under the policy before the first of several updates on one
            batch, shape ``(len(response_ids),)``; ``None`` means that the current policy is the sampling policy.
        reference_log_probs: Log-probabilities of the response under the initial model, for a KL divergence from it, of the same
            shape; ``None`` without one.
        teacher_hidden: The teacher's hidden states of the response, ``(len(response_ids), D)``, while they are to be used again.
        contrast_ids: Token ids of a second prompt of the teacher, with which the first is compared (CEPO), or ``None``.
        contrast_log_probs: The teacher's log-probabilities of the response after it (nats), ``(len(response_ids),)``, while they
            are to be used again.
        demonstration: Whether the response was given, not sampled now (HAPO, DRIFT). It then has no log-probabilities under a
            sampler, and in HAPO `advantage` is the weight of its loss.
        replaced_by: The row that the loss has in this one's place, if any. What is reported is this one.
    """

    rollout: Rollout
    verdict: Verdict
    reprompt_ids: list[int] | None = None
    reprompt: str | None = None
    advantage: float = 0.0
    weight: float = 1.0
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None
    teacher_hidden: Tensor | None = None
    contrast_ids: list[int] | None = None
    contrast_log_probs: Tensor | None = None
    demonstration: bool = False
    replaced_by: "Sample | None" = None

    @property
    def length(self) -> int:
        """Response tokens, end-of-sequence included."""
        return len(self.rollout.response_ids)

    def stand_in(self, taught: bool = True, contrasted: bool = False) -> "Sample":
        """Return a row of one token for a forward pass that has to be made and counts for nothing.

        Args:
            taught: Whether the teacher runs over it.
            contrasted: Whether the teacher runs over it a second time.
        """
        one = replace(self.rollout, response_ids=self.rollout.response_ids[:1], log_probs=self.rollout.log_probs[:1])
        reprompt, contrast = (one.prompt_ids if wanted else None for wanted in (taught, contrasted))
        return Sample(one, self.verdict, reprompt_ids=reprompt, contrast_ids=contrast)
