"""Mutants of data files go all the way from the file to the answers file: refused in one line, or unchanged where they arrive."""

import json
import math
import random
from datetime import date, datetime, timedelta
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from pgpo_lightning.core.texts import json_line
from pgpo_lightning.core.types import Rollout, Sample
from pgpo_lightning.data import FileQuestions
from pgpo_lightning.modules import SDPO
from pgpo_lightning.rewards import BoxedAnswer, MultipleChoice
from pgpo_lightning.rewards.grade import check_question, grade
from pgpo_lightning.rollout.prompts import PromptEncoder
from pgpo_lightning.training.held_out import result_line
from tests.support.helpers import LIMITS, TOKENIZER, build, tiny_model

GOOD = {"prompt": "1+1?", "answer": "2", "level": {"a": [1, None]}}


def load(path):
    data = FileQuestions(train=str(path), batch_size=1)
    data.setup("fit")
    return data.questions["train"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            r'{"prompt": "half \ud83d", "answer": "1"}',
            r"whole characters in column `prompt` of .*a\.jsonl:2, but got str 'half \\ud83d'",
        ),
        (r'{"prompt": "x", "answer": "\ud83d"}', r"whole characters in column `answer` of .*a\.jsonl:2"),
        (r'{"prompt": "x", "answer": "1", "more": [{"\udc00": 1}]}', r"whole characters in column `more` of .*:2"),
        (r'{"prompt": "x", "answer": "1", "\udc00": 1}', r"the name of column `\\udc00` of .*:2"),
        ('{"prompt": "x", "answer": "1", "answer": "2"}', r"row at .*a\.jsonl:2, but the name `answer` occurs twice"),
        ('{"prompt": "x", "answer": ' + "1" * 6000 + "}", r"row at .*a\.jsonl:2, but .*4300 digits"),
        ('{"prompt": "x", "answer": 1e999}', r"row at .*a\.jsonl:2, but the number 1e999 is too large"),
        ('{"prompt": "x", "answer": NaN}', r"a\.jsonl:2 to have the answer in its column `answer`, but it is nan"),
        ('{"prompt": "x", "answer": {}}', r"a\.jsonl:2 to have the answer"),
        (
            '{"prompt": "x", "answer": "1", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
            r"a\.jsonl:2, but it has more than 100 levels",
        ),
        (
            '{"prompt": "x", "answer": "1", "deep": ' + "[" * 200 + "]" * 200 + "}",
            r"at most 100 levels in column `deep` of .*a\.jsonl:2",
        ),
        (
            '{"prompt": [{"role": "user", "content": " "}], "answer": "1"}',
            r"text in every chat message in column `prompt` of .*:2",
        ),
        (
            '{"prompt": [{"role": "system", "content": ""}, {"role": "user", "content": "x"}], "answer": "1"}',
            r"`content` of .* is blank",
        ),
    ],
    ids=range(13),
)
def test_a_line_that_would_fail_later_is_refused_with_its_place(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        load(path)
    path = tmp_path / "array.json"
    path.write_text(f"[{line}]")
    with pytest.raises(ValueError, match=r"array\.json"):
        load(path)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"file at .*folder\.json, but it is a folder"):
        load(tmp_path / "folder.json")
    with pytest.raises(ValueError, match=r"path of a file, but got https://host/a\.jsonl\. Download it"):
        load("https://host/a.jsonl")


def test_parquet_columns(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table([["a"], ["1"], ["2"]], names=["prompt", "answer", "answer"])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match=r"different names of the columns of .*a\.parquet, but `answer` occurs twice"):
        load(path)
    when = pa.array([0, 2**60], pa.timestamp("ms"))
    pyarrow.parquet.write_table(pa.table({"prompt": ["a", "b"], "answer": ["1", "2"], "when": when}), path)
    with pytest.raises(ValueError, match=r"value that Python can hold in column `when` of .*a\.parquet:2"):
        load(path)
    folder = tmp_path / "lr=1"
    folder.mkdir()
    pyarrow.parquet.write_table(pa.table({"prompt": ["a"], "answer": ["1"]}), folder / "a.parquet")
    assert load(folder / "a.parquet")[0].columns == {"answer": "1"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Decimal("1.50"), "1.50"),
        (date(2024, 2, 29), "2024-02-29"),
        (datetime(2024, 2, 29, 1), "2024-02-29T01:00:00"),
        (timedelta(seconds=90), 90.0),
        (b"\x00\xff", "AP8="),
        (math.inf, "inf"),
        ({"a": [math.nan, (1, 2)], 3: {1}}, {"a": ["nan", [1, 2]], "3": [1]}),
        (np.arange(2), [0, 1]),
        (np.float32(0.5), 0.5),
        ("half \ud83d", "half \ud83d"),
    ],
    ids=range(10),
)
def test_answers_are_written_as_strict_json(value, text):
    assert json.loads(json_line(value), parse_constant=pytest.fail) == text


