r"""Programming questions with tests: LiveCodeBench, HumanEval+, MBPP+, and files of your own.

SDPO (arXiv 2601.20802) trains and evaluates on the same questions of LiveCodeBench. Training sees half of the private tests of
each, evaluation all of them. A score is therefore *transductive*: it shows generalisation to other tests, not to other questions.
"""

import base64
import binascii
import io
import json
import pickle
import zlib
from collections.abc import Callable
from datetime import date, datetime
from typing import Any, Literal

import numpy as np

from pgpo_lightning.core.errors import as_user_error
from pgpo_lightning.core.settings import PositiveFraction, Seed, Text, checked
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.questions import QuestionData
from pgpo_lightning.data.rows import RawRow, read_rows

Format = Literal["livecodebench", "humanevalplus", "mbppplus", "tests"]

HUB: dict[str, tuple[str, str | None]] = {
    "livecodebench": ("livecodebench/code_generation_lite", "refs/pr/6"),  # without a loading script
    "humanevalplus": ("evalplus/humanevalplus", None),
    "mbppplus": ("evalplus/mbppplus", None),
}
TIME_LIMITS = {"livecodebench": 6, "humanevalplus": 5, "mbppplus": 5}
"""CPU seconds of a test."""

INSTRUCTION = (
    "Write a correct Python program for the problem below. It has to pass all tests, each within one second. "
    "You may think about a plan first. End with the complete program in a code block (```python ... ```).\n\n{problem}"
)
"""Our words for the instruction of the SDPO repository."""

LARGEST_TESTS = 2**30
"""Most bytes of the tests of one question."""


class TextUnpickler(pickle.Unpickler):
    """Reads a pickle that holds a text. Others can run any program, so it loads nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse.

        Raises:
            UnpicklingError: Always.
        """
        raise pickle.UnpicklingError(f"it wants to load {module}.{name}")


def private_tests(text: str) -> list[dict[str, str]]:
    """Return the private tests of a row of LiveCodeBench: JSON, or Base64 of a compressed pickle of JSON.

    Raises:
        ValueError: If it is neither.
    """
    if not text.lstrip().startswith("["):
        try:
            unpacking = zlib.decompressobj()
            packed = unpacking.decompress(base64.b64decode(text, validate=True), LARGEST_TESTS)
            if unpacking.unconsumed_tail:
                raise ValueError(f"it has more than {LARGEST_TESTS} bytes")
            text = TextUnpickler(io.BytesIO(packed)).load()
        except (
            binascii.Error,
            zlib.error,
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            IndexError,
            KeyError,
        ) as error:
            raise ValueError(str(error)) from error
        if not isinstance(text, str):
            raise ValueError(f"its pickle holds {type(text).__name__}, not a text")
    tests = json.loads(text)
    if not (isinstance(tests, list) and tests and all(isinstance(each, dict) for each in tests)):
        raise ValueError("it is no list of tests")
    return tests


def livecodebench(row: dict[str, Any], plain_function: bool) -> tuple[str, dict[str, Any], str]:
    """Return problem, tests and name of a row of LiveCodeBench.

    Args:
        row: Has ``question_content``, ``starter_code``, ``metadata``, ``private_test_cases`` and ``question_id``.
        plain_function: Whether to ask for a function where the starter code has a method.
    """
    tests = private_tests(row["private_test_cases"])
    function = json.loads(row["metadata"] or "{}").get("func_name") or ""
    record = {
        "inputs": [each["input"] for each in tests],
        "outputs": [each["output"] for each in tests],
        "testtype": tests[0]["testtype"],
        "fn_name": function,
        "time_limit": TIME_LIMITS["livecodebench"],
    }
    problem = row["question_content"]
    if "def " in row["starter_code"]:
        signature = f"def {row['starter_code'].split('def ')[1].strip()}"
        problem += f"\n\nThe solution must have this signature:\n```python\n{signature}\n```"
    return (problem.replace("(self, ", "(") if plain_function else problem), record, row["question_id"]


def humanevalplus(row: dict[str, Any], plain_function: bool) -> tuple[str, dict[str, Any], str]:
    """Return problem, tests and name of a row of HumanEval+ (``prompt``, ``test``, ``entry_point``, ``task_id``)."""
    problem = f"Complete this function. Do not change what is given.\n```python\n{row['prompt']}\n```"
    program = f"{row['test']}\ncheck({row['entry_point']})"
    record = {
        "inputs": [program],
        "outputs": [""],
        "testtype": "code",
        "fn_name": "",
        "time_limit": TIME_LIMITS["humanevalplus"],
    }
    return problem, record, row["task_id"]


def mbppplus(row: dict[str, Any], plain_function: bool) -> tuple[str, dict[str, Any], str]:
    """Return problem, tests and name of a row of MBPP+ (``prompt``, ``code``, ``test``, ``test_imports``, ``task_id``)."""
    function = row["code"].split("def ")[1].split("(")[0].strip()
    program = "\n".join([*row["test_imports"], row["test"]])
    record = {
        "inputs": [program],
        "outputs": [""],
        "testtype": "code",
        "fn_name": "",
        "time_limit": TIME_LIMITS["mbppplus"],
    }
    return f"{row['prompt']} The function is called `{function}`.", record, str(row["task_id"])


