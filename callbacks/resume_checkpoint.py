"""Checkpoints from which a killed run resumes bit for bit."""

import os
import uuid
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from pgpo_lightning.checkpoints.finding import MARK, look
from pgpo_lightning.checkpoints.sharded import finish_shards
from pgpo_lightning.checkpoints.single_file import claimed, not_saved, remove, remove_partials
from pgpo_lightning.core.files import PARTIAL, sync_folder
from pgpo_lightning.core.settings import Count, Text, checked
from pgpo_lightning.distributed.collectives import together
from pgpo_lightning.modules.on_policy import OnPolicyModule
from pgpo_lightning.monitoring.run_folder import folder_of

SUPERSEDED = ".superseded"
"""Suffix of a later checkpoint of a run that was resumed from an earlier one."""


@checked
class ResumeCheckpoint(Checkpoint):
    """Saves the whole state of the run every few steps, after the validation of that step.

    Lightning's ModelCheckpoint saves before that validation, and a run that is killed in between never logs it. A file named
    ``step=*.ckpt`` is always complete and on the disk before an older one is deleted. Files of other runs and programs are
    never deleted: every file records which run's ResumeCheckpoint wrote it.

    With a plug-in that writes in the background, such as Lightning's ``AsyncCheckpointIO``, there may be one file more than
    `keep`: an older file is deleted once the newer one exists.

    Args:
        every_n_train_steps: Batches between two checkpoints. The last step is always saved.
        keep: Number of checkpoints to keep, the newest ones; null for all. With 2 or more, `--ckpt_path last` falls back to an
            older one if the newest is damaged.
        dirpath: Folder; by default ``checkpoints`` in the folder of the run.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(self, every_n_train_steps: Count = 10, keep: Count | None = 1, dirpath: Text | None = None) -> None:
        self.every_n_train_steps = every_n_train_steps
        self.keep = keep
        self.dirpath = dirpath
        self.run = uuid.uuid4().hex
        self._own: list[Path] | None = None  # in the order of writing
        self._beside: list[ModelCheckpoint] = []
        self._due = False
        self._saving = False
        self._saved = -1

    def folder(self, trainer: L.Trainer) -> Path:
        """Return the folder of this run's checkpoints."""
        return Path(self.dirpath or folder_of(trainer) / "checkpoints")

    @property
    def newest(self) -> Path | None:
        """The last file that this process wrote, on the rank that writes; None before."""
        return self._own[-1] if self._own and self._saved >= 0 else None

    @property
    def best_model_path(self) -> str:
        """That of a ModelCheckpoint beside this one, where Lightning asks this one for it; empty without one."""
        return next((callback.best_model_path for callback in self._beside if callback.best_model_path), "")

    def setup(self, trainer: L.Trainer, pl_module: OnPolicyModule, stage: str) -> None:
        """Remember other callbacks that save checkpoints."""
        self._beside = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]

    def state_dict(self) -> dict[str, Any]:
        """Return the identifier of the run."""
        return {"run": self.run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the identifier of the resumed run."""
        self.run = state_dict["run"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: OnPolicyModule, checkpoint: dict[str, Any]) -> None:
        """Mark checkpoints that this callback writes."""
        if self._saving:
            checkpoint[MARK] = {"run": self.run}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OnPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, unless a validation follows."""
        self._due = pl_module.steps % self.every_n_train_steps == 0
        if self._due and not validates_next(trainer):
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Save after the validation."""
        if self._due and not trainer.sanity_checking:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Save the last step."""
        self._save(trainer, pl_module)

    def _save(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        self._due = False
        if trainer.fast_dev_run or self._saved == pl_module.steps:
            return
        self._saved = pl_module.steps
        folder = self.folder(trainer)
        with together():  # a failure on the first rank alone ends all ranks
            path = self._free(folder, pl_module.steps) if trainer.is_global_zero else folder
        path = trainer.strategy.broadcast(path)
        self._saving = True
        try:
            if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.strategy._save_distributed_checkpoint:
                _save_shards(trainer, path)
            else:
                _save_file(trainer, path)
        finally:
            self._saving = False
        with together():
            if trainer.is_global_zero:
                self._written(trainer, path)

    def _free(self, folder: Path, step: int) -> Path:
        """Return a name that no other file has, and find this run's files of earlier processes."""
        if self._own is None:
            found, _ = look(folder)
            own = [c for c in found if c.mark is not None and c.mark["run"] == self.run]
            self._own = [c.path for c in sorted(own, key=lambda c: (c.step <= step, c.modified))]
            for checkpoint in own if self.keep is None else ():
                if checkpoint.step > step:  # `last` would select it as the newest
                    checkpoint.path.rename(checkpoint.path.with_name(checkpoint.path.name + SUPERSEDED))
                    self._own.remove(checkpoint.path)
        path = folder / f"step={step:06d}.ckpt"
        number = 0
        while path.exists() and path not in self._own:
            number += 1
            path = folder / f"step={step:06d}-{number}.ckpt"
        return path

    def _written(self, trainer: L.Trainer, path: Path) -> None:
        own = [one for one in self._own or [] if one != path] + [path]
        if self.keep is not None:
            existing = [
                one for one in own if one.exists()
            ]  # a file that is written in the background may not exist yet
            for old in existing[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)
                own.remove(old)
        self._own = own


def _save_file(trainer: L.Trainer, path: Path) -> None:
    """Save, and fail on all ranks if the writing rank fails."""
    with together():
        try:
            trainer.save_checkpoint(path)
        except Exception:
            trainer.strategy.barrier("Trainer.save_checkpoint")  # the other ranks are waiting there
            raise


def validates_next(trainer: L.Trainer) -> bool:
    """Return whether an evaluation follows the batch that has just ended."""
    fetcher = trainer.fit_loop._data_fetcher
    loop = trainer.fit_loop.epoch_loop
    if fetcher is None or not loop._should_check_val_fx(fetcher):
        return False
    loop.val_loop.setup_data()  # as the evaluation itself would begin; without it the number of batches may be unknown
    return not loop.val_loop.skip


def _save_shards(trainer: L.Trainer, path: Path) -> None:
    """Save to a folder that gets its final name once all ranks have written all of it."""
    partial = path.with_name(path.name + PARTIAL)
    with together():
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_partials(path.parent)
            remove(partial)
            partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    try:
        with claimed(handle):
            trainer.save_checkpoint(partial)
            with together():  # a failure on the first rank alone ends all ranks
                if trainer.is_global_zero:
                    finish_shards(partial)
                    remove(path)
                    partial.replace(path)
                    sync_folder(path.parent)
    except (CheckpointException, OSError) as error:
        failures = [failure[0] for failure in error.failures.values()] if isinstance(error, CheckpointException) else []
        cause = next((each for each in [error, *failures] if isinstance(each, OSError)), None)
        if trainer.is_global_zero:
            remove(partial)
        if cause is None:  # torch's own error, which hides that of the system
            cause = OSError(str((failures or [error])[0]).splitlines()[0])
        raise not_saved(path, cause, _bytes(trainer)) from error
    finally:
        os.close(handle)


def _bytes(trainer: L.Trainer) -> int:
    """Return the size of the tensors in a checkpoint of all ranks, in bytes."""
    states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
    kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    tensors = [*trainer.lightning_module.parameters(), *trainer.lightning_module.buffers(), *kept]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
