"""For tests: the package takes the pretended device for a GPU."""

from typing import Any

from pgpo_lightning.core import devices
from pgpo_lightning.losses import fused
from tests.support.pretended_gpu.device import NAME, register


def take_for_gpu(monkeypatch: Any) -> None:
    """Let the package take the pretended device for a GPU until the end of a test. Nothing can be compiled for it."""
    register()
    monkeypatch.setattr(devices, "_GPUS", {NAME})
    monkeypatch.setattr(fused, "_compiles", lambda device: False)
