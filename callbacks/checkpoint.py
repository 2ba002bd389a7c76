"""Checkpoints from which a killed run continues as if it had not been killed."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

PATTERN = "step=*.ckpt"


class ResumeCheckpoint(Checkpoint):
    """Saves the whole state of the run every few steps, after the validation that belongs to the step.

    Lightning's ModelCheckpoint saves before that validation, and a run that is killed in between never logs it. Writes to a
    temporary name first, so that a file named ``step=*.ckpt`` is always whole.

    Args:
        every_n_train_steps: Batches between two checkpoints. The last step is saved in any case.
        keep: How many of the newest are kept; null for all.
        dirpath: Folder; by default ``checkpoints`` in the folder of the log.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(self, every_n_train_steps: int = 10, keep: int | None = 1, dirpath: str | None = None) -> None:
        if every_n_train_steps < 1 or (keep is not None and keep < 1):
            raise ValueError(
                f"Expected `every_n_train_steps` and `keep` to be at least 1, but got {every_n_train_steps} and {keep}."
            )
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.dirpath = dirpath
        self._due = False
        self._saved = -1

    def folder(self, trainer: L.Trainer) -> Path:
        """Return where the checkpoints of this run are."""
        return Path(self.dirpath or Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, or wait for the validation that is about to start."""
        self._due = pl_module.steps % self.every_n_train_steps == 0
        loop = trainer.fit_loop
        if self._due and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what had to wait."""
        if self._due and not trainer.sanity_checking:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step."""
        self._save(trainer, pl_module)

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._due = False
        folder = self.folder(trainer)
        path = folder / f"step={pl_module.steps:06d}.ckpt"
        if trainer.fast_dev_run or self._saved == pl_module.steps:
            return
        self._saved = pl_module.steps
        partial = path.with_suffix(".partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            if path.is_dir():  # of shards, which nothing can be moved onto
                shutil.rmtree(path)
            os.replace(partial, path)
            if self.keep is not None:
                for old in sorted(folder.glob(PATTERN))[: -self.keep]:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        trainer.strategy.barrier("checkpoint")


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint in a folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    found = sorted(folder.glob(PATTERN))
    if not found:
        raise FileNotFoundError(
            f"Expected a checkpoint `{PATTERN}` in {folder} to resume from, but there is none. Start without `--ckpt_path`."
        )
    return found[-1]
