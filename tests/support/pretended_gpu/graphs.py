"""Graphs of the pretended device: operations are recorded with the memory that they read and write, and repeated.

As on CUDA, recording computes nothing, numbers from the host are those of the recording, and nothing may wait for the device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_recording: list["PretendedGraph"] = []


class PretendedGraph:
    """Operations of a step."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Record an operation on tensors of the CPU."""
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given]
        self.operations.append((func, args, kwargs, made))

    def replay(self) -> None:
        """Repeat the operations."""
        from tests.support.pretended_gpu.counts import note_operation

        note_operation("graph launch")
        for func, args, kwargs, made in self.operations:
            out = func(*args, **kwargs)
            for tensor, value in zip(made, [t for t in tree_leaves(out) if isinstance(t, Tensor)], strict=False):
                tensor.copy_(value)


@contextmanager
def graph(recorded: PretendedGraph, pool: Any = None) -> Iterator[None]:
    """Record what is enclosed."""
    _recording.append(recorded)
    try:
        yield
    finally:
        _recording.pop()
        for tensor, before in reversed(recorded.before):
            tensor.copy_(before)
        for _, _, _, made in recorded.operations:
            for tensor in made:
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)


def before(func: Any, args: tuple[Any, ...]) -> None:
    """Remember what an operation is about to overwrite, if a graph is being recorded."""
    if _recording and func._schema.is_mutable and not func.is_view:
        changed = [
            given
            for given, argument in zip(args, func._schema.arguments, strict=False)
            if isinstance(given, Tensor) and argument.alias_info is not None and argument.alias_info.is_write
        ]
        _recording[-1].before += [(tensor, tensor.clone()) for tensor in changed]


def after(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Record an operation, if a graph is being recorded."""
    if _recording:
        _recording[-1].add(func, args, kwargs, out)


def refuse_wait(what: str) -> None:
    """Raise if the host would wait while a graph is recorded.

    Raises:
        RuntimeError: If so.
    """
    if _recording:
        raise RuntimeError(f"operation not permitted when stream is capturing ({what})")
