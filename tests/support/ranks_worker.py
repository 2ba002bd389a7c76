"""Trains on fixed rows under DDP or FSDP2, each rank with its own share; run by test_rank_equality.py.

Usage: python -m tests.support.ranks_worker OUTPUT RANKS SPLIT STRATEGY TEACHER PRECISION

SPLIT is `uneven` (ranks with unequal numbers of rows in the loss and of micro-batches), `one-sided` (rank 1 has no row with a
teacher at all), `routed` (likewise, but the rows without are reinforced, and the others share the step by the teacher's
certainty), `guided` (TGPO: likewise, without weights), `distilled` (OPD: every row), `contrasted` (CEPO; rank 1 has no row with
two prompts), `difficulty` (DRIFT; rank 1 has no row with a teacher, and so none with factors) or `updates` (two optimizer steps
per batch, each on half of the questions). With `uneven` under DDP the teacher is on the host. TEACHER `external` is the model
in the folder `teacher` beside OUTPUT, and `narrow` the average in bf16. A TEACHER that begins with `lora-` is that of an adapter
of rank 3, which two ranks cannot share evenly.
"""

import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from pgpo_lightning.callbacks import InformationMultiplier
from pgpo_lightning.distributed.fsdp import full_tensor
from pgpo_lightning.losses.information import information
from pgpo_lightning.losses.token_weights import TokenWeights
from pgpo_lightning.models.adapter import adapter
from pgpo_lightning.modules import CEPO, DRIFT, OPD, SDPO, SRPO, TGPO
from pgpo_lightning.teachers.configs import TeacherConfig
from pgpo_lightning.training.mini_batches import mini_batches
from tests.support.adapters import lora
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right, loader, random_rows, tiny_model

ROWS, STEPS = 8, 3
STRATEGIES = {
    "one": lambda ranks: "auto",
    "ddp": lambda ranks: "ddp",
    "fsdp2": lambda ranks: ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1),
}


def rows_of(step, split):
    rows = random_rows(ROWS, seed=step)
    masked = {"uneven": [4, 5, 6], "one-sided": [4, 5, 6, 7], "routed": [2, 4, 5, 6, 7], "contrasted": [3, 7],
              "updates": [4, 6]}  # fmt: skip
    masked["guided"], masked["difficulty"] = masked["routed"], masked["one-sided"]
    masked["distilled"] = []
    for i in masked[split]:
        rows[i].reprompt_ids = None
        rows[i].advantage = 0.75 if i % 2 else -0.25
    if split == "difficulty":  # 0 and 2 are distilled, 1 and 3 have factors, 5 and 7 have none, 4 and 6 no loss
        rows[1].advantage = rows[3].advantage = 0.75
    if split == "contrasted":
        for i, (row, other) in enumerate(zip(rows, random_rows(ROWS, seed=step + 100), strict=True)):
            row.advantage = 0.75 if i % 2 else -0.25
            row.contrast_ids = other.reprompt_ids if i < 3 else None
    return rows


class Fixed:
    """Everything after sampling, on rows that are split between ranks."""

    def training_step(self, batch, batch_idx):
        rows = rows_of(self.steps, self.split)
        share = ROWS // self.trainer.world_size
        self.scalars = {}
        mine = rows[self.global_rank * share : (self.global_rank + 1) * share]
        if self.trainer.world_size == 1 and self.split == "updates":  # the shares that two ranks have together
            mine = [row for question in (0, 2, 1, 3) for row in rows if row.rollout.question.index == question]
        for part in mini_batches(mine, 2 if self.split == "updates" else 1):
            step = self.learner.accumulate(part, self.manual_backward, self._no_sync)
            self.step_statistics = step.statistics
            self.scalars |= step.scalars
            self.learner.apply(self.optimizers(), step, self.scalars, self._scaler, self.steps)
            signal = information(self.step_statistics)
            self.norms.append(self.scalars["actor/grad_norm"])
            self.seen.append((step.loss, signal.value, signal.standard_error, self.scalars["lr/multiplier"]))
        self.learner.move_teacher()
        self.steps += 1


class FixedSDPO(Fixed, SDPO):
    pass


class FixedSRPO(Fixed, SRPO):
    pass


class FixedCEPO(Fixed, CEPO):
    pass


class FixedDRIFT(Fixed, DRIFT):
    def configure_model(self):
        super().configure_model()
        self.objective.warming_up = False


class FixedTGPO(Fixed, TGPO):
    pass


class FixedOPD(Fixed, OPD):
    pass


MODULES = {
    "routed": FixedSRPO,
    "guided": FixedTGPO,
    "distilled": FixedOPD,
    "contrasted": FixedCEPO,
    "difficulty": FixedDRIFT,
}


def main():
    output, ranks, split, strategy, teacher, precision = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
    adapted, teacher = teacher.startswith("lora-"), teacher.removeprefix("lora-")
    torch.set_num_threads(1)
    routed = split == "routed"
    given = {"allocation": TokenWeights("token", 2.0, None, "teacher-certainty")} if routed else {}
    offload = (split, strategy) == ("uneven", "ddp")
    if teacher == "external":
        given |= {"teacher": TeacherConfig(model=str(Path(output).parent / "teacher"), offload=offload)}
    elif teacher == "narrow":
        given |= {"teacher.dtype": "bfloat16", "teacher_update_rate": 0.3, "teacher_offload": offload}
    else:
        given |= {"teacher_regularization": teacher, "teacher_offload": offload}
    if strategy == "fsdp2-once":
        given |= {"update.reduce_every_pass": False}
    if adapted:
        given |= {"lora": lora(r=3)}
    limits = {**LIMITS, "guidance": 0.1} if split == "guided" else LIMITS
    if split in ("guided", "distilled"):
        del limits["max_reprompt_len"]  # the teacher reads the student's prompt
    module = build(MODULES.get(split, FixedSDPO),
        tiny_model(), half_right, tokenizer=TOKENIZER, micro_batch_tokens=120,
        loss_agg_mode="token-mean" if split != "one-sided" else "seq-mean-token-mean",
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2 if adapted else 1e-3), **limits, **given,
    )  # fmt: skip
    module.split, module.seen, module.norms = split, [], []
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=STRATEGIES[strategy.removesuffix("-once")](ranks), max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, precision=precision,
        callbacks=[InformationMultiplier(sensitivity=20.0, rho_min=None, rho_max=10.0)],
    )  # fmt: skip
    trainer.fit(module, loader(range(STEPS * ranks), 1))
    weights = torch.cat([full_tensor(p.detach()).flatten() for p in module.model.parameters()])
    theirs = getattr(module.teacher, "model", module.model)
    teacher = torch.cat([full_tensor(p.detach()).flatten() for p in theirs.parameters()])
    adapters = {name: full_tensor(p.detach()) for name, p in adapter(module.model).items()}
    found = {"seen": module.seen, "norms": module.norms, "weights": weights, "teacher": teacher, "adapter": adapters}
    torch.save(found, f"{output}.{trainer.global_rank}")


if __name__ == "__main__":
    main()
