"""The one place where ranks exchange what they saw, and learn that one of them has failed."""

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
"""Bytes that :func:`on_first_rank` sends at a time; a larger item goes alone."""

_HOST = torch.device("cpu")
_host_groups: list[tuple[Any, Any]] = []  # the process group that a group of the hosts was made beside, and that group

_NOTE = "(raised by rank {rank}, from which this one has it)"


@dataclass
class _Failure:
    """What a rank sends instead of what it was to send."""

    error: Exception


def gather(mine: T) -> list[T]:
    """Return every rank's object, in the order of ranks; ``[mine]`` in a single process.

    Takes whatever sizes the ranks happen to have, which a tensor collective does not.

    Raises:
        Exception: What another rank has raised within :func:`together`.
    """
    if not _several():
        return [mine]
    everyone: list[Any] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, theirs in enumerate(everyone):
        if isinstance(theirs, _Failure):
            theirs.error.add_note(_NOTE.format(rank=rank))
            theirs.error.known_to_all = True  # type: ignore[attr-defined]
            raise theirs.error
    return everyone


@contextmanager
def together() -> Iterator[None]:
    """What one rank raises in the enclosed code, all ranks raise, instead of waiting for it in their next collective.

    Every rank has to enter it. No rank leaves it before all others, or one of them has failed. The enclosed code may exchange
    objects with :func:`gather`, or enter this again, and take part in no collective of another kind. It costs one exchange, and
    nothing in a single process.
    """
    try:
        yield
    except Exception as error:
        if _several() and not hasattr(error, "known_to_all"):
            # The others are in, or on their way to, an exchange of objects, and find this among them; once, however deep it is.
            dist.all_gather_object([None] * dist.get_world_size(), _Failure(_portable(error)))
            error.known_to_all = True  # type: ignore[attr-defined]
        raise
    gather(None)


def _portable(error: Exception) -> Exception:
    """Return an error that arrives at another rank: itself, or what it says."""
    try:
        return pickle.loads(pickle.dumps(error))  # noqa: S301  (made in the line itself)
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def on_first_rank(mine: Iterable[bytes], use: Callable[[list[Iterator[bytes]]], R]) -> R:
    """Send every rank's items to the first rank, let it make something of them, and return that on every rank.

    Items travel through the hosts' memory in chunks of :data:`CHUNK` bytes when the first rank asks for them, and never
    through a device: what is too large for one host altogether is not held there at once.

    Args:
        mine: This rank's items.
        use: Called on the first rank alone, with an iterator over the items of every rank, in the order of ranks.

    Raises:
        RuntimeError: On all other ranks, if `use` failed on the first; there its exception is raised.
    """
    if not _several():
        return use([iter(mine)])
    group = _host_group()
    if dist.get_rank() > 0:
        for chunk in _chunks(mine):
            dist.send_object_list([chunk], dst=0, group=group, device=_HOST)
        dist.send_object_list([None], dst=0, group=group, device=_HOST)
        told: list[Any] = [None]
        dist.broadcast_object_list(told, src=0, group=group, device=_HOST)
        made, failure = told[0]
        if failure is not None:
            raise RuntimeError(f"Expected the first rank to take the results of all, but there it failed: {failure}")
        return made
    parts = [iter(mine), *(_received(rank, group) for rank in range(1, dist.get_world_size()))]
    try:
        made = use(parts)
    except Exception as error:
        _tell(parts, (None, f"{type(error).__name__}: {error}"), group)
        raise
    _tell(parts, (made, None), group)
    return made


def _tell(parts: list[Iterator[bytes]], what: Any, group: Any) -> None:
    for part in parts[1:]:  # the others wait until all is received
        for _ in part:
            pass
    dist.broadcast_object_list([what], src=0, group=group, device=_HOST)


def _received(rank: int, group: Any) -> Iterator[bytes]:
    while True:
        box: list[Any] = [None]
        dist.recv_object_list(box, src=rank, group=group, device=_HOST)
        if box[0] is None:
            return
        yield from pickle.loads(box[0])  # noqa: S301  (of another rank of this run)


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
    """Return a group whose messages go through the hosts; one is made beside NCCL's, once, by all ranks together."""
    world = dist.group.WORLD
    if "cpu:" in str(dist.get_backend_config()):
        return world
    if not _host_groups or _host_groups[0][0] is not world:
        _host_groups[:] = [(world, dist.new_group(backend="gloo"))]
    return _host_groups[0][1]
