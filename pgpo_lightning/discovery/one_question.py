"""One question of another data set, again and again: the training data of a run that is to solve this question."""

from pgpo_lightning.core.settings import Natural, checked
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.questions import QuestionData
from pgpo_lightning.discovery.spec import Split


@checked
class OneQuestion(QuestionData):
    """Yields one question of a data set in every step. There are no held-out questions.

    Args:
        data: The data set.
        index: Number of the question in its split, from 0 on.
        split: Split of the data set.

    Raises:
        ValueError: If the split has fewer questions; names the field.
    """

    def __init__(self, data: QuestionData, index: Natural, split: Split = "train") -> None:
        super().__init__(batch_size=1, eval_batch_size=1)
        self.data, self.index, self.split = data, index, split

    def load(self, split: str) -> list[Question]:
        """Return the question for ``train``, and nothing for other splits."""
        return [chosen(self.data, self.split, [self.index])[0]] if split == "train" else []


def chosen(data: QuestionData, split: str, indices: list[int] | None = None) -> list[Question]:
    """Return questions of a split.

    Args:
        data: The data set, whose limits hold.
        split: The split.
        indices: Their numbers, from 0 on; null for all.

    Raises:
        ValueError: If there is no such question; names the number and how many there are.
    """
    if split not in data.questions:
        data.questions[split] = data.load(split)[: data.limits[split]]
        for index, question in enumerate(data.questions[split]):
            question.index = index
    found = data.questions[split]
    if bad := [index for index in indices or [] if not 0 <= index < len(found)]:
        raise ValueError(
            f"Expected `questions.indices` to be numbers from 0 to {len(found) - 1}, because {type(data).__name__} has "
            f"{len(found)} {split} questions, but got {', '.join(map(str, bad))}."
        )
    return found if indices is None else [found[index] for index in indices]
