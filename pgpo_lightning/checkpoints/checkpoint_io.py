"""Lightning's plug-in for checkpoints, with the file formats and checks of this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy

from pgpo_lightning.checkpoints.optimizer_states import by_position, read_by_position
from pgpo_lightning.checkpoints.sharded import check_shards, peek_shards, read_shards
from pgpo_lightning.checkpoints.single_file import check_file, peek, read_file, refuse_code, write_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Writes files atomically as a stream; reads files and folders of shards, and refuses code in them.

    Args:
        wanted: Selects the tensors of a folder to read into memory, by their names; by default all.
        mmap: Leave tensors in the file until they are used. Only if everything is copied from there.
    """

    def __init__(self, wanted: Callable[[str], bool] = lambda name: True, mmap: bool = False) -> None:
        self.wanted = wanted
        self.mmap = mmap

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file. Lightning writes to paths that are not local."""
        if states := checkpoint.get("optimizer_states"):
            checkpoint = checkpoint | {"optimizer_states": [by_position(state) for state in states]}
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return a checkpoint's content.

        `map_location` is not Lightning's default, a function, which torch refuses for quantised state such as torchao's.
        """
        if "://" in str(path) or weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only=weights_only is not False, **kwargs)
        if Path(path).is_dir():
            return read_shards(Path(path), self.wanted)
        if not Path(path).exists():
            raise FileNotFoundError(f"Expected a checkpoint, but {path} does not exist.")
        return read_file(Path(path), map_location, self.mmap)


def install(strategy: Strategy, evaluates: bool) -> bool:
    """Make a strategy use :class:`CheckpointFiles`, unless it was given another plug-in.

    A plug-in that wraps another, such as Lightning's ``AsyncCheckpointIO``, is kept and wraps this one.

    Args:
        strategy: Of the trainer.
        evaluates: Whether only the student is needed.

    Returns:
        Whether the strategy uses :class:`CheckpointFiles` now.
    """
    if isinstance(strategy, ModelParallelStrategy):
        read_by_position(strategy)
    outer: _WrappingCheckpointIO | None = None
    inner: CheckpointIO | None = strategy.checkpoint_io
    while isinstance(inner, _WrappingCheckpointIO):
        outer, inner = inner, inner.checkpoint_io
    if type(inner) not in (TorchCheckpointIO, CheckpointFiles):
        return False
    wanted = (lambda name: name.startswith("state_dict.model.")) if evaluates else (lambda name: True)
    # An optimizer on the CPU would keep using the pages of the file.
    files = CheckpointFiles(wanted, mmap=evaluates or strategy.root_device.type != "cpu")
    if outer is None:
        strategy.checkpoint_io = files
    else:
        outer._checkpoint_io = files  # its setter accepts the first one only
    return True


def check_checkpoint(path: Path) -> None:
    """Check that a checkpoint, a file or a folder of shards, is complete and contains nothing but data.

    Raises:
        DamagedCheckpointError: If it is damaged; names the file.
        ValueError: If it refers to code.
    """
    if path.is_dir():
        check_shards(path)
    else:
        check_file(path)
        refuse_code(str(path), str(path))


def peek_checkpoint(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint without reading its tensors.

    Raises:
        DamagedCheckpointError: If it cannot be read; names the file.
        ValueError: If it refers to code.
    """
    return peek_shards(path) if path.is_dir() else peek(path)
