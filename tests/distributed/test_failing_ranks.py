"""What fails on one rank alone ends all of them, with the same message, instead of leaving the others in a collective."""

import pytest

from tests.support.processes import finish, start_ranks

WORKER = "tests.support.failing_worker"
MESSAGES = {
    "train": r"Verifier main.<locals>.verifier raised ValueError on question",
    "validate": r"Verifier main.<locals>.verifier raised ValueError on question",
}


@pytest.mark.parametrize(("strategy", "what"), [("ddp", "train"), ("ddp", "validate"), ("fsdp2", "train")])
def test_a_verifier_that_fails_on_one_rank_ends_both(tmp_path, strategy, what):
    ranks = start_ranks([WORKER, strategy, what, tmp_path], tmp_path / "log", 2)
    for rank in ranks:
        rank.join(60)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    texts = [(tmp_path / f"log.{rank}").read_text() for rank in (0, 1)]
    assert codes == [1, 1], "\n".join(texts)
    last = [[line for line in text.splitlines() if MESSAGES[what] in line][-1] for text in texts]
    assert last[0] == last[1]
    assert "(raised by rank 1 and forwarded to this one)" in texts[0]
    assert "forwarded to this one" not in texts[1]
    assert "no such test" in last[0]


def test_what_fails_on_one_rank_deep_inside_is_exchanged_once(tmp_path):
    script = tmp_path / "deep.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from pgpo_lightning.distributed.collectives import gather, together\n"
        "dist.init_process_group('gloo')\n"
        "try:\n"
        "    with together(), together():\n"
        "        assert dist.get_rank() == 0, 'deep'\n"
        "except AssertionError as error:\n"
        "    print(error, gather(dist.get_rank()))\n"
    )
    ranks = start_ranks([script], tmp_path / "log", 2)
    finish(*ranks, log=tmp_path / "log", seconds=60)
    assert {(tmp_path / f"log.{rank}").read_text().splitlines()[0] for rank in (0, 1)} == {"deep [0, 1]"}


def test_ranks_that_would_start_from_different_checkpoints_are_refused(tmp_path):
    ranks = start_ranks([WORKER, "ddp", "elsewhere", tmp_path], tmp_path / "log", 2)
    for rank in ranks:
        rank.join(60)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [1, 1]
    for rank in (0, 1):
        assert "same checkpoint, but ranks found 'step=000007.ckpt', null." in (tmp_path / f"log.{rank}").read_text()
