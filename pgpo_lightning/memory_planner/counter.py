"""Bytes of live tensors, current and peak, for real tensors and for tensors without data."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages of live tensors that operations created while this mode was active.

    It counts what PyTorch's allocators give to tensors, on any device and also in the backward pass. It counts neither the
    workspace of a kernel within one operation nor fragmentation. Sizes are not rounded up to an allocator's blocks.

    Attributes:
        live: Current bytes.
        peak: Maximum bytes since :meth:`restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}

    def restart(self) -> int:
        """Reset the peak to the current bytes. Return the former peak."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the storages that it creates."""
        result = function(*args, **(kwargs or {}))
        existing = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), existing)
        return result

    def _count(self, storage: torch.UntypedStorage, existing: set[int]) -> None:
        key = id(storage)
        if key in existing or key in self._alive:  # a view, or an operation in place
            return
        self.live += (size := storage.nbytes())
        self.peak = max(self.peak, self.live)
        self._alive[key] = (weakref.ref(storage, lambda _: self._freed(key)), size)

    def _freed(self, key: int) -> None:
        _, size = self._alive.pop(key)
        self.live -= size
