"""Parts that the benchmarks share: paired timing, peak memory, exponents, tables and JSON lines."""

import ctypes
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch

MIB = 2**20
PRELOAD = ["torch"]  # imported once for all children that :func:`peak` starts
_MMAP_THRESHOLD = -3  # of glibc's malloc.h
Row = dict[str, Any]
K = TypeVar("K")


def alternate(methods: dict[K, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[K, list[float]]:
    """Return seconds of every method and round, after one round that does not count.

    The methods take turns, so that whatever else runs on the machine hits all of them; compare them round by round.
    Seconds are CPU seconds of this process, or on an accelerator the time between two of its events.
    """
    seconds: dict[K, list[float]] = {name: [] for name in methods}
    for turn in range(1 + repeats):
        for name, method in methods.items():
            taken = _seconds(method, device)
            if turn:
                seconds[name].append(taken)
    return seconds


def _seconds(method: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        start = time.process_time()
        method()
        return time.process_time() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    method()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ratios(seconds: Sequence[float], floor: Sequence[float]) -> Row:
    """Return the median of the ratios of paired rounds, and the range of all."""
    each = [mine / theirs for mine, theirs in zip(seconds, floor, strict=True)]
    return {"to_floor": statistics.median(each), "to_floor_range": [min(each), max(each)]}


def peak(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    """Return the MiB that ``prepare(*arguments)()`` takes at its peak above what was there before, in a process of its own.

    `prepare` makes the inputs and has to be importable. What it returns runs twice: the first call is for compilation and for
    the workspaces of libraries, the second is measured.
    """
    context = multiprocessing.get_context("forkserver")  # children of a process that has only imported
    context.set_forkserver_preload(PRELOAD)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak, prepare, *arguments).result()


def _peak(prepare: Callable[..., Callable[[], Any]], *arguments: Any) -> float:
    torch.set_num_threads(1)
    trim()
    run = prepare(*arguments)
    run()
    return host_peak(run)[0]


def trim() -> None:
    """Let freed blocks from 1 MiB on go back to the system. Otherwise what is kept for later use is counted as well."""
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, MIB)


def host_peak(run: Callable[[], Any]) -> tuple[float, Any]:
    """Run and return the peak of this process' resident MiB above what it was before, and the result."""
    gc.collect()
    with suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):  # no Linux, or a sandbox: then the peak is that of the whole process
        Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = run()
    return max(0.0, status("VmHWM") - before), result


def status(field: str) -> float:
    """Return MiB of this process: ``VmRSS``, or ``VmHWM`` since it was last set back; NaN without Linux."""
    try:
        text = Path("/proc/self/status").read_text()
        return int(text.split(f"{field}:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        return math.nan


def device_peak(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Run and return the peak of allocated MiB above what was allocated before, and the result."""
    if device != "cuda":
        return host_peak(run)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB, result


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return b of the least-squares fit ``value = a * size ** b``."""
    return _slope([math.log(size) for size in sizes], [math.log(value) for value in values])


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    return statistics.linear_regression(x, y).slope


def per_unit(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return b of the least-squares fit ``value = a + b * size``."""
    return _slope(sizes, values)


def print_table(title: str, rows: list[Row], columns: dict[str, str]) -> None:
    """Print rows as a Markdown table.

    Args:
        title: Goes above it.
        rows: Numbers and texts by name.
        columns: Names that are shown, with the format of their values (an empty cell for a value that is not there).
    """
    cells = [[_cell(row.get(name), form) for name, form in columns.items()] for row in rows]
    names = [name.replace("_", " ") for name in columns]
    print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for line in cells:
        print(f"| {' | '.join(line)} |")
    sys.stdout.flush()


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    return format(value, form) if isinstance(value, int | float) else str(value)


def write_json(rows: list[Row], path: Path | None) -> None:
    """Write one JSON line per row, to standard output if there is no path."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path is None:
        print("\n" + lines, end="")
    else:
        path.write_text(lines, encoding="utf-8")
