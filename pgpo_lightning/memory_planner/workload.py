"""What one device works on in a step: rows of assumed lengths, grouped and laid out by the code that will do it."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from pgpo_lightning.core.settings import Count, Decay, checked
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.models.packing import PromptSharing, Sequences, SharedSequences
from pgpo_lightning.training.mini_batches import micro_batches

Packed = Sequences | SharedSequences


@checked
@dataclass(frozen=True)
class Lengths:
    """Assumed tokens of prompts and responses.

    Args:
        prompt: Of the student's prompt.
        reprompt: Of the teacher's.
        response: Of a response.
        spread: The lengths of responses are spread evenly from ``1 - spread`` to ``1 + spread`` of `response`, those of prompts
            by a quarter of that; 0 for all the same.
        longest: No response is longer.
    """

    prompt: Count
    reprompt: Count
    response: Count
    spread: Decay = 0.0
    longest: Count | None = None

    def rows(self, questions: int, samples: int, independent: bool = False) -> list[Sample]:
        """Make the rows of a step, all with a teacher.

        Args:
            questions: Of this device.
            samples: Responses to each.
            independent: Whether every row has a teacher's prompt of its own; otherwise the rows of a question share one, and
                the one whose answer it shows has another.
        """
        count = questions * samples
        # Neighbours get far apart lengths, as in a real batch: steps of the golden ratio.
        places = [(i * 0.6180339887498949) % 1 * 2 - 1 for i in range(count)]
        rows = []
        for i in range(count):
            question = i // samples
            around = 1 + 0.25 * self.spread * places[question]
            shown = i if independent else 2 * question + (i % samples == samples - 1 and samples > 1)
            response = max(1, round(self.response * (1 + self.spread * places[i])))
            ids = [1] * min(response, self.longest or response)
            prompt, reprompt = (
                [2 + number] + [1] * (max(1, round(length * around)) - 1)
                for number, length in ((question, self.prompt), (shown, self.reprompt))
            )
            rollout = Rollout(Question("", None, index=question), prompt, ids, torch.zeros(len(ids)), "", True)
            rows.append(Sample(rollout, Verdict(0.0), reprompt))
        return rows


def with_demonstrations(rows: list[Sample], samples: int, length: int) -> list[Sample]:
    """Return the rows of HAPO's loss where every gate is open: in each group a demonstration for the shortest rollout.

    Args:
        rows: As they were sampled.
        samples: Responses to each question.
        length: Of a demonstration, in tokens.
    """
    learned = list(rows)
    for start in range(0, len(rows), samples):
        i = min(range(start, start + samples), key=lambda i: rows[i].length)
        given = replace(rows[i].rollout, response_ids=[1] * length, log_probs=torch.zeros(length))
        learned[i] = replace(rows[i], rollout=given, demonstration=True)
    return learned


@dataclass(frozen=True)
class Layout:
    """The shape of one forward pass.

    Attributes:
        rows: Responses.
        width: Their padded tokens in the pass, after the prompt where that is run apart.
        prompts: Prompts run apart; 0 if every row is run whole.
        prompt: Their padded tokens.
        tokens: Response tokens with a loss, N.
    """

    rows: int
    width: int
    prompts: int
    prompt: int
    tokens: int

    @classmethod
    def of(cls, packed: Packed) -> "Layout":
        """Read the shape off packed sequences."""
        if isinstance(packed, Sequences):
            return cls(*packed.input_ids.shape, 0, 0, packed.targets.numel())
        return cls(*packed.responses.shape, *packed.prompts.shape, packed.targets.numel())

    @property
    def padded(self) -> int:
        """Padded tokens that go through the layers."""
        return self.rows * self.width + self.prompts * self.prompt

    @property
    def pairs(self) -> int:
        """Pairs of query and key that attention multiplies, masked ones included."""
        return self.rows * self.width * (self.width + self.prompt) + self.prompts * self.prompt**2


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the models together, laid out for the student and, if there is one, for the teacher."""

    student: Packed
    teacher: Packed | None

    @property
    def weight(self) -> int:
        """A size to find the largest by: padded tokens, and keys and values beside them."""
        layouts = [Layout.of(packed) for packed in (self.student, self.teacher) if packed is not None]
        return max(layout.padded + layout.rows * (layout.prompt + layout.width) for layout in layouts)


def group(rows: list[Sample], budget: int, share: PromptSharing, with_teacher: bool) -> list[MicroBatch]:
    """Group rows as the module does, and lay them out.

    Args:
        rows: Of one optimizer step on one device.
        budget: `update.micro_batch_tokens`.
        share: Whether equal prompts are run once.
        with_teacher: Whether there is a teacher with prompts of its own.
    """

    def contexts(row: Sample) -> list[list[int]]:
        return [row.rollout.prompt_ids, row.reprompt_ids] if with_teacher else [row.rollout.prompt_ids]

    def pack(part: list[Sample], which: int) -> Packed:
        pairs = [(contexts(row)[which], row.rollout.response_ids) for row in part]
        return Sequences.pack(pairs, 0, torch.device("cpu"), share)

    alike: dict[Any, MicroBatch] = {}  # groups of equal lengths have equal layouts
    made = []
    for part in micro_batches(rows, budget, contexts, share):
        prompts: dict[tuple[int, ...], int] = {}
        key = tuple(
            (row.length, *((prompts.setdefault(tuple(ids), len(prompts)), len(ids)) for ids in contexts(row)))
            for row in part
        )
        if key not in alike:
            alike[key] = MicroBatch(pack(part, 0), pack(part, 1) if with_teacher else None)
        made.append(alike[key])
    return made
