"""From verdicts to the self-teacher's prompts: which demonstration and feedback each of them contains."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pgpo_lightning.core.types import Message, Question, Rollout, Sample
from pgpo_lightning.rollout.thinking import remove_thinking

REPROMPT_TEMPLATE = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question."
SOLUTION_TEMPLATE = "\nCorrect solution:\n\n{successful_previous_attempt}"
FEEDBACK_TEMPLATE = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback_raw}"


def fill(template: str, **values: str) -> str:
    r"""Replace ``{name}`` placeholders by values.

    Unlike ``str.format`` it leaves all other braces unchanged, so templates may contain ``\boxed{}``, and does not interpret the
    values.

    Args:
        template: The text with placeholders.
        values: Values by name. Placeholders without one stay.
    """
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def check_template(field: str, template: str, placeholders: tuple[str, ...]) -> None:
    """Check that a template has its placeholders and can be encoded.

    Args:
        field: Name of the setting, for messages.
        template: Its value.
        placeholders: Names that must occur as ``{name}``.

    Raises:
        ValueError: Names the field and the placeholder.
    """
    try:
        template.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Expected `{field}` to have whole characters, but got the lone surrogate {template[error.start]!a} in {template!a}."
        ) from None
    for name in placeholders:
        if f"{{{name}}}" not in template:
            raise ValueError(f"Expected `{field}` to contain the placeholder {{{name}}}, but got {template!r}.")


DemonstrationChoice = Literal["shared", "independent"]
DemonstrationSource = Literal["siblings", "own", "column", "none"]

COLUMN = "solution"
"""Default of `reprompt.demonstration_column`."""


@dataclass
class RepromptBuilder:
    """Builds the self-teacher's prompt for every sample with a demonstration or feedback.

    Fields carry the names of the SDPO reference; see :class:`pgpo_lightning.modules.SDPO` for their meaning.
    """

    success_reward_threshold: float
    demonstration_choice: DemonstrationChoice
    dont_reprompt_on_self_success: bool
    remove_thinking_from_demonstration: bool
    include_environment_feedback: bool
    environment_feedback_only_without_solution: bool
    max_reprompt_len: int
    reprompt_template: str
    solution_template: str
    feedback_template: str
    demonstration_source: DemonstrationSource = "siblings"
    reprompt_without_context: bool = False
    demonstration_column: str | None = None

    def __post_init__(self) -> None:
        """Check that the settings are consistent.

        Raises:
            ValueError: If one contradicts another, or a template lacks a placeholder; names the field.
        """
        source = self.demonstration_source
        if source == "own" and self.dont_reprompt_on_self_success:
            raise ValueError(
                "Expected `reprompt.dont_reprompt_on_self_success` false with `reprompt.demonstration_source` own, "
                "which shows a response its "
                "own text, but got true."
            )
        if self.demonstration_column is not None and source != "column":
            raise ValueError(
                "Expected `reprompt.demonstration_source` column with `reprompt.demonstration_column`, which would have no "
                f"effect, but got {source}."
            )
        if source != "siblings" and self.demonstration_choice != "shared":
            raise ValueError(
                f"Expected `reprompt.demonstration_choice` shared with `reprompt.demonstration_source` {source}, which "
                f"leaves nothing to choose, "
                f"but got {self.demonstration_choice}."
            )
        if source == "none" and not (self.include_environment_feedback or self.reprompt_without_context):
            raise ValueError(
                "Expected `reprompt.include_environment_feedback` or `reprompt.reprompt_without_context` true with "
                "`reprompt.demonstration_source` none, "
                "because else no response has a teacher, but got false for both."
            )
        shown = ["prompt", *["solution"] * (source != "none"), *["feedback"] * self.include_environment_feedback]
        check_template("reprompt.reprompt_template", self.reprompt_template, tuple(shown))
        check_template("reprompt.solution_template", self.solution_template, ("successful_previous_attempt",))
        check_template("reprompt.feedback_template", self.feedback_template, ("feedback_raw",))

    def attach(
        self,
        samples: list[Sample],
        encode: Callable[..., list[int]],
        tokens: Callable[[str], list[int]],
        text: Callable[[list[int]], str],
        rng: random.Random,
        answer: Callable[[Rollout], str] = lambda rollout: remove_thinking(rollout.text),
        shows: bool = True,
        order: Callable[[list[Sample]], None] | None = None,
    ) -> dict[str, float]:
        """Set the reprompt of every sample, or none if there is neither a demonstration nor feedback.

        With `reprompt.reprompt_without_context` a sample without both gets a reprompt too. The demonstration is chosen
        uniformly among the
        successful responses to the same question. With ``shared`` all siblings get the same one, and the chosen sample itself
        gets another; with ``independent`` each sample draws its own. (The reference takes the first of a list sorted by length,
        which favours short ones.)

        Args:
            samples: All samples of the step, whole groups; changed in place.
            encode: Converts chat messages to prompt token ids. Questions with tools give them as `tools`.
            tokens: Converts text to token ids, without special tokens.
            text: Converts token ids to text.
            rng: Source of the choice.
            answer: Returns the text of a response without thinking.
            shows: Whether the context is shown. If not, the same samples get a reprompt, with the template alone.
            order: Sorts the successes of a group in place, the demonstration first; null for a random order.

        Returns:
            Fractions of samples and groups under the metric names of the reference.
        """
        groups: dict[int, list[Sample]] = {}
        for sample in samples:
            if sample.verdict.reward >= self.success_reward_threshold:
                groups.setdefault(sample.rollout.question.index, []).append(sample)
        texts: dict[int, str] = {}
        for successes in groups.values():
            (order or rng.shuffle)(successes)
            for sample in successes:
                without = self.remove_thinking_from_demonstration
                texts[id(sample)] = answer(sample.rollout) if without else sample.rollout.text
        count = dict.fromkeys(("demonstration", "feedback_available", "feedback_used", "trimmed", "dropped"), 0)
        fitted: dict[tuple[int, str | None, str | None], tuple[list[int] | None, str | None, bool]] = {}
        for sample in samples:
            candidates = self._candidates(sample, groups.get(sample.rollout.question.index, []))
            shown = [texts[id(other)] for other in candidates if texts[id(other)].strip()]
            if self.demonstration_source == "column":
                shown = self._solution(sample, tokens, answer)
            demonstration = None
            if shown:
                demonstration = shown[0] if self.demonstration_choice == "shared" else rng.choice(shown)
            feedback = self._feedback(sample)
            count["demonstration"] += demonstration is not None
            count["feedback_available"] += feedback is not None
            if demonstration is not None and self.environment_feedback_only_without_solution:
                feedback = None
            count["feedback_used"] += feedback is not None
            if demonstration is None and feedback is None and not self.reprompt_without_context:
                continue
            if not shows:
                demonstration = feedback = None
            key = (sample.rollout.question.index, demonstration, feedback)
            if key not in fitted:  # samples with the same context have the same prompt
                fitted[key] = self.fit(sample, demonstration, feedback, encode, tokens, text, bare=not shows)
            sample.reprompt_ids, sample.reprompt, trimmed = fitted[key]
            count["trimmed"] += trimmed
            count["dropped"] += sample.reprompt_ids is None
        total = max(1, len(samples))
        questions = len({sample.rollout.question.index for sample in samples})
        return {
            "self_distillation/success_group_fraction": len(groups) / max(1, questions),
            "self_distillation/success_sample_fraction": count["demonstration"] / total,
            "self_distillation/feedback_available_fraction": count["feedback_available"] / total,
            "self_distillation/feedback_used_fraction": count["feedback_used"] / total,
            "self_distillation/reprompt_sample_fraction": sum(sample.reprompt_ids is not None for sample in samples)
            / total,
            "self_distillation/reprompt_trimmed_fraction": count["trimmed"] / total,
            "self_distillation/reprompt_dropped_fraction": count["dropped"] / total,
        }

    def _candidates(self, sample: Sample, successes: list[Sample]) -> list[Sample]:
        """Return the successes of a sample's group whose text may be its demonstration."""
        if self.demonstration_source in ("none", "column"):
            return []
        if self.demonstration_source == "own":
            return [other for other in successes if other is sample]
        return [other for other in successes if other is not sample or not self.dont_reprompt_on_self_success]

    def solution(self, question: Question) -> str | None:
        """Return the worked solution of a question, thinking included; ``None`` if its row has none."""
        text = question.columns.get(self.demonstration_column or COLUMN)
        return text if isinstance(text, str) and text.strip() else None

    def _solution(
        self, sample: Sample, tokens: Callable[[str], list[int]], answer: Callable[[Rollout], str]
    ) -> list[str]:
        found = self.solution(sample.rollout.question)
        if found is not None and self.remove_thinking_from_demonstration:
            found = answer(replace(sample.rollout, text=found, response_ids=tokens(found)))
        return [] if found is None or not found.strip() else [found]

    def _feedback(self, sample: Sample) -> str | None:
        if not self.include_environment_feedback:
            return None
        raw = sample.verdict.feedback or sample.rollout.question.privileged_context
        return raw if raw and raw.strip() else None

    def messages(self, sample: Sample, demonstration: str | None, feedback: str | None) -> list[Message]:
        """Return the teacher's conversation: the student's with a rewritten last user turn.

        Args:
            sample: The sample whose question is asked.
            demonstration: Text of a successful response, if there is one.
            feedback: Text of the feedback, if there is one.
        """
        *before, last = sample.rollout.question.messages()
        solution = (
            "" if demonstration is None else fill(self.solution_template, successful_previous_attempt=demonstration)
        )
        remarks = "" if feedback is None else fill(self.feedback_template, feedback_raw=feedback)
        content = fill(self.reprompt_template, prompt=last["content"], solution=solution, feedback=remarks)
        return [*before, {**last, "content": content}]

    def fit(
        self,
        sample: Sample,
        demonstration: str | None,
        feedback: str | None,
        encode: Callable[..., list[int]],
        tokens: Callable[[str], list[int]],
        text: Callable[[list[int]], str],
        bare: bool = False,
    ) -> tuple[list[int] | None, str | None, bool]:
        """Encode the reprompt. Truncate first the demonstration, then the feedback, at the end until it fits.

        With `bare`, a reprompt without either is the template alone, as with `reprompt.reprompt_without_context`.

        Returns:
            Token ids and text of the reprompt, ``None`` if nothing fits, and whether it was truncated.
        """
        parts = {"demonstration": demonstration, "feedback": feedback}
        tools = sample.rollout.question.tools
        given: dict[str, Any] = {} if tools is None else {"tools": tools}
        left: dict[str, list[int]] = {}
        while any(parts.values()) or self.reprompt_without_context or bare:
            messages = self.messages(sample, parts["demonstration"], parts["feedback"])
            ids = encode(messages, **given)
            if (excess := len(ids) - self.max_reprompt_len) <= 0:
                return ids, messages[-1]["content"], bool(left)
            if not any(parts.values()):
                break
            # One token more than the excess is cut, because truncated text can be a token longer when it is encoded again. The
            # remaining tokens are cut again, not their text: half a character decodes to one of more tokens, which would not end.
            part = "demonstration" if parts["demonstration"] else "feedback"
            left[part] = (left[part] if part in left else tokens(parts[part] or ""))[: -(excess + 1)]
            parts[part] = text(left[part]).rstrip("\ufffd") or None
        return None, None, bool(left)
