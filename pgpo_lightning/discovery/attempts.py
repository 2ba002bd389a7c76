"""The file of a run's attempts: appended batch by batch, so that a killed run goes on after its last whole batch.

A line holds one attempt. A batch is one write that is on the disk before the run goes on (``fsync``). A process or a machine that
dies inside the write leaves a part of a batch at the end. It is dropped when the file is opened again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pgpo_lightning.core.files import sync_folder
from pgpo_lightning.core.types import Sample

FILE = "attempts.jsonl"
"""Name of the file within the folder of a run."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at the question of a run.

    Attributes:
        number: Its place in the run, from 1 on, counted in generations.
        batch: Number of the batch that it was sampled in, from 0 on.
        text: The response without special tokens.
        reward: The verifier's.
        success: Whether the reward reaches the threshold.
        feedback: The verifier's, else the question's `privileged_context`, if there is any.
        tokens: Response tokens, end-of-sequence included.
        prompt_tokens: Tokens of the prompt that the student answered.
        update_tokens: Tokens that student and teacher read for the update after the batch; 0 where nothing was learnt from it.
        seconds: Its share of the wall-clock time of sampling and judging the batch.
        update_seconds: Its share of the rest of the step, the update.
        finished: Whether the response ended by itself.
    """

    number: int
    batch: int
    text: str
    reward: float
    success: bool
    feedback: str | None
    tokens: int
    prompt_tokens: int
    update_tokens: int
    seconds: float
    update_seconds: float
    finished: bool


class AttemptsFile:
    """Reads and appends the attempts of one run.

    Args:
        folder: Of the run. Created with the first batch.
        size: Attempts per batch.
    """

    def __init__(self, folder: str | Path, size: int) -> None:
        self.path, self.size = Path(folder) / FILE, size

    def read(self) -> list[Attempt]:
        """Return the attempts of all whole batches, in their order. The file stays as it is.

        Raises:
            ValueError: If a line before the last batch is not an attempt; names file and line.
        """
        return self._whole()[0]

    def repair(self) -> list[Attempt]:
        """Return what :meth:`read` returns, and cut off the part of a batch behind it.

        Raises:
            ValueError: As :meth:`read`.
        """
        attempts, end = self._whole()
        if self.path.exists() and end < self.path.stat().st_size:
            with self.path.open("r+b") as file:
                file.truncate(end)
                os.fsync(file.fileno())
        return attempts

    def append(self, batch: Sequence[Attempt]) -> None:
        """Write a batch, and return when it is on the disk.

        Raises:
            OSError: If it cannot be written.
        """
        text = "".join(json.dumps(asdict(attempt), ensure_ascii=False, allow_nan=False) + "\n" for attempt in batch)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(self.path.parent)

    def _whole(self) -> tuple[list[Attempt], int]:
        """Return the attempts of whole batches and the position in bytes where they end."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        attempts: list[Attempt] = []
        for line in lines:
            attempt = _attempt(line)
            if attempt is None or attempt.number != len(attempts) + 1:
                break
            attempts.append(attempt)
        # One write may have been lost, not more: what follows a bad line belongs to the same batch.
        if len(lines) - len(attempts) > self.size:
            raise ValueError(
                f"Expected {self.path} to hold attempt {len(attempts) + 1} in line {len(attempts) + 1}, but got "
                f"{lines[len(attempts)][:80]!r}. Delete the folder, so that the run is made again."
            )
        kept = len(attempts) // self.size * self.size
        return attempts[:kept], sum(map(len, lines[:kept]))


def batch_of(
    samples: Sequence[Sample], threshold: float, batch: int, seconds: float, update_seconds: float
) -> list[Attempt]:
    """Return the attempts of one batch.

    Args:
        samples: As a training step leaves them, or without a teacher's prompt.
        threshold: Rewards of at least this are successes.
        batch: Number of the batch, from 0 on.
        seconds: Of sampling and judging the batch.
        update_seconds: Of the rest of the step.
    """
    count = len(samples)
    return [
        Attempt(
            number=batch * count + i + 1,
            batch=batch,
            text=sample.rollout.text,
            reward=sample.verdict.reward,
            success=sample.verdict.reward >= threshold,
            feedback=sample.verdict.feedback or sample.rollout.question.privileged_context,
            tokens=sample.length,
            prompt_tokens=len(sample.rollout.prompt_ids),
            update_tokens=_update_tokens(sample),
            seconds=round(seconds / count, 6),
            update_seconds=round(update_seconds / count, 6),
            finished=sample.rollout.finished,
        )
        for i, sample in enumerate(samples)
    ]


def _update_tokens(sample: Sample) -> int:
    if sample.reprompt_ids is None:
        return 0
    return len(sample.rollout.prompt_ids) + len(sample.reprompt_ids) + 2 * sample.length


def _attempt(line: bytes) -> Attempt | None:
    if not line.endswith(b"\n"):
        return None
    try:
        content: Any = json.loads(line)
        return Attempt(**{field.name: content[field.name] for field in fields(Attempt)})
    except (ValueError, KeyError, TypeError):
        return None
