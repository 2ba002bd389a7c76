"""Data modules that serve questions, and the order in which they do."""

from pgpo_lightning.data.code import CodeQuestions
from pgpo_lightning.data.files import FileQuestions
from pgpo_lightning.data.questions import QuestionData
from pgpo_lightning.data.sampler import ResumableSampler
from pgpo_lightning.data.sciknoweval import SciKnowEval
from pgpo_lightning.data.toy import ToyArithmetic
from pgpo_lightning.data.toy_code import ToyPrograms

__all__ = [
    "CodeQuestions",
    "FileQuestions",
    "QuestionData",
    "ResumableSampler",
    "SciKnowEval",
    "ToyArithmetic",
    "ToyPrograms",
]
