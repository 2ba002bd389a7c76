"""A command of two processes."""

from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.commands import program
from tests.support.helpers import config


def test_two_processes_train_evaluate_and_finish(tmp_path):
    settings = config(tmp_path / "run", steps=2, summary={"picture": True})
    ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]
    result = program(tmp_path, "fit", "--config", settings, *ddp)
    assert result.returncode == 0, result.stderr[-2000:]
    scalars = read_scalars(tmp_path / "run")
    assert sorted(scalars["val/avg@2"]) == [0, 2]
    assert len((tmp_path / "run" / "validation" / "step=000002.jsonl").read_text().splitlines()) == 8
    assert (tmp_path / "run" / "stability.png").exists()
    assert (tmp_path / "run" / "checkpoints" / "step=000002.ckpt").exists()
