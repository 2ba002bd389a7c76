"""Folders of shards, as FSDP2 writes them with `save_distributed_checkpoint`: check them, and read them in any process.

torch reads the index of such a folder with pickle, which runs the code that it refers to; here only data is accepted. Every
tensor in a shard is a small file of ``torch.save`` with its own checksums.
"""

import io
import os
import pickle
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from pgpo_lightning.checkpoints.optimizer_states import by_position
from pgpo_lightning.checkpoints.single_file import (
    DamagedCheckpointError,
    check_file,
    check_zip,
    known,
    peek,
    read_file,
    refuse_code,
)
from pgpo_lightning.core.files import sync_folder

INDEX, REST, CHECKSUM = ".metadata", "meta.pt", "metadata.crc32"
_DATA = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


def read_shards(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Return the content that the checkpoint would have as a single file, on the CPU.

    Args:
        folder: As Lightning's ``ModelParallelStrategy(save_distributed_checkpoint=True)`` writes it.
        wanted: Selects the tensors to read, by their names: ``state_dict.model.…``, ``optimizer_0.state.…``; by default all.

    Raises:
        DamagedCheckpointError: If it is not such a folder, or a part is missing or damaged.
        ValueError: If it refers to anything but data.
    """
    check_shards(folder)
    reader, index = _Reader(folder), _index(folder)
    flat: dict[str, Any] = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype) if isinstance(kept, TensorStorageMetadata) else None
        for name, kept in index.state_dict_metadata.items()
        if wanted(name)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # every process reads alone
        load(flat, storage_reader=reader, planner=_Planner(), no_dist=True)
    content: dict[Any, Any] = {}
    for name, value in flat.items():
        *outer, last = index.planner_data[name]
        inner = content
        for step in outer:
            inner = inner.setdefault(step, {})
        inner[last] = value
    optimizers = [content.pop(name) for name in sorted(content) if name.startswith("optimizer_")]
    rest = read_file(folder / REST)
    return rest | content | {"optimizer_states": [by_position(state) for state in optimizers]}


def check_shards(folder: Path) -> None:
    """Check all bytes of a folder of shards: that it is complete, and contains nothing but data.

    Raises:
        DamagedCheckpointError: If it is not such a folder, or a part is missing or damaged; names the part.
        ValueError: If it refers to anything but data.
    """
    index = _index(folder)
    check_file(folder / REST)
    refuse_code(str(folder / REST), str(folder / REST))
    parts = defaultdict(list)
    for key, entry in index.storage_data.items():
        parts[entry.relative_path].append((entry, isinstance(index.state_dict_metadata[key.fqn], BytesStorageMetadata)))
    if missing := sorted(part for part in parts if not (folder / part).is_file()):
        raise DamagedCheckpointError(
            f"Expected {len(parts)} shards in {folder}, but {', '.join(missing)} is missing. The folder has to hold the files of "
            "all ranks: write to a file system that all nodes share, or copy them together."
        )
    for name, entries in parts.items():
        if known(folder / name):
            continue
        with (folder / name).open("rb") as file:
            for entry, is_bytes in entries:
                file.seek(entry.offset)
                part = io.BytesIO(file.read(entry.length))
                check_zip(part, str(folder / name))
                if is_bytes:  # torch reads everything but tensors with pickle
                    part.seek(0)
                    refuse_code(part, str(folder / name))
        known(folder / name, now=True)


def peek_shards(folder: Path) -> dict[str, Any]:
    """Return the content of a folder of shards without its tensors.

    Raises:
        DamagedCheckpointError: If it is not such a folder, or a part that is read is damaged.
    """
    _index(folder)
    return peek(folder / REST)


def finish_shards(folder: Path) -> None:
    """Add a checksum of the index, and flush the files that torch does not flush. Call after all ranks have written."""
    (folder / CHECKSUM).write_text(f"{zlib.crc32((folder / INDEX).read_bytes()):08x}\n", encoding="ascii")
    for name in (REST, CHECKSUM):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _index(folder: Path) -> Metadata:
    for name in (INDEX, REST):
        if not (folder / name).is_file():
            raise DamagedCheckpointError(
                f"Expected a checkpoint's file, or a folder of shards with `{INDEX}` and `{REST}`, but {folder} has no `{name}`."
            )
    path = folder / INDEX
    checksum = folder / CHECKSUM
    if checksum.is_file() and checksum.read_text("ascii").strip() != f"{zlib.crc32(path.read_bytes()):08x}":
        raise DamagedCheckpointError(f"Expected {path} as it was written, but its checksum is wrong.")
    try:
        return _Reader(folder).read_metadata()
    except CodeError:
        raise
    except Exception as error:
        raise DamagedCheckpointError(
            f"Expected {path} to be the index of a checkpoint, but it cannot be read ({type(error).__name__})."
        ) from None


class CodeError(ValueError):
    """An index refers to code."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return _joined  # the place where the folder was written, which is not used
        found = super().find_class(module, name) if module in _DATA and "." not in name else None
        if found is None or not (name in _DATA[module] or isinstance(found, torch.dtype)):
            raise CodeError(
                f"Expected nothing but shapes and places in a checkpoint's `{INDEX}`, but it names {module}.{name}, and "
                "loading it may run code."
            )
        return found


def _joined(*parts: str) -> str:
    return "/".join(parts)


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            return _Unpickler(file).load()


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)
