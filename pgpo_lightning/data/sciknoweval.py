r"""SciKnowEval (arXiv 2406.09098): multiple-choice science questions, with the prompts and the split of SDPO.

The paper of SDPO (arXiv 2601.20802) trains on the questions of level L3 with two or four options, in four domains. Its
repository uses nine tenths for training and the rest for validation. The rows here are the same, from its files or from the Hub.
"""

from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pgpo_lightning.core.errors import as_user_error
from pgpo_lightning.core.settings import Text, checked
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.questions import QuestionData
from pgpo_lightning.data.rows import Columns, read_rows

Domain = Literal["biology", "chemistry", "material", "physics"]

HUB_ID = "hicai-zju/SciKnowEval"
ROWS = {"biology": 500, "chemistry": 2100, "material": 935, "physics": 800}
"""Rows per domain of the published results, train and test together."""

SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and nothing else. \
Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""
"""The system message of every question, also of those with two options. Part of the data format, so it must not change."""


def is_used(row: dict[str, Any], domain: Domain) -> bool:
    """Return whether a row of the Hub's table belongs to the questions of a domain."""
    return (
        row["domain"] == domain.capitalize()
        and row["details"]["level"] == "L3"
        and row["type"] in ("mcq-4-choices", "mcq-2-choices")
    )


def to_question(row: dict[str, Any], source: str = "") -> Question:
    """Turn a row of the Hub's table into a question.

    Args:
        row: Has ``question``, ``choices`` (``label`` and ``text``, two lists) and ``answerKey``; may have more.
        source: Where the row comes from, for error messages.

    Raises:
        ValueError: If the question is blank, or if the answer is not one of the options.
    """
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    if row["answerKey"] not in labels:
        raise ValueError(
            f"Expected the `answerKey` of {source} to be one of the options {labels}, but got {row['answerKey']!r}."
        )
    if not row["question"].strip():
        raise ValueError(f"Expected a text in the column `question` of {source}, but it is blank.")
    options = "\n".join(f"{label}: {text}" for label, text in zip(labels, texts, strict=True))
    return Question(
        prompt=f"{row['question']}\n\n{options}\nPlease reason step by step.",
        answer=row["answerKey"],
        system=SYSTEM,
        source=source,
        columns={"labels": list(labels), "type": row.get("type"), **(row.get("details") or {})},
    )


@checked
class SciKnowEval(QuestionData):
    """Multiple-choice science questions of one domain; the validation and the test split are the same questions.

    Args:
        domain: Which science.
        path: Folder with ``<domain>/train.json`` and ``<domain>/test.json`` in the format of the SDPO repository, or
            such a domain's folder itself. Without it the rows come from the Hub.
        **kwargs: Batch sizes, seed and limits, see :class:`QuestionData`.

    Raises:
        ValueError: If the domain is unknown.
    """

    def __init__(self, domain: Domain = "chemistry", path: Text | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.domain = domain
        self.path = path
        self._hub: dict[str, list[Question]] | None = None

    def held_out_questions(self) -> int | None:
        """Return the number of validation questions: a tenth of the published rows, unless there are files."""
        limit = self.limits["validation"]
        rows = -(-ROWS[self.domain] // 10)
        return limit if self.path is not None else rows if limit is None else min(limit, rows)

    def load(self, split: str) -> list[Question]:
        """Return the questions of one split; ``"validation"`` and ``"test"`` are the same."""
        name = "train" if split == "train" else "test"
        if self.path is not None:
            return [
                Columns().to_question(row, source)
                for source, row in read_rows(self._folder(self.path) / f"{name}.json")
            ]
        if self._hub is None:
            self._hub = self._from_hub()
        return self._hub[name]

    def _folder(self, path: str) -> Path:
        folder = Path(path).expanduser()
        if (folder / self.domain).is_dir():
            return folder / self.domain
        if folder.name != self.domain and folder.name in get_args(Domain):
            raise ValueError(f"Expected `path` to hold the domain {self.domain}, but got {folder}. Change one of them.")
        return folder

    def _from_hub(self) -> dict[str, list[Question]]:
        import datasets  # here, because it takes a second

        with as_user_error(f"the data set `{HUB_ID}`"):
            table = datasets.load_dataset(HUB_ID, split="test")
        rows = [(number, row) for number, row in enumerate(table, start=1) if is_used(row, self.domain)]
        if len(rows) < 2:
            raise ValueError(f"Expected at least two {self.domain} rows in {HUB_ID}, but got {len(rows)}.")
        if len(rows) != ROWS[self.domain]:
            rank_zero_warn(
                f"Expected {ROWS[self.domain]} {self.domain} rows in {HUB_ID}, but got {len(rows)}: the data has "
                "changed, and the split into train and test is not that of the published results."
            )
        # The same draw as the SDPO repository's, so the same rows in the same order; it depends on the number only.
        import datasets

        draw = datasets.Dataset.from_dict({"row": range(len(rows))}).train_test_split(test_size=0.1, seed=42)
        questions = [to_question(row, f"{HUB_ID}:{number}") for number, row in rows]
        return {name: [questions[row] for row in draw[name]["row"]] for name in ("train", "test")}
