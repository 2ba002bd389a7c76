"""How far a moving average in bf16 is from the exact one, in a real run, by the way in which it is rounded.

Beside a run's EMA teacher, which is fp32, stand averages of the same student in other types: the exact one in fp64; bf16, rounded
to nearest; bf16, rounded stochastically (``teacher.dtype: bfloat16``); and the difference to the student in bf16, which needs
the student before and after every step. After some steps all are run over the step's own reprompts and responses, in fp64::

    python -m benchmarks.ema_types fit --config configs/quickstart.yaml --model.teacher.update_rate 0.01

Columns: KL(exact average || each of them) in nats per response token; KL(exact average || student), both seeing the reprompt, for
the size of what the average is there for. The last two run the weights in fp32 and in bf16 with products in bf16, as
``bf16-mixed`` does: what the forward pass rounds is in them too.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.measure import print_table, write_json
from pgpo_lightning.commands.fit import PGPOCommand
from pgpo_lightning.losses.logits import Source
from pgpo_lightning.models.lm_head import source
from pgpo_lightning.models.loading import evaluating
from pgpo_lightning.models.packing import PackedSequences
from pgpo_lightning.modules import SDPO
from pgpo_lightning.teachers.ema import EMATeacher, NarrowEMATeacher

STEPS = (1, 2, 5, 10, 20)  # and every 20 from there on
KINDS = ("fp32", "nearest", "stochastic", "difference", "student", "fp32_mixed", "stochastic_mixed")
COLUMNS = {"step": "d", **dict.fromkeys(KINDS, ".2e")}


class Averages(L.Callback):
    """Follows a run with averages of its own; changes nothing in it."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: SDPO) -> None:
        """Start all averages where the teacher starts, and move them whenever it moves."""
        teacher, student = pl_module.teacher, pl_module.model
        if trainer.global_step or type(teacher) is not EMATeacher:
            raise ValueError(f"Expected a run of the EMA teacher from its start, but got a {type(teacher).__name__}.")
        self.rate = teacher.rate
        self.exact = [p.detach().double() for p in student.parameters()]
        self.nearest = [p.detach().bfloat16() for p in student.parameters()]
        self.stochastic = NarrowEMATeacher(student, self.rate)
        self.before = [p.detach().clone() for p in student.parameters()]
        self.difference = [torch.zeros_like(p, dtype=torch.bfloat16) for p in student.parameters()]
        self.scratch = copy.deepcopy(student).double()
        update = teacher.update

        def followed(model: PreTrainedModel) -> None:
            update(model)
            self.move(model)

        teacher.update = followed

    @torch.no_grad()
    def move(self, student: PreTrainedModel) -> None:
        """Move all averages towards the student."""
        self.stochastic.update(student)
        for exact, near, before, apart, new in zip(
            self.exact, self.nearest, self.before, self.difference, student.parameters(), strict=True
        ):
            exact.lerp_(new.double(), self.rate)
            near.copy_(near.float().lerp_(new, self.rate))
            apart.copy_((before + apart.float()).lerp_(new, self.rate) - new)
            before.copy_(new)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: SDPO, *_: Any) -> None:
        """Look at some steps."""
        step = pl_module.steps
        if step in STEPS or step % 20 == 0:
            self.rows.append({"step": step} | self._nats(pl_module))

    @torch.no_grad()
    def _nats(self, module: SDPO) -> dict[str, float]:
        rows = [row for row in module.last_samples if row.reprompt_ids is not None]
        sequences = module.learner.pack([(row.reprompt_ids, row.rollout.response_ids) for row in rows])
        temperature = module.learner.temperature
        fp32 = [p.detach() for p in module.teacher.model.parameters()]
        student = [p.detach() for p in module.model.parameters()]
        weights = {
            "fp32": fp32,
            "nearest": self.nearest,
            "stochastic": [p.detach() for p in self.stochastic.model.parameters()],
            "difference": [new.double() + apart.double() for new, apart in zip(student, self.difference, strict=True)],
            "student": student,
        }
        logits = {name: self._logits(own, sequences) for name, own in weights.items()}
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            for name, teacher in (("fp32_mixed", module.teacher), ("stochastic_mixed", self.stochastic)):
                logits[name] = _narrow_logits(teacher.sources(module.model, sequences)[0])
        exact = (self._logits(self.exact, sequences) / temperature).log_softmax(-1)
        others = {name: (each / temperature).log_softmax(-1) for name, each in logits.items()}
        return {name: float((exact.exp() * (exact - each)).sum(-1).mean()) for name, each in others.items()}

    def _logits(self, weights: list[Tensor], sequences: PackedSequences) -> Tensor:
        for own, new in zip(self.scratch.parameters(), weights, strict=True):
            own.copy_(new)
        with evaluating(self.scratch):
            found = source(self.scratch, sequences)
        return found.head(found.hidden)


def _narrow_logits(found: Source) -> Tensor:
    """Return the logits as the loss computes them: of operands in bf16, but not rounded themselves."""
    return replace(found.head, weight=found.head.weight.bfloat16().double())(found.hidden.bfloat16())


class _Command(PGPOCommand):
    def before_fit(self) -> None:
        super().before_fit()
        self.averages = Averages()
        self.trainer.callbacks.append(self.averages)


def main(args: list[str]) -> list[dict[str, float]]:
    """Run the training that the arguments of ``pgpo`` describe; print the table and leave ``ema_types.jsonl`` in its folder."""
    command = _Command(args)
    rows = command.averages.rows
    print_table("KL from the exact average", rows, COLUMNS)
    write_json(rows, Path(command.trainer.log_dir) / "ema_types.jsonl")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
