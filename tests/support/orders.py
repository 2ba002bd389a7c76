"""Data modules whose questions are numbered."""

from pgpo_lightning.core.types import Question
from pgpo_lightning.data import QuestionData


class Numbers(QuestionData):
    """Questions 0, 1, 2, ... in splits of given sizes."""

    def __init__(self, train: int = 7, validation: int = 0, test: int = 0, **kwargs) -> None:
        super().__init__(**kwargs)
        self.sizes = {"train": train, "validation": validation, "test": test}

    def load(self, split):
        return [Question(str(number), number, source=f"{split}:{number}") for number in range(self.sizes[split])]
