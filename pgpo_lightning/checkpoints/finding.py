"""Find the checkpoint of `--ckpt_path` and `pgpo export`: the last, the best of a ModelCheckpoint, or one by its path."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_utilities import module_available

from pgpo_lightning.checkpoints.checkpoint_io import check_checkpoint, peek_checkpoint
from pgpo_lightning.checkpoints.sharded import INDEX
from pgpo_lightning.checkpoints.single_file import DamagedCheckpointError

PATTERN = "*.ckpt"
MARK = "resume_checkpoint"
"""Entry of a checkpoint that only ResumeCheckpoint writes."""


@dataclass(frozen=True)
class Checkpoint:
    """Description of a checkpoint of this program.

    Attributes:
        path: A file or a folder of shards.
        step: Batches trained on.
        modified: Time of writing, in nanoseconds.
        mark: Of the ResumeCheckpoint that wrote it; ``None`` for other writers.
        resumable: Whether it has more than weights.
        scores: The states of ModelCheckpoints in it, by Lightning's keys.
    """

    path: Path
    step: int
    modified: int
    mark: dict[str, Any] | None
    resumable: bool
    scores: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, path: Path) -> "Checkpoint | None":
        """Return the description of a checkpoint, without reading its tensors; ``None`` if it is another program's.

        Raises:
            DamagedCheckpointError: If it cannot be read.
            ValueError: If it refers to code.
        """
        content = peek_checkpoint(path)
        about, callbacks = content.get("pgpo_lightning"), content.get("callbacks", {})
        if about is None:
            return None
        return cls(
            path,
            about["steps"],
            path.stat().st_mtime_ns,
            content.get(MARK),
            "loops" in content and "callbacks" in content,
            {key: state for key, state in callbacks.items() if key.startswith("ModelCheckpoint{")},
        )


def look(folder: Path) -> tuple[list[Checkpoint], list[ValueError]]:
    """Return the checkpoints of this program in a folder, of any writer, the newest first; and the errors of unreadable ones.

    The newest has the most steps. Among checkpoints of one step, ResumeCheckpoint's is newer, because it is written after the
    step's evaluation; otherwise the one that was written later.
    """
    found, errors = [], []
    for path in sorted(folder.glob(PATTERN)):
        try:
            checkpoint = Checkpoint.of(path)
        except ValueError as error:
            errors.append(error)
        else:
            found += [checkpoint] if checkpoint else []
    return sorted(found, key=lambda c: (c.step, c.mark is not None, c.modified), reverse=True), errors


def newest_checkpoint(folder: Path, resume: bool = True) -> Path:
    """Return the newest complete checkpoint in a folder, of any writer. Warns of damaged ones that are skipped.

    Args:
        folder: Of checkpoints.
        resume: Whether it must have more than weights.

    Raises:
        FileNotFoundError: If there is none.
        DamagedCheckpointError: If all are damaged.
    """
    found, errors = look(folder)
    for checkpoint in found:
        if resume and not checkpoint.resumable:
            continue
        try:
            check_checkpoint(checkpoint.path)
        except ValueError as error:
            errors.append(error)
            continue
        for damage in errors:
            warnings.warn(f"{damage} Taken is {checkpoint.path} of step {checkpoint.step} instead.", stacklevel=2)
        return checkpoint.path
    if errors:
        raise DamagedCheckpointError(f"{errors[-1]} There is no other in {folder}: start without `--ckpt_path`.")
    if found:
        raise FileNotFoundError(
            f"Expected a checkpoint in {folder} to resume from, but {found[0].path.name} has nothing but weights. Start with "
            "them through `pgpo export`."
        )
    others = any(folder.glob(PATTERN))
    what = f"those in {folder} are of another program" if others else f"there is none in {folder}"
    raise FileNotFoundError(
        f"Expected a checkpoint `{PATTERN}` to resume from, but there is none: {what}. "
        "`--ckpt_path last-or-new` starts anew."
    )


def best_checkpoint(folder: Path) -> Path:
    """Return the best checkpoint of a run's ModelCheckpoint.

    Its path is read from the newest checkpoint that has it. The file may have been moved together with its folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    found, _ = look(folder)
    # A ModelCheckpoint that saved after ResumeCheckpoint, at the same step, has the newer path.
    for checkpoint in sorted(found, key=lambda c: (c.step, c.modified), reverse=True):
        for state in checkpoint.scores.values():
            best = state.get("best_model_path")
            if not best or state.get("monitor") is None:
                continue
            for path in (Path(best), folder / Path(best).name):
                if path.exists():
                    check_checkpoint(path)
                    return path
    raise FileNotFoundError(
        f"Expected `best` to be that of a ModelCheckpoint with a `monitor`, but no checkpoint in {folder} has one. Give a "
        "path or `last`, or add lightning.pytorch.callbacks.ModelCheckpoint to `trainer.callbacks` when training."
    )


def resolve(wanted: str, folder: Path, resume: bool) -> str:
    """Return the path of the checkpoint for a `--ckpt_path`.

    Args:
        wanted: ``last``, ``best``, ``hpc`` (Lightning's, for SLURM), an address, or the path of a checkpoint or of a run.
        folder: Of the run's checkpoints.
        resume: Whether the run resumes from it, which requires more than weights.

    Raises:
        FileNotFoundError: If there is none.
        DamagedCheckpointError: If it is damaged.
        ValueError: If it is not a checkpoint.
    """
    if wanted == "last":
        return str(newest_checkpoint(folder, resume))
    if wanted == "best":
        return str(best_checkpoint(folder))
    if re.match(r"registry\b", wanted) and not Path(wanted).exists():
        if module_available("litmodels"):
            return wanted
        raise ValueError(
            f"Expected `ckpt_path` without litmodels to be last, best or a path, but got {wanted}. Install litmodels."
        )
    if wanted == "hpc" or "://" in wanted:
        return wanted
    path = Path(wanted)
    if not path.exists():
        raise FileNotFoundError(
            f"Expected `ckpt_path` to be last, best, or the path of a checkpoint or a run, but {wanted} does not exist."
        )
    if path.is_dir() and not (path / INDEX).is_file():
        inner = path / "checkpoints"
        return str(newest_checkpoint(inner if inner.is_dir() else path, resume))
    check_checkpoint(path)
    return wanted
