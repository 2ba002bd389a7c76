"""Exchange of objects between ranks, and propagation of errors from one rank to all."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
R = TypeVar("R")

CHUNK = 4 * 2**20
"""Bytes that :func:`on_first_rank` sends at a time. A larger item is sent alone."""

_HOST = torch.device("cpu")
_host_groups: list[tuple[Any, Any]] = []  # the world's process group, and the group for host memory that belongs to it

_NOTE = "(raised by rank {rank} and forwarded to this one)"


@dataclass
class _Failure:
    """Sent by a failed rank in place of its object."""

    error: Exception


def gather(local: T) -> list[T]:
    """Return every rank's object, in the order of ranks; ``[local]`` in a single process.

    Unlike in a tensor collective, the sizes of the objects may differ.

    Args:
        local: This rank's object. It must be picklable.

    Raises:
        Exception: The error of another rank within :func:`together`.
    """
    if not _several():
        return [local]
    everyone: list[Any] = [local] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    for rank, remote in enumerate(everyone):
        if isinstance(remote, _Failure):
            remote.error.add_note(_NOTE.format(rank=rank))
            _mark_known(remote.error)
            raise remote.error
    return everyone


def _mark_known(error: Exception) -> None:
    """Mark an error that all ranks have, so that it is not sent again."""
    error.__dict__["known_to_all"] = True


@contextmanager
def together() -> Iterator[None]:
    """Context in which an error of one rank is raised on all ranks, which would otherwise wait for it in their next collective.

    Every rank must enter it, and leaves it when all ranks have finished or one has failed. The enclosed code may call
    :func:`gather` and may nest this context, but must not use other collectives. The cost is one exchange, and nothing in a
    single process.

    Raises:
        Exception: The error of any rank.
    """
    try:
        yield
    except Exception as error:
        if _several() and not hasattr(error, "known_to_all"):
            # The other ranks take part in an exchange of objects sooner or later, and receive the error there. It is sent once,
            # whatever the depth of nesting.
            dist.all_gather_object([None] * dist.get_world_size(), _Failure(_portable(error)))
            _mark_known(error)
        raise
    gather(None)


def _portable(error: Exception) -> Exception:
    """Return a picklable error: the error itself, or a ``RuntimeError`` with its text."""
    try:
        return pickle.loads(pickle.dumps(error))  # noqa: S301  (pickled in the same line)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def on_first_rank(local: Iterable[bytes], use: Callable[[list[Iterator[bytes]]], R]) -> R:
    """Send every rank's items to the first rank, compute a result from them there, and return it on every rank.

    Items are sent through host memory in chunks of :data:`CHUNK` bytes, when the first rank requests them. So items that are too
    large for one host in total are never in its memory at the same time.

    Args:
        local: This rank's items.
        use: Called on the first rank only, with an iterator over the items of every rank, in the order of ranks.

    Raises:
        RuntimeError: On all other ranks, if `use` failed on the first, which raises its error.
    """
    if not _several():
        return use([iter(local)])
    group = _host_group()
    if dist.get_rank() > 0:
        for chunk in _chunks(local):
            dist.send_object_list([chunk], dst=0, group=group, device=_HOST)
        dist.send_object_list([None], dst=0, group=group, device=_HOST)
        message: list[Any] = [None]
        dist.broadcast_object_list(message, src=0, group=group, device=_HOST)
        result, failure = message[0]
        if failure is not None:
            raise RuntimeError(f"Expected the first rank to process the results of all ranks, but it failed: {failure}")
        return result
    parts = [iter(local), *(_received(rank, group) for rank in range(1, dist.get_world_size()))]
    try:
        result = use(parts)
    except Exception as error:
        _broadcast(parts, (None, f"{type(error).__name__}: {error}"), group)
        raise
    _broadcast(parts, (result, None), group)
    return result


def _broadcast(parts: list[Iterator[bytes]], message: Any, group: Any) -> None:
    for part in parts[1:]:  # the other ranks wait until all of their items are received
        for _ in part:
            pass
    dist.broadcast_object_list([message], src=0, group=group, device=_HOST)


def _received(rank: int, group: Any) -> Iterator[bytes]:
    while True:
        box: list[Any] = [None]
        dist.recv_object_list(box, src=rank, group=group, device=_HOST)
        if box[0] is None:
            return
        yield from pickle.loads(box[0])  # noqa: S301  (sent by another rank of this run)


def _chunks(items: Iterable[bytes]) -> Iterator[bytes]:
    chunk: list[bytes] = []
    size = 0
    for item in items:
        if chunk and size + len(item) > CHUNK:
            yield pickle.dumps(chunk)
            chunk, size = [], 0
        chunk.append(item)
        size += len(item)
    if chunk:
        yield pickle.dumps(chunk)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def _host_group() -> Any:
    """Return a process group that uses host memory. Beside an NCCL group one is created, once, by all ranks together."""
    world = dist.group.WORLD
    if "cpu:" in str(dist.get_backend_config()):
        return world
    if not _host_groups or _host_groups[0][0] is not world:
        _host_groups[:] = [(world, dist.new_group(backend="gloo"))]
    return _host_groups[0][1]
