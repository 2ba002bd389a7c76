"""The folder of a run: its lock, the progress of the run, and the files of a run without a checkpoint."""

import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Literal

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pgpo_lightning.checkpoints.finding import PATTERN
from pgpo_lightning.monitoring.configurations import CONFIG
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.monitoring.run_record import FILE

LOCK = ".lock"

WRITTEN_EARLY = (
    CONFIG,
    "hparams.yaml",
    "events.out.tfevents.*",
    "metrics.csv",
    "csv/version_*/metrics.csv",
    "csv/version_*/hparams.yaml",
    "rollouts/step=*.jsonl",
    "validation/step=*.jsonl",
    "validation/step=*.partial",
    "checkpoints/*.partial",
    "stability.png",
    "summary.json",
    "run.json.*.partial",
    "summary.json.*.partial",
    "stability.png.*.partial",
)
"""Files that a run writes into its folder before its first checkpoint, and at its end."""


def folder_of(trainer: L.Trainer) -> Path:
    """Return the folder of a run. A collective operation: all ranks have to call it.

    It does not depend on the loggers of a run that `pgpo` has started. From Python it is the folder of the first
    ``TensorBoardLogger`` or ``CSVLogger``, which Lightning numbers, such as ``lightning_logs/version_0``. Without one it is
    `trainer.default_root_dir`.
    """
    chosen = getattr(trainer, "run_folder", None)
    folders = [logger.log_dir for logger in trainer.loggers if isinstance(logger, (TensorBoardLogger, CSVLogger))]
    return Path(trainer.strategy.broadcast(chosen or next(iter(folders), trainer.default_root_dir)))


State = Literal["new", "begun", "started", "finished"]


def state(folder: Path, checkpoints: Path | None = None) -> State:
    """Return the progress of the run in a folder.

    Args:
        folder: Of the run.
        checkpoints: Folder of its checkpoints, if they are elsewhere.

    Returns:
        ``new``: no files of a run. ``begun``: files, but no checkpoint. ``started``: a checkpoint to resume from.
        ``finished``: a record.
    """
    if (folder / FILE).exists():
        return "finished"
    if any((checkpoints or folder / "checkpoints").glob(PATTERN)):
        return "started"
    return "begun" if any(written_early(folder)) else "new"


def has_steps(folder: Path) -> bool:
    """Return whether a run has left something of a training step."""
    if any(any(folder.glob(pattern)) for pattern in ("rollouts/step=*.jsonl", "metrics.csv", "csv/*/metrics.csv")):
        return True
    return any(step > 0 for points in read_scalars(folder).values() for step in points)


def written_early(folder: Path) -> Iterator[Path]:
    """Yield the files that a run writes before its first checkpoint."""
    for pattern in WRITTEN_EARLY:
        yield from folder.glob(pattern)


def clear(folder: Path) -> None:
    """Remove the files that a run writes before its first checkpoint, and nothing else."""
    for path in list(written_early(folder)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for inner in (folder / name for name in ("validation", "rollouts", "checkpoints")):
        if inner.is_dir() and not any(inner.iterdir()):
            inner.rmdir()


def finished_steps(folder: Path) -> int:
    """Return the number of steps of a finished run; -1 if its record cannot be read."""
    try:
        return int(json.loads((folder / FILE).read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


class Lock:
    """Prevents a second run in a folder. The system releases it when the process ends, in any way.

    Args:
        folder: Created if it does not exist.

    Raises:
        ValueError: If another process holds the lock.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK
        self._new = not self.path.exists()
        self._file: IO[str] | None = self.path.open("a+", encoding="utf-8")
        try:
            import fcntl  # not on Windows

            # Not flock(), which a forked worker would keep holding.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._file.seek(0)
                holder = self._file.read().strip() or "another process"
                self._file.close()
                raise ValueError(
                    f"Expected a folder that no other run is writing to, but {folder} is in use by {holder}. Wait until it has "
                    "ended, or choose another `--trainer.default_root_dir`."
                ) from None
            rank_zero_warn(
                f"A second run in {folder} cannot be prevented, because its file system has no locks ({error.strerror})."
            )

    def sign(self) -> None:
        """Write the holder into the file."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.write(
                f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            )
            self._file.flush()

    def release(self, refused: bool = False) -> None:
        """Release the lock.

        Args:
            refused: Whether the run was refused, so that its files are removed.
        """
        if self._file is None:
            return
        if refused and self._new:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):
                self.path.parent.rmdir()  # if it is empty
        elif not refused:
            self._file.truncate(0)
        self._file.close()
        self._file = None
