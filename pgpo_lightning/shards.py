"""Reading the folder of shards that FSDP2 writes with `save_distributed_checkpoint`, in a process that shards nothing.

torch reads the index of such a folder with pickle, which runs whatever code it names; here it may name data alone.
"""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

INDEX, REST = ".metadata", "meta.pt"
_DATA = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


class CheckpointFiles(TorchCheckpointIO):
    """Reads a folder of shards where a checkpoint's file is expected, so that any strategy can test or continue from it.

    Args:
        wanted: Of a folder's tensors, by their names, those to read into this process' memory; by default all.
    """

    def __init__(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self.wanted = wanted

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", **kwargs: Any) -> dict[str, Any]:
        """Return a checkpoint's content.

        By default Lightning says where to by a function, which torch does not take for quantised state such as torchao's.
        """
        if Path(path).is_dir():
            return read_shards(Path(path), self.wanted)
        return super().load_checkpoint(path, map_location, **kwargs)


def read_shards(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Any]:
    """Return what the checkpoint would hold as a single file, on the CPU.

    Args:
        folder: As Lightning's ``ModelParallelStrategy(save_distributed_checkpoint=True)`` writes it.
        wanted: Which tensors to read, by their names: ``state_dict.model.…``, ``optimizer_0.state.…``; by default all.

    Raises:
        ValueError: If it is no such folder, a part of it is missing, or its index names anything but data.
    """
    for name in (INDEX, REST):
        if not (folder / name).is_file():
            raise ValueError(
                f"Expected a checkpoint's file, or a folder of shards with `{INDEX}` and `{REST}`, but {folder} has no `{name}`."
            )
    reader = _Reader(folder)
    index = reader.read_metadata()
    parts = {entry.relative_path for entry in index.storage_data.values()}
    if missing := sorted(part for part in parts if not (folder / part).is_file()):
        raise ValueError(
            f"Expected {len(parts)} shards in {folder}, but {', '.join(missing)} is missing. The folder has to hold the files of "
            "all ranks: write to a file system that all nodes share, or copy them together."
        )
    flat: dict[str, Any] = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype) if isinstance(kept, TensorStorageMetadata) else None
        for name, kept in index.state_dict_metadata.items()
        if wanted(name)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself
        load(flat, storage_reader=reader, planner=_Planner(), no_dist=True)
    content: dict[Any, Any] = {}
    for name, value in flat.items():
        *outer, last = index.planner_data[name]
        inner = content
        for step in outer:
            inner = inner.setdefault(step, {})
        inner[last] = value
    optimizers = [content.pop(name) for name in sorted(content) if name.startswith("optimizer_")]
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    return rest | content | {"optimizer_states": [_by_number(state) for state in optimizers]}


def _by_number(optimizer: dict[str, Any]) -> dict[str, Any]:
    """Call parameters by their places, as optimizers themselves do, in place of their names."""
    groups = [optimizer["param_groups"][i] for i in sorted(optimizer["param_groups"])]
    places = {name: i for i, name in enumerate(name for group in groups for name in group["params"])}
    state = {places[name]: values for name, values in optimizer.get("state", {}).items()}
    return {"state": state, "param_groups": [g | {"params": [places[n] for n in g["params"]]} for g in groups]}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath"):
            return _joined  # where the folder was written, which nobody asks for
        found = super().find_class(module, name) if module in _DATA and "." not in name else None
        if found is None or not (name in _DATA[module] or isinstance(found, torch.dtype)):
            raise ValueError(
                f"Expected nothing but shapes and places in a checkpoint's `{INDEX}`, but it names {module}.{name}: it may be "
                "meant to run code."
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
