"""The file of attempts: what a kill leaves behind is dropped, and nothing else."""

from dataclasses import asdict

import pytest

from pgpo_lightning.core.types import Sample
from pgpo_lightning.discovery.attempts import AttemptsFile, batch_of
from tests.support.attempts import attempt
from tests.support.helpers import random_rows


def batches(count, size=2):
    return [[attempt(b * size + i + 1, b) for i in range(size)] for b in range(count)]


def test_attempts_are_read_as_they_were_written(tmp_path):
    file = AttemptsFile(tmp_path / "run", 2)
    assert file.read() == []
    for batch in batches(3):
        file.append(batch)
    assert file.read() == [each for batch in batches(3) for each in batch]


@pytest.mark.parametrize("left", [1, 20, -1])
def test_a_part_of_a_batch_is_dropped(tmp_path, left):
    file = AttemptsFile(tmp_path, 2)
    whole, part = batches(2)
    file.append(whole)
    end = file.path.stat().st_size
    file.append(part)
    content = file.path.read_bytes()
    file.path.write_bytes(content[: end + left] if left > 0 else content[:left])
    assert file.read() == whole
    assert file.path.stat().st_size > end, "reading changes nothing"
    assert file.repair() == whole
    assert file.path.stat().st_size == end
    file.append(part)
    assert len(file.read()) == 4


def test_a_damaged_file_is_refused(tmp_path):
    file = AttemptsFile(tmp_path, 2)
    for batch in batches(4):
        file.append(batch)
    lines = file.path.read_text().splitlines(keepends=True)
    file.path.write_text("".join([lines[0], "damaged\n", *lines[2:]]))
    with pytest.raises(ValueError, match=r"attempt 2 in line 2, but got b'damaged"):
        file.repair()
    file.path.write_text("".join([*lines[:2], *lines]))
    with pytest.raises(ValueError, match="attempt 3 in line 3"):
        file.read()


def test_a_batch_is_numbered_and_shares_its_seconds():
    rows = random_rows(4)
    rows[1].reprompt_ids = None
    made = batch_of(rows, 1.0, batch=2, seconds=2.0, update_seconds=1.0)
    assert [(each.number, each.batch) for each in made] == [(9, 2), (10, 2), (11, 2), (12, 2)]
    assert [each.success for each in made] == [False, True, False, True]
    assert {(each.seconds, each.update_seconds) for each in made} == {(0.5, 0.25)}
    first, prompt = rows[0], len(rows[0].rollout.prompt_ids)
    assert made[0].update_tokens == prompt + len(first.reprompt_ids) + 2 * len(first.rollout.response_ids)
    assert made[1].update_tokens == 0
    assert asdict(made[0])["tokens"] == len(first.rollout.response_ids)


def test_feedback_of_the_question_stands_in_for_the_verifiers():
    row = random_rows(1)[0]
    row.rollout.question.privileged_context = "think"
    assert batch_of([Sample(row.rollout, row.verdict)], 1.0, 0, 1.0, 0.0)[0].feedback == "think"