USER, BLANK = {"role": "user", "content": "x"}, {"role": "user", "content": ""}
ODD = ["", " ", "\x00", "\ud83d", "{prompt} {feedback_raw}", "x" * 300, None, True, 0, -1, 10**400, 0.1, math.nan, math.inf,
       -math.inf, [], {}, [[]], {"a": None}, ["\udc00"], [1, "a"], USER, [USER], [BLANK], [{**USER, "role": "assistant"}],
       [None], "\u2028\r\n\ufeff", "<eos>", "2", "$.$"]  # fmt: skip
TYPED = [Decimal("2.5"), date(2024, 1, 1), datetime(2024, 1, 1), timedelta(1), b"2", b"\xff", 2.5, True, math.nan]
COLUMNS = ["prompt", "answer", "system", "privileged_context", "level"]


def mutants(folder):
    rng, number = random.Random(0), 0
    for column in COLUMNS:
        for value in ODD:
            row, number = {**GOOD, column: value}, number + 1
            text = json.dumps(row, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1]))
            path = folder / f"{number}.{rng.choice(['json', 'jsonl'])}"
            text = rng.choice(
                [text, f"[{text}]", f"[{text},]", f"\ufeff{text}\r\n\r\n", text[: rng.randrange(len(text))]]
            )
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
            yield path
        for value in TYPED:
            number += 1
            path = folder / f"{number}.parquet"
            pyarrow.parquet.write_table(
                pa.table({name: [value] if name == column else ["2"] for name in COLUMNS}), path
            )
            if rng.random() < 0.3:
                content = bytearray(path.read_bytes())
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
                path.write_bytes(content)
            yield path


def drive(path, encoder, builder):
    """Take one file from reading to the line of its answers; return what the verifier was given."""
    given = []

    def verifier(question, response):
        given.append(question)
        return 0.0, "Try again."

    questions = load(path)
    for question in questions:
        ids = encoder.question(question)
        rollout = Rollout(question, ids, [1], torch.zeros(1), "text", True)
        verdict = grade(verifier, question, "text")
        assert repr(given[-1]) == repr(question)
        builder.attach([Sample(rollout, verdict)], encoder.messages, encoder.tokens, encoder.text, random.Random(0))
        json.loads(result_line(question, [rollout], [verdict]), parse_constant=pytest.fail)
        for shipped in (BoxedAnswer(), MultipleChoice()):
            try:
                check_question(shipped, question)
            except ValueError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                assert grade(shipped, question, "none").reward == 0.0
    return questions


def test_mutants_of_data_files_are_refused_in_one_line_or_arrive_unchanged(tmp_path):
    builder = build(
        SDPO,
        tiny_model(),
        lambda question, response: 1.0,
        tokenizer=TOKENIZER,
        include_environment_feedback=True,
        **LIMITS,
    ).objective.teaching.builder
    encoder, refused, accepted, broken = PromptEncoder(TOKENIZER, False), 0, 0, []
    for path in mutants(tmp_path):
        try:
            questions = drive(path, encoder, builder)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            if type(error) is not ValueError or str(path) not in str(error) or "\n" in str(error).strip():
                broken.append((path.name, repr(error)[:300]))
        except Exception as error:
            broken.append((path.name, repr(error)[:300]))
        else:
            accepted += len(questions) > 0
    print(f"{refused} refused, {accepted} accepted, {len(broken)} broken")
    assert not broken
    assert refused > 50
    assert accepted > 40
