"""Explanation of steps without a learning signal: why no rollout is in the loss, and what to change."""

from dataclasses import dataclass, fields
from itertools import chain

from pgpo_lightning.core.types import Sample


@dataclass
class Outcomes:
    """Outcomes of rollouts that are not in the loss, one entry per rollout.

    Attributes:
        question: Index of the question.
        reward: Reward of the response.
        cut_off: Whether the response was truncated at the length limit.
        taught: Whether a teacher's prompt exists.
        feedback: Whether there is feedback.
    """

    question: list[int]
    reward: list[float]
    cut_off: list[bool]
    taught: list[bool]
    feedback: list[bool]

    @classmethod
    def from_samples(cls, samples: list[Sample]) -> "Outcomes":
        """Collect the outcomes of one rank."""
        return cls(
            question=[sample.rollout.question.index for sample in samples],
            reward=[sample.verdict.reward for sample in samples],
            cut_off=[not sample.rollout.finished for sample in samples],
            taught=[sample.reprompt_ids is not None for sample in samples],
            feedback=[bool(s.verdict.feedback or s.rollout.question.privileged_context) for s in samples],
        )

    @classmethod
    def join(cls, parts: list["Outcomes"]) -> "Outcomes":
        """Concatenate the outcomes of all ranks."""
        return cls(**{f.name: list(chain.from_iterable(getattr(part, f.name) for part in parts)) for f in fields(cls)})


def explain(
    seen: Outcomes, threshold: float, limit: int, siblings: int, has_teacher: bool, shows_feedback: bool = True
) -> str:
    """Return a description of rollouts without a signal: their counts, the likely cause, and what to change.

    Args:
        seen: At least one rollout, of all ranks.
        threshold: Rewards of at least this value are successes.
        limit: `max_response_length` (tokens).
        siblings: `num_generations`.
        has_teacher: Whether the objective uses a teacher. Without one it compares siblings' rewards.
        shows_feedback: Whether the teacher's prompt contains feedback if there is any.

    Example:
        >>> seen = Outcomes([0, 0], [1.0, 1.0], [False] * 2, [False] * 2, [False] * 2)
        >>> explain(seen, 0.5, 64, 2, False).partition(". ")[2]
        'All were right: nothing is left to learn from these questions. Take harder ones.'
    """
    count, cut = len(seen.reward), sum(seen.cut_off)
    right = sum(reward >= threshold for reward in seen.reward)
    numbers = (
        f"{right} of {count} rollouts were right (rewards {min(seen.reward):g} to {max(seen.reward):g}), {cut} were cut off at "
        f"`max_response_length` ({limit} tokens)"
    )
    if has_teacher:
        numbers += f", {sum(seen.taught)} had a teacher, {sum(seen.feedback)} had feedback"
    probe = " `pgpo probe` measures before training how much the teacher's context helps." if has_teacher else ""
    return f"{numbers}. {_cause(seen, right, cut, siblings, has_teacher, shows_feedback)}{probe}"


def explain_failures(seen: Outcomes, steps: int, threshold: float, limit: int, shows_feedback: bool) -> str:
    """Return a description of several steps without a success: what the teacher lacks, and what to change.

    Args:
        seen: The rollouts of the last of them, of all ranks.
        steps: Batches in a row without a success.
        threshold: Rewards of at least this value are successes.
        limit: `max_response_length` (tokens).
        shows_feedback: Whether the teacher's prompt contains feedback if there is any.

    Example:
        >>> seen = Outcomes([0, 0], [0.0, 0.3], [False] * 2, [False] * 2, [False] * 2)
        >>> explain_failures(seen, 10, 0.5, 64, True).partition(": ")[0]
        'No rollout of the last 10 steps reached `reward.success_threshold` (0.5; rewards of this step 0 to 0.3)'
    """
    low, high, cut = min(seen.reward), max(seen.reward), sum(seen.cut_off) / len(seen.cut_off)
    feedback = shows_feedback and any(seen.feedback)
    mends = ["take easier questions"]
    if high > low:
        mends.insert(0, f"lower the threshold to at most {high:g}, if that reward is a success")
    if cut >= 0.5:
        mends.append(f"raise `max_response_length` ({cut:.0%} were cut off at {limit} tokens)")
    if not feedback:
        mends.append("give feedback, from the verifier or as `privileged_context`")
    learns = "feedback alone" if feedback else "nothing"
    return (
        f"No rollout of the last {steps} steps reached `reward.success_threshold` ({threshold:g}; rewards of this step {low:g} "
        f"to {high:g}): there is no demonstration, so the teacher reads {learns}. What helps: {'; '.join(mends)}."
    )


def _cause(seen: Outcomes, right: int, cut: int, siblings: int, has_teacher: bool, shows_feedback: bool) -> str:
    count = len(seen.reward)
    no_feedback = has_teacher and not any(seen.feedback)
    feedback = " Or give feedback: from the verifier, or as `privileged_context`." if no_feedback else ""
    if has_teacher and not shows_feedback:
        feedback = (
            " Or give feedback, from the verifier or as `privileged_context`, and set "
            "`reprompt.include_environment_feedback` to true."
            if no_feedback
            else " Or let the teacher see the feedback that there is: set `reprompt.include_environment_feedback` to true."
        )
    rewards: dict[int, set[float]] = {}
    for question, reward in zip(seen.question, seen.reward, strict=True):
        rewards.setdefault(question, set()).add(reward)
    if has_teacher and siblings == 1 and no_feedback:
        return (
            "With `num_generations` 1 no rollout has a sibling to learn from, and there is no feedback either. Set "
            f"`num_generations` to 2 or more.{feedback}"
        )
    if right == 0 and cut == count:
        return f"All were cut off before they could end: raise `max_response_length`.{feedback}"
    if right == 0:
        longer = ", raise `max_response_length`" if 2 * cut >= count else ""
        return f"None was right: take easier questions or a more lenient grader{longer}.{feedback}"
    if right == count:
        return "All were right: nothing is left to learn from these questions. Take harder ones."
    if not has_teacher and all(len(each) == 1 for each in rewards.values()):
        return (
            "All rollouts of a question had the same reward, so that none is better than its siblings: raise "
            "`num_generations`, or take questions that are answered right some of the time."
        )
    if has_teacher and not any(seen.taught):
        return (
            "Some were right, but no other rollout was shown them: look at `num_generations`, "
            f"`reprompt.demonstration_source` and `reprompt.max_reprompt_len`.{feedback}"
        )
    return "All weights or advantages were zero: every question was answered always right or always wrong."
