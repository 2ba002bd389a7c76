"""A Lightning Trainer on the pretended device."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.support.pretended_gpu.device import NAME

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")


class PretendedAccelerator(Accelerator):
    """One pretended device."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        return [0]

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


def precision_plugin(precision: str) -> Precision:
    """Return what Lightning makes of `trainer.precision` on a GPU."""
    if precision.endswith("-mixed"):
        return MixedPrecision(precision, NAME)
    return HalfPrecision(precision) if precision != "32-true" else Precision()


def gpu_trainer(folder: Path, precision: str, **settings: Any) -> L.Trainer:
    """Return a Trainer without logger, progress bar and checkpoints."""
    return L.Trainer(
        **{
            "accelerator": PretendedAccelerator(),
            "strategy": SingleDeviceStrategy(device=torch.device(NAME, 0)),
            "plugins": [precision_plugin(precision)],
            "default_root_dir": folder,
            "logger": False,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        | settings
    )
