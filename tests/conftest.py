"""One thread: two of them on a shared machine spin on each other, and results would depend on their number."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.support.interruptions import parts as parts

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_seed_of_another_test():
    """Lightning keeps its seed in a variable of the process. Not through `monkeypatch`, which a test may undo half way."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
