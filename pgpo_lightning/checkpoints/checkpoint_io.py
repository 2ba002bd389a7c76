"""How the Trainer reads and writes checkpoints: Lightning's plug-in, with the files of this project."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import Strategy

from pgpo_lightning.checkpoints.sharded import check_shards, peek_shards, read_shards
from pgpo_lightning.checkpoints.single_file import check_file, peek, read_file, refuse_code, write_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Writes files as a stream and all at once; reads whole files and folders of shards, and no code in them.

    Args:
        wanted: Of a folder's tensors, by their names, those to read into this process' memory; by default all.
        mmap: Leave tensors in the file until they are used. Only where everything is copied from there.
    """

    def __init__(self, wanted: Callable[[str], bool] = lambda name: True, mmap: bool = False) -> None:
        self.wanted = wanted
        self.mmap = mmap

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file. What is no local path is Lightning's business."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return a checkpoint's content.

        By default Lightning says where to by a function, which torch does not take for quantised state such as torchao's.
        """
        if "://" in str(path) or weights_only is False:
            return super().load_checkpoint(path, map_location, weights_only=weights_only is not False, **kwargs)
        if Path(path).is_dir():
            return read_shards(Path(path), self.wanted)
        if not Path(path).exists():
            raise FileNotFoundError(f"Expected a checkpoint, but {path} does not exist.")
        return read_file(Path(path), map_location, self.mmap)


def install(strategy: Strategy, evaluates: bool) -> bool:
    """Let a strategy write and read by :class:`CheckpointFiles`, unless it was given another plug-in.

    One that wraps another, as Lightning's ``AsyncCheckpointIO`` does, is kept and wraps this.

    Args:
        strategy: The trainer's.
        evaluates: Whether nothing but the student is needed.

    Returns:
        Whether files are this project's now.
    """
    outer: _WrappingCheckpointIO | None = None
    inner: CheckpointIO | None = strategy.checkpoint_io
    while isinstance(inner, _WrappingCheckpointIO):
        outer, inner = inner, inner.checkpoint_io
    if type(inner) not in (TorchCheckpointIO, CheckpointFiles):
        return False
    wanted = (lambda name: name.startswith("state_dict.model.")) if evaluates else (lambda name: True)
    # An optimizer on the CPU would go on with the file's own pages.
    files = CheckpointFiles(wanted, mmap=evaluates or strategy.root_device.type != "cpu")
    if outer is None:
        strategy.checkpoint_io = files
    else:
        outer._checkpoint_io = files  # its setter only takes a first one
    return True


def check_checkpoint(path: Path) -> None:
    """Check that a checkpoint, a file or a folder of shards, is whole and holds data alone.

    Raises:
        DamagedCheckpointError: If it is not whole; names the file.
        ValueError: If it names code.
    """
    if path.is_dir():
        check_shards(path)
    else:
        check_file(path)
        refuse_code(str(path), str(path))


def peek_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds without reading its tensors.

    Raises:
        DamagedCheckpointError: If it cannot be read; names the file.
        ValueError: If it names code.
    """
    return peek_shards(path) if path.is_dir() else peek(path)
