"""One thread: two of them on a shared machine spin on each other, and results would depend on their number."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.support.interruptions import parts as parts
from tests.support.trials import try_each_model_once

torch.set_num_threads(1)
FOLDER = Path(__file__).parent
LEVELS = ("unit", "integration", "distributed")


def pytest_collection_modifyitems(items):
    """A test has the marker of the level whose folder it is in."""
    for item in items:
        if item.path.is_relative_to(FOLDER) and (level := item.path.relative_to(FOLDER).parts[0]) in LEVELS:
            item.add_marker(level)


@pytest.fixture(scope="session", autouse=True)
def _each_model_is_tried_once():
    try_each_model_once()


@pytest.fixture(autouse=True)
def _no_seed_of_another_test():
    """Lightning keeps its seed in a variable of the process. Not through `monkeypatch`, which a test may undo half way."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)