def own(row: dict[str, Any], plain_function: bool) -> tuple[str, dict[str, Any], str]:
    """Return problem, tests and name of a row of your own: ``prompt``, ``tests`` (an object or JSON) and maybe ``name``."""
    tests = row["tests"]
    return (
        row["prompt"],
        json.loads(tests) if isinstance(tests, str) else tests,
        str(row.get("name") or row["prompt"][:40]),
    )


READERS: dict[str, Callable[[dict[str, Any], bool], tuple[str, dict[str, Any], str]]] = {
    "livecodebench": livecodebench, "humanevalplus": humanevalplus, "mbppplus": mbppplus, "tests": own,
}  # fmt: skip


@checked
class CodeQuestions(QuestionData):
    """Programming questions whose tests are in the column ``tests``, for :class:`~pgpo_lightning.rewards.CodeExecution`.

    All splits have the same questions. The training split has a share of the tests of each. The others have all of them, and say
    in ``public`` which are those of the training split. Rows of your own that have ``public`` keep it.

    Args:
        path: File with the rows (``.jsonl``, ``.json``, ``.parquet``). Without it they come from the Hub.
        format: Of the rows. ``tests`` are your own: ``prompt`` and ``tests``.
        since: First date of a question of LiveCodeBench, ``YYYY-MM-DD``.
        until: Date from which questions of LiveCodeBench are left out.
        train_share: Share of the tests that training sees, rounded down, at least one test. 1 for all.
        halves_seed: Seed of the draw of these tests, one stream over all questions as in the SDPO repository.
        instruction: What is asked, around ``{problem}``. The default is in our words; the repository's own can be set.
        plain_function: Whether to ask for a function where LiveCodeBench's starter code has a method, as in the SDPO repository.
        **kwargs: Batch sizes, seed and limits, see :class:`QuestionData`.

    Raises:
        ValueError: If a setting is not valid, or if ``path`` is missing for ``tests``.
    """

    def __init__(
        self,
        path: Text | None = None,
        format: Format = "livecodebench",
        since: Text = "2025-02-01",
        until: Text = "2025-05-01",
        train_share: PositiveFraction = 0.5,
        halves_seed: Seed = 0,
        instruction: Text = INSTRUCTION,
        plain_function: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if format == "tests" and path is None:
            raise ValueError("Expected `path` with `format` tests, whose rows are your own, but got none.")
        if "{problem}" not in instruction:
            raise ValueError(f"Expected `instruction` to contain {{problem}}, but got {instruction!r:.80}.")
        self.path, self.format = path, format
        self.since, self.until = _day("since", since), _day("until", until)
        if self.since >= self.until:
            raise ValueError(f"Expected `since` to be before `until`, but got {since} and {until}.")
        self.train_share, self.halves_seed = train_share, halves_seed
        self.instruction, self.plain_function = instruction, plain_function
        self._questions: dict[str, list[Question]] | None = None

    def load(self, split: str) -> list[Question]:
        """Return the questions of one split; ``"validation"`` and ``"test"`` are the same."""
        if self._questions is None:
            self._questions = self._read()
        return [*self._questions["train" if split == "train" else "test"]]

    def _read(self) -> dict[str, list[Question]]:
        stream = np.random.RandomState(self.halves_seed)
        found: dict[str, list[Question]] = {"train": [], "test": []}
        for source, row in self._rows():
            try:
                problem, record, name = READERS[self.format](row, self.plain_function)
                count = len(record["inputs"])
            except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
                said = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise ValueError(
                    f"Expected a row in the format {self.format} at {source}, but got: {said}. Correct the row."
                ) from error
            drawn = np.sort(stream.choice(count, size=max(1, int(self.train_share * count)), replace=False)).tolist()
            marked = record.get("public")
            kept = drawn if marked is None else [i for i, public in enumerate(marked) if public]
            lists = {key: [record[key][i] for i in kept] for key in ("inputs", "outputs") if key in record}
            half = {key: value for key, value in record.items() if key != "public"} | lists
            seen = [i in kept for i in range(count)]
            prompt = self.instruction.replace("{problem}", problem)
            for split, tests in (("train", half), ("test", record | {"public": seen})):
                columns = {"tests": json.dumps(tests)} | {
                    key: row[key] for key in ("difficulty", "platform") if key in row
                }
                found[split].append(Question(prompt, name, source=source, columns=columns))
        if not found["test"]:
            raise ValueError(
                f"Expected questions from {self.since} to {self.until}, but there are none. Change `since` or `until`."
            )
        return found

    def _rows(self) -> list[RawRow]:
        if self.path is not None:
            rows = read_rows(self.path)
        else:
            import datasets  # here, because it takes a second

            name, revision = HUB[self.format]
            with as_user_error(f"the data set `{name}`"):
                table = datasets.load_dataset(name, split="test", revision=revision)
            rows = [(f"{name}:{number}", row) for number, row in enumerate(table, start=1)]
        if self.format != "livecodebench":
            return rows
        return [(source, row) for source, row in rows if self.since <= _day_of(row, source) < self.until]


def _day(name: str, text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ValueError(f"Expected `{name}` to be a date such as 2025-02-01, but got {text!r:.80}.") from None


def _day_of(row: dict[str, Any], source: str) -> date:
    value = row.get("contest_date")
    try:
        return value.date() if isinstance(value, datetime) else datetime.fromisoformat(str(value)).date()
    except ValueError:
        raise ValueError(f"Expected a date in the column `contest_date` of {source}, but got {value!r:.80}.") from None
