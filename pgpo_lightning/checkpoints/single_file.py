"""Checkpoint files: streamed to the disk, visible only when complete, and checked before they are used.

torch writes a CRC-32 of every record into a checkpoint's file, but does not check it. It is checked here, at about 2 GB/s, so
that bytes that changed on the disk or in a copy are found.
"""

import importlib
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pgpo_lightning.core.files import PARTIAL, replacing

try:
    import fcntl
except ImportError:  # Windows, where a partial file that is being written cannot be distinguished from an abandoned one
    fcntl = None  # type: ignore[assignment]

_whole: dict[Path, tuple[int, int, int]] = {}  # size, time and inode of files whose checksums were correct


class DamagedCheckpointError(ValueError):
    """A file is not a checkpoint, is truncated, or has other bytes than were written."""


class CheckpointNotSavedError(OSError):
    """A checkpoint could not be written, for example because the disk is full."""


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint without a copy in memory or in another folder.

    The file appears under its name only when it is complete and on the disk.

    Args:
        content: What ``torch.save`` takes.
        path: Of the file. Its folder is made.

    Raises:
        CheckpointNotSavedError: If it could not be written. The partial file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path.parent)
    stream = None
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with replacing(path) as file, claimed(file.stream.fileno()):
            stream = _Stream(file.stream)
            torch.save(content, stream)  # type: ignore[arg-type]  # which only writes and flushes
    except BaseException as error:
        cause = (stream and stream.error) or error  # torch raises another error than the original one
        if isinstance(cause, OSError):
            raise not_saved(path, cause, _size(content)) from error
        raise
    finally:
        torch.serialization.set_crc32_options(checksums)
    if names := unknown_types(path):
        rank_zero_warn(
            f"{path} cannot be loaded again, because a callback or a data module keeps {', '.join(names)} in its state. Use "
            "numbers, strings, tensors, lists and dicts there."
        )


def not_saved(path: Path, cause: OSError, size: int) -> CheckpointNotSavedError:
    """Return the error for a checkpoint that could not be written, with needed and free space.

    Args:
        path: Of the checkpoint.
        cause: Error of the system.
        size: Of the checkpoint, in bytes.
    """
    error = CheckpointNotSavedError(
        f"Expected to write a checkpoint of {size:,} bytes into {path.parent}, but got: {cause.strerror or cause} "
        f"({shutil.disk_usage(path.parent).free:,} bytes are free there). Earlier "
        "checkpoints are unchanged. Free space there and continue the run, or set `checkpoint.dirpath` to another folder."
    )
    error.errno = cause.errno
    return error


class _Stream:
    """A file that remembers its first error."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Flush at the end only."""


