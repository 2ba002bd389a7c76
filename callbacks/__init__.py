"""Callbacks: multipliers of the step size, monitors of collapse, checkpoints, and the summary of a run.

Import from ``pgpo_lightning.callbacks``; the folder is at the top of the repository so that it is easy to find.
"""

if __name__ != "pgpo_lightning.callbacks":
    raise ImportError(f"Import `pgpo_lightning.callbacks`, not `{__name__}`: two copies of every class would exist.")

from pgpo_lightning.callbacks.adaptive import (
    AdaptiveInformationMultiplier,
    EffectiveSampleSizeMultiplier,
    KLAdaptiveMultiplier,
    PolyakMultiplier,
)
from pgpo_lightning.callbacks.answer_writer import AnswerWriter
from pgpo_lightning.callbacks.collapse_guard import CollapseGuard
from pgpo_lightning.callbacks.controls import (
    CentredMultiplier,
    InverseMultiplier,
    MatchedConstantMultiplier,
    MatchedRandomMultiplier,
    OracleMultiplier,
    ReplayedMultiplier,
    ShuffledMultiplier,
)
from pgpo_lightning.callbacks.interruption import Interruption
from pgpo_lightning.callbacks.progress_printer import ProgressPrinter
from pgpo_lightning.callbacks.resume_checkpoint import ResumeCheckpoint
from pgpo_lightning.callbacks.run_summary import RunSummary
from pgpo_lightning.callbacks.stability_monitor import StabilityMonitor
from pgpo_lightning.callbacks.step_size import (
    ConstantMultiplier,
    InformationMultiplier,
    RandomMultiplier,
    StepSizeMultiplier,
)

__all__ = [
    "AdaptiveInformationMultiplier",
    "AnswerWriter",
    "CentredMultiplier",
    "CollapseGuard",
    "ConstantMultiplier",
    "EffectiveSampleSizeMultiplier",
    "InformationMultiplier",
    "Interruption",
    "InverseMultiplier",
    "KLAdaptiveMultiplier",
    "MatchedConstantMultiplier",
    "MatchedRandomMultiplier",
    "OracleMultiplier",
    "PolyakMultiplier",
    "ProgressPrinter",
    "RandomMultiplier",
    "ReplayedMultiplier",
    "ResumeCheckpoint",
    "RunSummary",
    "ShuffledMultiplier",
    "StabilityMonitor",
    "StepSizeMultiplier",
]
