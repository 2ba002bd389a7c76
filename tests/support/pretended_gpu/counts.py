"""What a GPU would have to do: operations, casts of weights, and places at which the host waits for the device."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.support.pretended_gpu.graphs import refuse_wait

_PACKAGE = "/pgpo_lightning/"
_OTHERS = ("/transformers/", "/lightning/", "/torch/optim/", "/torch/nn/utils/", "/torch/amp/", "/tests/")
_MATRIX = 1024
"""Elements from which a cast of a matrix, or of a stack of them, counts as one of a weight."""


@dataclass
class Counts:
    """Counts while :func:`counting` is active.

    Attributes:
        operations: Kernels started, by name. Views start none.
        waits: Times that the host waits for the device, by kind and source line.
        cast: Elements of matrices that were cast to another type, by source line.
    """

    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    cast: Counter[str] = field(default_factory=Counter)

    def waits_in(self, *files: str) -> int:
        """Return the waits whose line of the package is in one of these files."""
        return sum(n for (_, line), n in self.waits.items() if any(f"{name}:" in line for name in files))

    def report(self, most: int = 12) -> str:
        """Return the most frequent waits, one a line."""
        return "\n".join(f"{n:6} {what} at {line}" for (what, line), n in self.waits.most_common(most))


_active: list[Counts] = []


@contextmanager
def counting(counts: Counts | None = None) -> Iterator[Counts]:
    """Count what is enclosed, nested counts included, and add it to `counts`."""
    counts = Counts() if counts is None else counts
    _active.append(counts)
    try:
        yield counts
    finally:
        _active.pop()


def note_operation(name: str) -> None:
    """Count an operation."""
    for counts in _active:
        counts.operations[name] += 1


def note_wait(what: str) -> None:
    """Count a wait of the host for the device."""
    refuse_wait(what)
    if _active:
        line = _line()
        for counts in _active:
            counts.waits[what, line] += 1


def note_cast(shape: tuple[int, ...], elements: int) -> None:
    """Count a cast, if it may be one of a weight: activations of a token have one column, or are small."""
    if _active and len(shape) in (2, 3) and 1 not in shape and elements >= _MATRIX:
        line = _line()
        for counts in _active:
            counts.cast[line] += elements


def _line() -> str:
    """Return the innermost line outside of torch, and the package's line that led to it."""
    frame, found, ours = sys._getframe(2), None, None
    while frame is not None and ours is None:
        file = frame.f_code.co_filename
        place = f"{'/'.join(file.split('/')[-2:])}:{frame.f_lineno}"
        if _PACKAGE in file and "/tests/" not in file:
            ours = place
        elif found is None and any(part in file for part in _OTHERS) and "/pretended_gpu/" not in file:
            found = place
        frame = frame.f_back
    return " < ".join(place for place in (found, ours) if place) or "?"
