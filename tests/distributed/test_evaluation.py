"""Two ranks evaluate as one."""

import json
from pathlib import Path

import pytest

from tests.support.processes import finish, start_ranks

WORKER = "tests.support.evaluation_worker"


@pytest.mark.parametrize("count", [7, 1])
def test_two_ranks_are_one_also_where_one_question_has_to_be_given_twice(tmp_path, count):
    """Lightning's sampler pads 7 questions to 8. One question goes to both ranks."""
    found = {}
    for ranks in (1, 2):
        output, log, folder = (tmp_path / f"{name}{ranks}" for name in ("out", "log", "run"))
        finish(*start_ranks([WORKER, output, ranks, count, folder], log, ranks), log=log)
        (answers,) = (folder / "validate").glob("*.jsonl")
        found[ranks] = [answers.name, answers.read_bytes(), *(Path(f"{output}.{r}").read_text() for r in range(ranks))]
    one, two = found[1], found[2]
    assert json.loads(one[2])["passes"] == 0
    assert two[:3] == one
    assert two[3] == two[2], "every rank has the scores"
    assert len(one[1].splitlines()) == count


def test_the_exact_score_under_sharded_weights_is_that_of_one_process(tmp_path):
    """Ranks have other questions in other micro-batches, of which one rank may need more: the other then makes dummy passes."""
    answers, seen = {}, {}
    for ranks in (1, 2):
        output, log, folder = (tmp_path / f"{name}{ranks}" for name in ("out", "log", "run"))
        finish(*start_ranks([WORKER, output, ranks, 7, folder, "fsdp2"], log, ranks), log=log)
        (path,) = (folder / "validate").glob("*.jsonl")
        answers[ranks] = [json.loads(line) for line in path.read_text().splitlines()]
        seen[ranks] = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(ranks)]
    assert [each["sharded"] for each in (*seen[1], *seen[2])] == [False, True, True]
    assert seen[2][0]["passes"] == seen[2][1]["passes"] >= 4, "several forward passes, equally many on both ranks"
    one, two = ([line["solution_probability"] for line in answers[ranks]] for ranks in (1, 2))
    assert len(one) == 7
    assert len(set(one)) == 7
    assert two == pytest.approx(one, rel=1e-4)
    name = "validate/solution_probability"
    for each in seen[2]:
        assert each["scores"][name] == pytest.approx(seen[1][0]["scores"][name], rel=1e-4)
        assert each["errors"]["solution_probability"] == pytest.approx(
            seen[1][0]["errors"]["solution_probability"], rel=1e-4
        )


def test_what_fails_on_the_first_rank_ends_all(tmp_path):
    (tmp_path / "file").write_text("no folder")
    log = tmp_path / "log"
    both = start_ranks([WORKER, tmp_path / "out", 2, 7, tmp_path / "file"], log, 2)
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [1, 1]
    assert "NotADirectoryError" in Path(f"{log}.0").read_text()
    assert "the first rank to process the results of all ranks, but it failed: NotADir" in Path(f"{log}.1").read_text()
