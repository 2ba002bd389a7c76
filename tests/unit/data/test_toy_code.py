"""The embedded programming task and its base model."""

import json
import random
from itertools import product

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks.code_toy_base import LEVELS, build, build_tokenizer, example, rates, told
from pgpo_lightning.core.types import Question
from pgpo_lightning.data.toy_code import (
    BASE_CODE_MODEL,
    CHANGES,
    CONSTANTS,
    FAULTY,
    ORDERS,
    PUBLIC,
    WORDS,
    Readings,
    ToyPrograms,
    held_out,
    made_tests,
    output,
    prompt,
    questions,
    solution,
)
from pgpo_lightning.rewards import CodeExecution

READINGS = [Readings(*each) for each in product([*ORDERS, FAULTY], CHANGES)]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE_CODE_MODEL)


@pytest.mark.parametrize("level", LEVELS)
def test_programs_and_feedback_are_what_running_them_gives(level):
    meant, c = READINGS[7], 3
    words = tuple(next(iter(step)) for step in WORDS)
    question = Question("", "", columns={"tests": made_tests(words, meant, c, hidden=False)})
    numbers = [[*map(int, text.split())] for text in json.loads(question.columns["tests"])["inputs"]]
    tried = READINGS if level == "full" else READINGS[::3]
    verdicts = CodeExecution(feedback=level).judge([(question, solution(each, c), False) for each in tried])
    for readings, verdict in zip(tried, verdicts, strict=True):
        assert verdict.reward == (readings == meant)
        assert (verdict.feedback or "") == told(readings, meant, numbers, c, level)


def test_the_made_tests_every_question_tell_the_readings_apart():
    for question in [*questions("train"), *questions("test")]:
        record = json.loads(question.columns["tests"])
        c = next(c for c, word in CONSTANTS.items() if question.prompt.endswith(f" {word}."))
        numbers = [[*map(int, text.split())] for text in record["inputs"]]
        for part in (slice(PUBLIC), slice(PUBLIC, None)) if "public" in record else (slice(PUBLIC),):
            printed = [tuple(output(each, n, c) for n in numbers[part]) for each in READINGS if each.order != FAULTY]
            assert printed.count(tuple(record["outputs"][part])) == 1, question.prompt


def test_held_out_words_do_not_occur_together_in_training():
    found = {split: questions(split) for split in ("train", "test", "validation")}
    assert (len(found["train"]), len(found["test"])) == (488, 160)
    assert [q.prompt for q in found["test"]] == [q.prompt for q in found["validation"]]
    assert {q.prompt for q in found["train"]}.isdisjoint(q.prompt for q in found["test"])
    public = {split: json.loads(rows[0].columns["tests"]).get("public") for split, rows in found.items()}
    assert public["train"] is None
    assert public["test"] == [True] * 3 + [False] * 3
    asked = {prompt(words, c) for words in product(*WORDS) if held_out(words) for c in CONSTANTS}
    assert {q.prompt for q in found["test"]} <= asked
    rng = random.Random(0)
    assert asked.isdisjoint(example(rng)[0].split("\n")[0] for _ in range(1000))
    hidden = questions("train", hidden_tests=True)
    assert all("public" in json.loads(q.columns["tests"]) for q in hidden)


def test_very_hard_questions_are_few_and_their_words_rare():
    assert [len(questions(split, very_hard=True)) for split in ("train", "test")] == [24, 40]
    assert all(0 < q.columns["rate"] < 0.03 for q in questions("test", very_hard=True))
    data = ToyPrograms(very_hard=True, limit_val=7)
    data.setup("fit")
    assert (len(data.questions["train"]), data.held_out_questions()) == (24, 7)
    with pytest.raises(ValueError, match="Expected `split` to be 'train', 'validation' or 'test', but got 'val'"):
        questions("val")


def test_the_tokenizer_reproduces_every_text_and_is_the_built_one(tokenizer):
    rng = random.Random(1)
    for texts in (example(rng) for _ in range(300)):
        for text, most in zip(texts, (100, 50), strict=True):
            ids = tokenizer(text).input_ids
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
            assert len(ids) <= most
    built = build_tokenizer()
    assert built.get_vocab() == tokenizer.get_vocab()
    assert built.chat_template == tokenizer.chat_template


def test_the_assets_are_small_and_readable():
    files = [path for path in BASE_CODE_MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3e6
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in files)


def test_the_shipped_model_reads_what_was_meant_from_feedback_and_not_from_that_on_another_question():
    contexts = ["failed again", "full", "another question's"]
    measured = rates(BASE_CODE_MODEL, questions("test")[:24], 2, contexts)
    found = {name: values.mean().item() for name, values in measured.items()}
    assert 0.15 <= found["student"] <= 0.45
    assert found["full"] >= found["failed again"] + 0.2
    assert found["full"] >= found["another question's"] + 0.2


def test_the_same_seed_builds_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.code_toy_base.EXAMPLES", 4)
    for name in ("first", "again"):
        build(tmp_path / name, steps=1)
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert set(files) == {path.name for path in BASE_CODE_MODEL.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