class _Counter:
    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Do nothing."""


def _size(content: dict[str, Any]) -> int:
    counter = _Counter()
    torch.save(content, counter)  # type: ignore[arg-type]
    return counter.size


@contextmanager
def claimed(handle: int) -> Iterator[None]:
    """Mark an open file or folder as being written. The system removes the mark when the process ends, in any way."""
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield


def remove_partials(folder: Path) -> None:
    """Remove partial checkpoints of processes that were killed while writing."""
    for path in folder.glob(f"*.ckpt*{PARTIAL}"):
        if not _is_claimed(path):
            remove(path)


def _is_claimed(path: Path) -> bool:
    if fcntl is None:
        return True
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(handle)
    except OSError:
        return True
    return False


def remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder of shards, if it exists."""
    if path.is_dir():
        for part in path.iterdir():
            part.unlink()
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Compare all bytes of a checkpoint's file with their checksums; once per file, unless it changes.

    Raises:
        DamagedCheckpointError: If the file is damaged; names it.
    """
    if not known(path):
        with path.open("rb") as file:
            check_zip(file, str(path))
        known(path, now=True)


def known(path: Path, now: bool = False) -> bool:
    """Return whether this process found a file's checksums correct, and the file has not changed since.

    Args:
        path: Of the file.
        now: Record that they are correct now.
    """
    state = path.stat()
    key = (state.st_size, state.st_mtime_ns, state.st_ino)
    if now:
        _whole[path.absolute()] = key
    return _whole.get(path.absolute()) == key


def check_zip(file: IO[bytes], where: str, only: str = "") -> None:
    """Compare a file of ``torch.save`` with its checksums.

    Args:
        file: At any position.
        where: Name of the file, for the message.
        only: Suffix of the records to compare; by default all.

    Raises:
        DamagedCheckpointError: If they differ, or it is not a file of ``torch.save``.
    """
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        raise DamagedCheckpointError(f"Expected a checkpoint, but {where} does not begin like one.")
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(only)]
            bad = next((name for name in names if not _is_whole(archive, name)), None)
    except Exception as error:  # damaged bytes may raise anything
        raise DamagedCheckpointError(
            f"Expected a whole checkpoint, but {where} is truncated or damaged ({error})."
        ) from None
    if bad is not None or not names:
        what = f"the checksum of `{bad}` is wrong" if bad else "it has no records"
        raise DamagedCheckpointError(f"Expected a checkpoint as it was written, but {where} is damaged: {what}.")


def _is_whole(archive: zipfile.ZipFile, name: str) -> bool:
    if archive.getinfo(name).external_attr & 0x10:  # torch would treat it as a folder, and return uninitialised memory
        return False
    try:
        with archive.open(name) as record:
            while record.read(1 << 22):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def unknown_types(file: Any) -> list[str]:
    """Return the types in a checkpoint's file that are neither data nor registered with torch. No code is run.

    The types of torchao's optimizers are registered.

    Args:
        file: A path, or a file that is open for reading.
    """
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if any(name.startswith("torchao.") for name in names):
        with suppress(ImportError):
            importlib.import_module("torchao.optim")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return sorted(names)


def refuse_code(file: Any, where: str) -> None:
    """Raise if a checkpoint refers to anything but data.

    Raises:
        DamagedCheckpointError: If its table of contents cannot be read.
        ValueError: If it refers to code; names it.
    """
    try:
        names = unknown_types(file)
    except Exception as error:
        raise DamagedCheckpointError(
            f"Expected a checkpoint of tensors and plain data, but {where} holds something else ({type(error).__name__})."
        ) from None
    if any(name.startswith("torchao.") for name in names):
        raise ValueError(f"Expected torchao to be installed, because an optimizer of it is in {where}.")
    if names:
        raise ValueError(
            f"Expected nothing but tensors and plain data in {where}, but it names {', '.join(names)}, and loading it may run "
            "code. It was not loaded."
        )


def read_file(path: Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Return the content of a checkpoint's file.

    Args:
        path: Of the file.
        map_location: As in ``torch.load``.
        mmap: Leave tensors in the file until they are used.

    Raises:
        DamagedCheckpointError: If it is damaged, or is not a checkpoint; names the file.
        ValueError: If it refers to code; names the file.
    """
    check_file(path)
    return _load(path, map_location, mmap)


def peek(path: Path) -> dict[str, Any]:
    """Return the content of :func:`read_file` in milliseconds: tensors stay in the file, unread and unchecked."""
    with path.open("rb") as file:
        check_zip(file, str(path), only="data.pkl")
    return _load(path, "cpu", mmap=True)


def _load(path: Path, map_location: Any, mmap: bool) -> dict[str, Any]:
    refuse_code(str(path), str(path))
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:
        lines = str(error).splitlines() or [""]
        # torch would advise to disable its safety check
        why = type(error).__name__ if "weights_only" in str(error) else f"{type(error).__name__}: {lines[0]}"
        raise DamagedCheckpointError(f"Expected a checkpoint, but {path} cannot be read ({why}).") from None
    if not isinstance(content, dict):
        raise DamagedCheckpointError(f"Expected a checkpoint, but {path} holds a {type(content).__name__}.")
    return content
