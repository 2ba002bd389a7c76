"""A signal to one of two ranks ends both at the same step."""

import pytest

from tests.support.helpers import config
from tests.support.interruptions import checkpoints, sampling
from tests.support.processes import start_ranks
from tests.support.runs import final


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("evaluations", [0, 1], ids=["step", "evaluation"])
def test_a_signal_to_one_of_two_ranks_ends_both_at_the_same_step(tmp_path, monkeypatch, evaluations):
    monkeypatch.chdir(tmp_path)
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = config(folder, steps=4, checkpoint={"every_n_train_steps": 100})
    words = ["pgpo", "fit", "--config", settings, "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    few = ["--trainer.num_sanity_val_steps", 0, "--trainer.limit_val_batches", evaluations, "--data.batch_size", 2]
    ranks = start_ranks([*words, *few, *sampling(3), "--model.engine.rank=1"], log, 2)
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [143, 143]
    assert checkpoints(folder) == [2]
    assert final(folder, 2)["pgpo_lightning"]["steps"] == 2
    assert final(folder, 2)["ToyArithmetic"]["consumed"] == 4
