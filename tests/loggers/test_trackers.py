"""W&B and MLflow as they are, without a network: the same files, the curves, a table of rollouts, the picture.

Run by `make test-loggers`.
"""

import json
import os
import struct
from pathlib import Path

import mlflow
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from pgpo_lightning.commands.main import main
from tests.support.helpers import config
from tests.support.trackers import fit, left


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return left(fit(tmp_path_factory.mktemp("plain") / "run", "--config", "configs/loggers/none.yaml"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")


def records_of(data):
    """The records in a file of W&B: LevelDB's log format after a header, with records in pieces of blocks of 32 KiB."""
    place, pieces = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # the rest of a block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""


def offline(folder):
    """Records of a W&B run, and its folder of files."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return list(records_of(path.read_bytes())), path.parent / "files"


def finished(folder, *words):
    """Train, and end the W&B run, as the end of a process does."""
    fit(folder, "--config", "loggers/wandb", "--trainer.logger.offline", "true", *words)
    wandb.finish()
    return folder


def test_wandb_gets_curves_tables_and_the_picture(plain, tmp_path):
    folder = finished(tmp_path / "mine")
    assert left(folder) == plain
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["mine"]
    records, files = offline(folder)
    (started,) = [record.run for record in records if record.HasField("run")]
    assert (started.project, started.display_name) == ("pgpo", "mine")
    updates = [item for record in records if record.HasField("config") for item in record.config.update]
    facts = next(json.loads(item.value_json) for item in updates if item.key == "run")
    assert (facts["method"], facts["multiplier"], facts["value"]) == ("SDPO", "ConstantMultiplier", 1.25)
    rows = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    logged = {row["trainer/global_step"]: row["critic/score/mean"] for row in rows if "critic/score/mean" in row}
    steps, values = plain["run.json"]["curves"]["critic/score/mean"]
    assert logged == pytest.approx(dict(zip(steps, values, strict=True)), rel=1e-4)
    assert plain["summary.json"]["final"]["avg@2"] in [row.get("summary/final") for row in rows]
    (table,) = (files / "media" / "table").glob("rollouts_*.json")
    content = json.loads(table.read_text())
    texts = [json.loads(line) for line in plain["rollouts/step=000001.jsonl"].splitlines()]
    assert content["columns"] == ["step", *texts[0]]
    assert [row[1:] for row in content["data"]] == [list(text.values()) for text in texts]
    (picture,) = (files / "media" / "images").glob("curves_*.png")
    assert picture.read_bytes() == (folder / "stability.png").read_bytes()


def test_a_second_run_goes_into_its_own_folder_and_a_refused_one_nowhere(tmp_path):
    words = ["--config", "loggers/wandb", "--trainer.logger.offline", "true"]
    first, second = (finished(tmp_path / name) for name in ("a", "b"))
    assert (first / "run.json").exists()
    assert (second / "run.json").exists()
    with pytest.raises(FileExistsError, match="holds one"):
        main(["fit", "--config", config(first), *words])
    with pytest.raises(ValueError, match="at least one batch of training questions"):
        main(["fit", "--config", config(tmp_path / "c"), *words, "--data.batch_size", "14"])
    assert len(list(tmp_path.glob("**/*.wandb"))) == 2
    assert wandb.run is None


def test_mlflow_gets_curves_tables_and_the_picture(plain, tmp_path):
    folder = fit(tmp_path / "mine", "--config", "loggers/mlflow")
    assert left(folder) == plain
    client = mlflow.MlflowClient("sqlite:///mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("pgpo").experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params["run/multiplier"] == "ConstantMultiplier"
    assert run.data.metrics["summary/final"] == pytest.approx(plain["summary.json"]["final"]["avg@2"])
    steps, values = plain["run.json"]["curves"]["critic/score/mean"]
    logged = client.get_metric_history(run.info.run_id, "critic/score/mean")
    assert {one.step: one.value for one in logged} == pytest.approx(dict(zip(steps, values, strict=True)), rel=1e-4)
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "rollouts.json")).read_text())
    texts = [json.loads(line) for line in plain["rollouts/step=000001.jsonl"].splitlines()]
    assert table["columns"] == ["step", *texts[0]]
    assert [row[1:] for row in table["data"]] == [list(text.values()) for text in texts]
    picture = client.download_artifacts(run.info.run_id, "stability.png")
    assert os.path.getsize(picture) == (folder / "stability.png").stat().st_size
    with pytest.raises(FileExistsError, match="holds one"):
        main(["fit", "--config", config(folder), "--config", "loggers/mlflow"])
    assert len(client.search_runs([run.info.experiment_id])) == 1
