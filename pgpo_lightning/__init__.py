"""Self-distilled policy optimisation of language models as PyTorch Lightning modules and callbacks.

The public names are imported from here, as in ``from pgpo_lightning import SDPO, InformationMultiplier``. Each is loaded when it
is first asked for: this import alone loads neither torch nor Lightning.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Nothing leaves the machine: no usage reports of the libraries we call. They read this when they are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")

if TYPE_CHECKING:
    from pgpo_lightning.callbacks import (
        AdaptiveInformationMultiplier,
        AnswerWriter,
        CentredMultiplier,
        CollapseGuard,
        ConstantMultiplier,
        EffectiveSampleSizeMultiplier,
        InformationMultiplier,
        Interruption,
        InverseMultiplier,
        KLAdaptiveMultiplier,
        MatchedConstantMultiplier,
        MatchedRandomMultiplier,
        OracleMultiplier,
        PolyakMultiplier,
        ProgressPrinter,
        RandomMultiplier,
        ReplayedMultiplier,
        ResumeCheckpoint,
        RunSummary,
        ShuffledMultiplier,
        StabilityMonitor,
        StepSizeMultiplier,
    )
    from pgpo_lightning.core.types import Question, Rollout, Verdict
    from pgpo_lightning.data import CodeQuestions, FileQuestions, QuestionData, SciKnowEval, ToyArithmetic, ToyPrograms
    from pgpo_lightning.losses.information import information
    from pgpo_lightning.losses.step_statistics import StepStatistics
    from pgpo_lightning.losses.token_weights import TokenWeights
    from pgpo_lightning.models.lora import LoRA
    from pgpo_lightning.models.quantization import Quantization
    from pgpo_lightning.modules import CEPO, DRIFT, GRPO, HAPO, OPD, RLSD, SDPO, SRPO, TGPO, OnPolicyModule
    from pgpo_lightning.objectives.configs import (
        DifficultyConfig,
        DivergenceConfig,
        EvidenceConfig,
        InjectionConfig,
        PolicyGradientConfig,
        RhythmConfig,
    )
    from pgpo_lightning.objectives.distillation import DistillationObjective
    from pgpo_lightning.objectives.policy_gradient import PolicyGradientObjective
    from pgpo_lightning.rewards import BoxedAnswer, CodeExecution, MultipleChoice, ToolUse, TRLReward
    from pgpo_lightning.rollout import Engine, Sampling, TransformersEngine, VLLMEngine
    from pgpo_lightning.teachers.configs import RepromptConfig, TeacherConfig
    from pgpo_lightning.teachers.self_teaching import SelfTeaching
    from pgpo_lightning.training.configs import (
        EvaluationConfig,
        MismatchConfig,
        ModelConfig,
        RewardConfig,
        UpdateConfig,
    )
    from pgpo_lightning.training.learner import Learner
    from pgpo_lightning.training.objective import Objective, Route

__version__ = "0.1.0"

__all__ = [
    "CEPO",
    "DRIFT",
    "GRPO",
    "HAPO",
    "OPD",
    "RLSD",
    "SDPO",
    "SRPO",
    "TGPO",
    "AdaptiveInformationMultiplier",
    "AnswerWriter",
    "BoxedAnswer",
    "CentredMultiplier",
    "CodeExecution",
    "CodeQuestions",
    "CollapseGuard",
    "ConstantMultiplier",
    "DifficultyConfig",
    "DistillationObjective",
    "DivergenceConfig",
    "EffectiveSampleSizeMultiplier",
    "Engine",
    "EvaluationConfig",
    "EvidenceConfig",
    "FileQuestions",
    "InformationMultiplier",
    "InjectionConfig",
    "Interruption",
    "InverseMultiplier",
    "KLAdaptiveMultiplier",
    "Learner",
    "LoRA",
    "MatchedConstantMultiplier",
    "MatchedRandomMultiplier",
    "MismatchConfig",
    "ModelConfig",
    "MultipleChoice",
    "Objective",
    "OnPolicyModule",
    "OracleMultiplier",
    "PolicyGradientConfig",
    "PolicyGradientObjective",
    "PolyakMultiplier",
    "ProgressPrinter",
    "Quantization",
    "Question",
    "QuestionData",
    "RandomMultiplier",
    "ReplayedMultiplier",
    "RepromptConfig",
    "ResumeCheckpoint",
    "RewardConfig",
    "RhythmConfig",
    "Rollout",
    "Route",
    "RunSummary",
    "Sampling",
    "SciKnowEval",
    "SelfTeaching",
    "ShuffledMultiplier",
    "StabilityMonitor",
    "StepSizeMultiplier",
    "StepStatistics",
    "TRLReward",
    "TeacherConfig",
    "TokenWeights",
    "ToolUse",
    "ToyArithmetic",
    "ToyPrograms",
    "TransformersEngine",
    "UpdateConfig",
    "VLLMEngine",
    "Verdict",
    "information",
]

_HOMES = {
    "callbacks": (
        "AdaptiveInformationMultiplier CentredMultiplier CollapseGuard ConstantMultiplier EffectiveSampleSizeMultiplier "
        "InformationMultiplier Interruption InverseMultiplier KLAdaptiveMultiplier OracleMultiplier "
        "MatchedConstantMultiplier MatchedRandomMultiplier PolyakMultiplier RandomMultiplier ReplayedMultiplier "
        "ResumeCheckpoint ShuffledMultiplier StabilityMonitor ProgressPrinter StepSizeMultiplier RunSummary "
        "AnswerWriter"
    ),
    "core.types": "Question Rollout Verdict",
    "data": "CodeQuestions FileQuestions QuestionData SciKnowEval ToyArithmetic ToyPrograms",
    "losses.information": "information",
    "losses.step_statistics": "StepStatistics",
    "losses.token_weights": "TokenWeights",
    "models.lora": "LoRA",
    "models.quantization": "Quantization",
    "modules": "CEPO DRIFT GRPO HAPO OPD RLSD SDPO SRPO TGPO OnPolicyModule",
    "objectives.configs": "DifficultyConfig DivergenceConfig EvidenceConfig InjectionConfig PolicyGradientConfig RhythmConfig",
    "objectives.distillation": "DistillationObjective",
    "objectives.policy_gradient": "PolicyGradientObjective",
    "rewards": "BoxedAnswer CodeExecution MultipleChoice ToolUse TRLReward",
    "rollout": "Engine Sampling TransformersEngine VLLMEngine",
    "teachers.configs": "RepromptConfig TeacherConfig",
    "teachers.self_teaching": "SelfTeaching",
    "training.configs": "EvaluationConfig MismatchConfig ModelConfig RewardConfig UpdateConfig",
    "training.learner": "Learner",
    "training.objective": "Objective Route",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return what is loaded already, and the public names."""
    return sorted({*globals(), *__all__})
