"""Parts that the programs for accelerators share: shapes, a time limit, tables."""

import argparse
import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import measure
from benchmarks.measure import Row

QWEN3_8B = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
QWEN3_8B |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
SMALL = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512}


def summary(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def free(device: str) -> None:
    """Release cached memory."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block when its time is over, unless the alarm signal is already in use."""
    if signal.getsignal(signal.SIGALRM) is not signal.SIG_DFL:
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError("the budget is spent")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)  # again, should a library take the first for an error of its own
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def print_tables(rows: list[Row]) -> None:
    """Print a table for every part, with the columns that its rows have."""
    for part in dict.fromkeys(row["part"] for row in rows):
        here = [row for row in rows if row["part"] == part]
        names = dict.fromkeys(name for row in here for name in row if name not in ("part", "program", "to_floor_range"))
        if len(here) == 1:  # long and thin
            here = [{"what": name, "value": value} for name, value in here[0].items() if name in names]
            names = dict.fromkeys(("what", "value"))
        measure.print_table(part, here, dict.fromkeys(names, ".4g"))


def size(text: str) -> tuple[str, int]:
    """Read ``num_hidden_layers=4``."""
    name, _, value = text.partition("=")
    if name not in QWEN3_8B:
        raise argparse.ArgumentTypeError(f"Expected one of {', '.join(QWEN3_8B)}, but got {name}.")
    return name, int(value)
