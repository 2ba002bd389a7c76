"""Bytes of tensors that are alive, now and at the highest, for real tensors as for ones without data."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages of tensors that operations made while this was active, and that are still alive.

    It sees what PyTorch's allocators hand out to tensors, on any device and in the backward pass too. It does not see what a
    kernel takes for itself within one operation, and no fragmentation. Sizes are not rounded up to an allocator's blocks.

    Attributes:
        live: Bytes now.
        peak: Most bytes since :meth:`restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}

    def restart(self) -> int:
        """Forget the peak; return what it was."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it leaves."""
        result = function(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key = id(storage)
        if key in given or key in self._alive:  # a view, or an operation in place
            return
        self.live += (size := storage.nbytes())
        self.peak = max(self.peak, self.live)
        self._alive[key] = (weakref.ref(storage, lambda _: self._gone(key)), size)

    def _gone(self, key: int) -> None:
        _, size = self._alive.pop(key)
        self.live -= size
