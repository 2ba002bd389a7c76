"""How often the base model solves each question, measured once, and the questions that are chosen by it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from pgpo_lightning.core.files import write_json
from pgpo_lightning.core.identity import question_sha256
from pgpo_lightning.core.seeding import seeded
from pgpo_lightning.core.types import Question
from pgpo_lightning.discovery.spec import Questions
from pgpo_lightning.modules.on_policy import OnPolicyModule

FILE = "pass_rates.json"


@dataclass(frozen=True)
class PassRate:
    """Successes of the base model on one question.

    Attributes:
        index: Number of the question in its split.
        sha256: Hash of the question.
        successes: Number of successes.
        samples: Number of responses.
    """

    index: int
    sha256: str
    successes: int
    samples: int

    @property
    def rate(self) -> float:
        """The share of successes."""
        return self.successes / self.samples


def read(folder: Path) -> list[PassRate]:
    """Return what was measured so far; nothing without a file."""
    path = folder / FILE
    return [PassRate(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def measure(module: OnPolicyModule, questions: list[Question], samples: int, folder: Path) -> list[PassRate]:
    """Measure the questions that are not in the file yet. The file is written after each.

    Args:
        module: With its model loaded.
        questions: The questions.
        samples: Responses per question.
        folder: Of the file.

    Returns:
        One row per question, in their order.

    Raises:
        ValueError: If the file has another number of samples or other questions.
    """
    known = {row.index: row for row in read(folder)}
    for question in questions:
        row = known.get(question.index)
        if row is not None and (row.samples, row.sha256) != (samples, question_sha256(question)):
            raise ValueError(
                f"Expected {folder / FILE} to be measured with {samples} samples of these questions, but that of question "
                f"{row.index} has {row.samples}, or is about another one. Choose another `folder`, or delete the file."
            )
        if row is None:
            with torch.no_grad(), seeded(module.seed, "discover", "rates", question.index):
                verdicts = module.judge(module.sample([question], samples, module.training_sampling))
            successes = sum(verdict.reward >= module.reward.success_threshold for verdict in verdicts)
            known[question.index] = PassRate(question.index, question_sha256(question), successes, samples)
            write_json(folder / FILE, [asdict(known[index]) for index in sorted(known)], indent=0)
    return [known[question.index] for question in questions]


def qualified(rates: list[PassRate], wanted: Questions) -> list[PassRate]:
    """Return the first questions whose rate is in the wanted range.

    Raises:
        ValueError: If there are none, or fewer than `questions.count`.
    """
    low = -1.0 if wanted.above is None else wanted.above
    high = 2.0 if wanted.below is None else wanted.below
    found = [row for row in rates if low < row.rate < high]
    least = wanted.count or 1
    if len(found) < least:
        raise ValueError(
            f"Expected at least {least} questions with a success rate below `questions.below` {wanted.below} and above "
            f"`questions.above` {wanted.above}, but got {len(found)} among {len(rates)}. Raise "
            "`questions.among`, or widen the range."
        )
    return found[: wanted.count]
