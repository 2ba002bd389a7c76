"""Writes the answers of ``Trainer.predict``."""

from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from heapq import merge
from json import loads
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BasePredictionWriter

from pgpo_lightning.core.files import replacing
from pgpo_lightning.core.texts import json_line
from pgpo_lightning.distributed.collectives import on_first_rank
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.monitoring.run_folder import folder_of


class AnswerWriter(BasePredictionWriter):
    """Writes the answers of ``Trainer.predict`` of all ranks, one question per line, in the order of the questions.

    The file is ``predict/step=<step>-<hash>.jsonl`` in the folder of the run; the hash is that of its content. A line is what
    :meth:`~pgpo_lightning.training.evaluator.Evaluator.predict` returns for a question. `pgpo predict` has this callback.

    Attributes:
        path: The file, once it is written.
    """

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")
        self.path: Path | None = None

    def write_on_epoch_end(
        self, trainer: L.Trainer, pl_module: OnPolicyModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the answers on the first rank."""
        folder = folder_of(trainer) / "predict"  # a collective: every rank has to ask
        rows = sorted(_rows(predictions), key=lambda row: row["index"])
        lines = (json_line(row).encode() for row in rows)
        if not trainer.fast_dev_run:
            self.path = on_first_rank(lines, partial(_write, folder, pl_module.steps))


def _rows(predictions: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield the questions of all batches, of one data loader or of several."""
    for each in predictions:
        if isinstance(each, dict):
            yield each
        else:
            yield from _rows(each)


def _write(folder: Path, step: int, parts: list[Iterator[bytes]]) -> Path:
    name, last = sha256(), -1
    with replacing(folder / f"step={step:06d}.jsonl") as file:
        for line in merge(*parts, key=lambda line: loads(line)["index"]):
            index = loads(line)["index"]
            if index != last:  # some strategies give a question to two ranks, for batches of one size
                name.update(line)
                file.stream.write(line + b"\n")
            last = index
        file.path = folder / f"step={step:06d}-{name.hexdigest()[:8]}.jsonl"
    return file.path
