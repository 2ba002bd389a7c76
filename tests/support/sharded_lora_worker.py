"""Trains an adapter on a base that FSDP2 shards, at once and in parts; run by test_sharded_lora.py.

Usage: python -m tests.support.sharded_lora_worker FOLDER, once per rank. FOLDER has the base in `base`, and gets a run `shards`
whose checkpoints are folders, a run `file` whose checkpoints are files, and `RUN-continued` from the first checkpoint of each.
"""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from pgpo_lightning.callbacks import ResumeCheckpoint
from pgpo_lightning.data import ToyArithmetic
from pgpo_lightning.distributed.fsdp import full_tensor
from pgpo_lightning.modules import SDPO
from tests.support.adapters import base_weights, lora
from tests.support.helpers import LIMITS, TOKENIZER, build, half_right

STEPS = 2


class Recording(SDPO):
    """Keeps which weights were whole before FSDP2 had them, and how far the sampler was from the trainer."""

    def configure_model(self):
        load, self.gaps = self.student.load, []

        def watched(*args):
            model = load(*args)
            self.whole = [name for name, weight in model.named_parameters() if not isinstance(weight, DTensor)]
            return model

        self.student.load = watched
        super().configure_model()

    def on_train_batch_end(self, *_):
        self.gaps.append(self.scalars["rollout_corr/gap"])


def fit(folder, name, one_file, start=None):
    torch.manual_seed(0)
    module = build(Recording,
        str(folder / "base"), half_right, tokenizer=TOKENIZER, lora=lora(r=3, lora_alpha=6), num_generations=4, eval_samples=2,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **LIMITS,
    )  # fmt: skip
    saving = ResumeCheckpoint(every_n_train_steps=1, keep=None, dirpath=str(folder / name))
    strategy = ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=not one_file
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=STEPS, max_epochs=-1, logger=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, check_val_every_n_epoch=None, val_check_interval=STEPS,
        default_root_dir=folder / name, callbacks=[saving],
    )  # fmt: skip
    trainer.fit(module, ToyArithmetic(batch_size=4, eval_batch_size=4, limit_train=16, limit_val=4), ckpt_path=start)
    return module


def main(folder):
    torch.set_num_threads(1)
    for name, one_file in (("shards", False), ("file", True)):
        module = fit(folder, name, one_file)
        fit(folder, f"{name}-continued", one_file, folder / name / "step=000001.ckpt")
    teacher = [isinstance(weight, DTensor) for weight in module.teacher.parameters()]
    base = {name: full_tensor(weight) for name, weight in base_weights(module.model).items()}
    found = {"whole": module.whole, "gaps": module.gaps, "teacher": teacher, "base": base}
    torch.save(found, folder / f"found.{os.environ['RANK']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
