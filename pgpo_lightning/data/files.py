"""Questions from files (JSON, JSON Lines, parquet), from a ``datasets.Dataset``, or from a data set of the Hugging Face Hub."""

from dataclasses import replace
from os import PathLike
from typing import Any, TypeAlias

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from pgpo_lightning.core.errors import as_user_error
from pgpo_lightning.core.settings import Text, checked
from pgpo_lightning.core.texts import shown
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.questions import SPLITS, QuestionData
from pgpo_lightning.data.rows import Columns, RawRow, check_rows, read_rows

Table: TypeAlias = Any
"""A ``datasets.Dataset``. The package takes a second to import, so it is not named here."""


@checked
class FileQuestions(QuestionData):
    r"""Questions from your own files or from the Hub.

    A row needs a prompt; all its other columns are handed to the verifier. The train split is either a file or a split of
    ``dataset``; so is each of the others. Without validation data, the test data is used for validation.

    Args:
        train: Path of the training file: ``.jsonl``, ``.json`` (array or JSON Lines) or ``.parquet``. From Python also a
            ``datasets.Dataset``.
        validation: Path of the validation file, likewise.
        test: Path of the test file, likewise.
        predict: Path of a file of prompts for `pgpo predict`, likewise; null for the test data. Its rows may lack an answer.
        dataset: Data set on the Hugging Face Hub, instead of ``train``.
        dataset_config: Its configuration, if it has several.
        train_split: Its split for training.
        validation_split: Its split for validation, if any.
        test_split: Its split for testing, if any.
        prompt_column: Column with the user's text, or with chat messages that end with a user turn.
        answer_column: Column with the gold answer. Null, or no column ``answer`` in any row, for none: then the verifier must not
            need one.
        system_column: Column with a system message; rows without one have none.
        privileged_context_column: Column with text that only the self-teacher may see; it may be missing.
        tools_column: Column with the tools that the chat template shows: a list of JSON schemas, or its text; it may be missing.
        prompt_suffix: Text that is appended to the last user turn as it is, such as
            ``"\n\nPut the final answer in \\boxed{}."``.
        **kwargs: Batch sizes, seed and limits, see :class:`QuestionData`.

    Raises:
        ValueError: If no data is named, or if a split is named twice.
    """

    def __init__(
        self,
        train: Text | Table | None = None,
        validation: Text | Table | None = None,
        test: Text | Table | None = None,
        predict: Text | Table | None = None,
        dataset: Text | None = None,
        dataset_config: Text | None = None,
        train_split: Text = "train",
        validation_split: Text | None = None,
        test_split: Text | None = None,
        prompt_column: Text = "prompt",
        answer_column: Text | None = "answer",
        system_column: Text = "system",
        privileged_context_column: Text = "privileged_context",
        tools_column: Text = "tools",
        prompt_suffix: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.files: dict[str, Any] = {"train": train, "validation": validation, "test": test, "predict": predict}
        for split, given in self.files.items():
            if given is not None and not isinstance(given, (str, PathLike)):
                _check_table(split, given)
        self.hub_splits = {"validation": validation_split, "test": test_split}
        if dataset is None and all(given is None for given in self.files.values()):
            raise ValueError(
                "Expected a data file (`train`, `validation`, `test`, `predict`) or a `dataset`, but got none."
            )
        if dataset is None and any(self.hub_splits.values()):
            raise ValueError("Expected `dataset` beside `validation_split` or `test_split`, but got none.")
        if dataset is not None:
            self.hub_splits["train"] = train_split
        for split in SPLITS:
            if self.files[split] is not None and self.hub_splits.get(split):
                raise ValueError(
                    f"Expected the {split} split from one place, but got {_shown(self.files[split])} and the split "
                    f"`{self.hub_splits[split]}` of `dataset` {dataset}. Remove one of them."
                )
        self.dataset = dataset
        self.dataset_config = dataset_config
        self.columns = Columns(prompt_column, answer_column, system_column, privileged_context_column, tools_column)
        self.prompt_suffix = prompt_suffix

    def load(self, split: str) -> list[Question]:
        """Return the questions of one split; see the class."""
        if split == "validation" and not self._has(split) and self._has("test"):
            rank_zero_info("No validation data is named: the test data is used for validation.")
            split = "test"
        rows, columns = self._rows(split), self.columns
        if rows and columns.answer == "answer" and not any("answer" in row for _, row in rows):
            rank_zero_info(f"No row of the {split} split has a column `answer`: every `question.answer` is null.")
            columns = replace(columns, answer=None)
        unknown = replace(columns, answer=None)  # of some rows to predict the answer may be known, and not of others

        def read(row: dict[str, Any], source: str) -> Question:
            known = split != "predict" or row.get(columns.answer or "") is not None
            return (columns if known else unknown).to_question(row, source, self.prompt_suffix)

        return [read(row, source) for source, row in rows]

    def load_prompts(self) -> list[Question]:
        """Return the prompts to answer; see `predict`."""
        return self.load("test" if self.files["predict"] is None else "predict")

    def _has(self, split: str) -> bool:
        return bool(self.files[split] is not None or self.hub_splits.get(split))

    def _rows(self, split: str) -> list[RawRow]:
        given = self.files[split]
        if isinstance(given, (str, PathLike)):
            return read_rows(str(given))
        if given is not None:
            rows: list[RawRow] = [(f"{split}[{number}]", row) for number, row in enumerate(given)]
            check_rows(rows)
            return rows
        if hub_split := self.hub_splits.get(split):
            import datasets  # here, because it takes a second

            with as_user_error(f"the data set `{self.dataset}`"):
                table = datasets.load_dataset(self.dataset, self.dataset_config, split=hub_split)
            if len(table) == 0:
                raise ValueError(f"Expected at least one row in {self.dataset} [{hub_split}], but it is empty.")
            return [(f"{self.dataset}[{hub_split}]:{number}", row) for number, row in enumerate(table, start=1)]
        return []


def _check_table(split: str, given: Any) -> None:
    """Raise unless a split is a table of rows, as ``datasets.Dataset`` is."""
    names = getattr(given, "column_names", None)
    if isinstance(names, list) and hasattr(given, "__len__"):
        if len(given) == 0:
            raise ValueError(f"Expected at least one row in `{split}`, but the data set is empty.")
        return
    mend = ""
    if isinstance(names, dict):
        mend = f" Give one of its splits, {', '.join(map(str, names))}."
    elif names is not None:
        mend = " Load it without streaming."
    got = shown(given, longest=100) if names is None else type(given).__name__  # a data set is shown in many lines
    raise ValueError(f"Expected `{split}` to be the path of a file or a datasets.Dataset, but got {got}.{mend}")


def _shown(given: Any) -> str:
    return f"the file {given}" if isinstance(given, (str, PathLike)) else "a data set"
