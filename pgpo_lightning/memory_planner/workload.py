"""What one device works on in a step: rows of assumed lengths, grouped and laid out by the code that will do it."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch

from pgpo_lightning.core.settings import Count, Decay, checked
from pgpo_lightning.core.types import Question, Rollout, Sample, Verdict
from pgpo_lightning.models.packing import Packing, Sequences, SharedSequences
from pgpo_lightning.training.mini_batches import micro_batches

Packed = Sequences | SharedSequences

EngineKind = Literal["transformers", "vllm", "vllm server"]


@checked
@dataclass(frozen=True)
class Lengths:
    """Assumed tokens of prompts and responses.

    Args:
        prompt: Tokens of the student's prompt.
        reprompt: Tokens of the teacher's prompt.
        response: Tokens of a response.
        spread: Lengths of responses are distributed evenly from ``1 - spread`` to ``1 + spread`` times `response`, those of
            prompts with a quarter of that spread. 0 for equal lengths.
        longest: Maximum length of a response.
    """

    prompt: Count
    reprompt: Count
    response: Count
    spread: Decay = 0.0
    longest: Count | None = None

    def rows(self, questions: int, samples: int, independent: bool = False) -> list[Sample]:
        """Return the samples of a step, all with a teacher.

        Args:
            questions: Questions of this device.
            samples: Responses per question.
            independent: Whether every row has its own teacher's prompt. Otherwise the rows of a question share one, except
                for the row whose answer it shows.
        """
        count = questions * samples
        # Steps of the golden ratio give neighbours very different lengths, as in a real batch.
        positions = [(i * 0.6180339887498949) % 1 * 2 - 1 for i in range(count)]
        rows = []
        for i in range(count):
            question = i // samples
            around = 1 + 0.25 * self.spread * positions[question]
            shown = i if independent else 2 * question + (i % samples == samples - 1 and samples > 1)
            response = max(1, round(self.response * (1 + self.spread * positions[i])))
            ids = [1] * min(response, self.longest or response)
            prompt, reprompt = (
                [2 + number] + [1] * (max(1, round(length * around)) - 1)
                for number, length in ((question, self.prompt), (shown, self.reprompt))
            )
            rollout = Rollout(Question("", None, index=question), prompt, ids, torch.zeros(len(ids)), "", True)
            rows.append(Sample(rollout, Verdict(0.0), reprompt))
        return rows


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a run.

    Attributes:
        questions: Held-out questions, of all devices; None if unknown.
        batch: Questions of one device in one call of the engine; None for all.
        at_once: Maximum responses decoded at the same time; None for that of training.
        per_step: Evaluations per training step, over the whole run; None if they are not counted in steps.
    """

    questions: int | None
    batch: int | None = None
    at_once: int | None = None
    per_step: float | None = None


def with_demonstrations(rows: list[Sample], samples: int, length: int) -> list[Sample]:
    """Return the rows of HAPO's loss where every gate is open: in each group a demonstration for the shortest rollout.

    Args:
        rows: The sampled rows.
        samples: Responses per question.
        length: Tokens of a demonstration.
    """
    learned = list(rows)
    for start in range(0, len(rows), samples):
        i = min(range(start, start + samples), key=lambda i: rows[i].length)
        demonstration = replace(rows[i].rollout, response_ids=[1] * length, log_probs=torch.zeros(length))
        learned[i] = replace(rows[i], rollout=demonstration, demonstration=True)
    return learned


@dataclass(frozen=True)
class Layout:
    """The shape of one forward pass.

    Attributes:
        rows: Responses.
        width: Padded tokens of a row, without the prompt if prompts are shared.
        prompts: Number of shared prompts; 0 if every row contains its prompt.
        prompt: Padded tokens of a shared prompt.
        tokens: Response tokens with a loss, N.
        squares: Sum of the squared lengths of sequences that are concatenated in one row; 0 if there are none.
    """

    rows: int
    width: int
    prompts: int
    prompt: int
    tokens: int
    squares: int = 0

    @classmethod
    def of(cls, packed: Packed) -> "Layout":
        """Return the shape of packed sequences."""
        if isinstance(packed, Sequences):
            rows, width = packed.input_ids.shape
            return cls(rows, width, 0, 0, packed.targets.numel(), _squares(packed))
        (rows, width), (prompts, prompt) = packed.responses.shape, packed.prompts.shape
        return cls(rows, width, prompts, prompt, packed.targets.numel())

    @property
    def padded(self) -> int:
        """Number of padded tokens that pass through the layers."""
        return self.rows * self.width + self.prompts * self.prompt

    @property
    def pairs(self) -> int:
        """Number of pairs of query and key that attention multiplies, masked ones included; none between concatenated rows."""
        return self.squares or self.rows * self.width * (self.width + self.prompt) + self.prompts * self.prompt**2


def _squares(packed: Sequences) -> int:
    if packed.position_ids is None:
        return 0
    starts = [*(packed.position_ids[0] == 0).nonzero().flatten().tolist(), packed.position_ids.size(1)]
    return sum((stop - start) ** 2 for start, stop in pairwise(starts))


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass, packed for the student and, if there is one, for the teacher."""

    student: Packed
    teacher: Packed | None

    @property
    def weight(self) -> int:
        """Size by which micro-batches are compared: padded tokens, plus keys and values."""
        layouts = [Layout.of(packed) for packed in (self.student, self.teacher) if packed is not None]
        return max(layout.padded + layout.rows * (layout.prompt + layout.width) for layout in layouts)


def group(
    rows: list[Sample], budget: int, packings: tuple[Packing, Packing], with_teacher: bool, sharded: bool = False
) -> list[MicroBatch]:
    """Split rows into micro-batches as the module does, and pack them.

    Args:
        rows: Rows of one optimizer step on one device.
        budget: `update.micro_batch_tokens`.
        packings: Layouts of student and teacher.
        with_teacher: Whether there is a teacher with its own prompts.
        sharded: Whether weights are gathered for every pass.
    """

    def contexts(row: Sample) -> list[list[int]]:
        prompts = [row.rollout.prompt_ids]
        if with_teacher and row.reprompt_ids is not None:
            prompts.append(row.reprompt_ids)
        return prompts

    def pack(part: list[Sample], which: int) -> Packed:
        pairs = [(contexts(row)[which], row.rollout.response_ids) for row in part]
        return Sequences.pack(pairs, 0, torch.device("cpu"), packings[which])

    by_lengths: dict[Any, MicroBatch] = {}  # micro-batches of equal lengths have equal layouts
    batches = []
    for part in micro_batches(rows, budget, contexts, packings, sharded):
        prompts: dict[tuple[int, ...], int] = {}
        key = tuple(
            (row.length, *((prompts.setdefault(tuple(ids), len(prompts)), len(ids)) for ids in contexts(row)))
            for row in part
        )
        if key not in by_lengths:
            by_lengths[key] = MicroBatch(pack(part, 0), pack(part, 1) if with_teacher else None)
        batches.append(by_lengths[key])
    return batches
