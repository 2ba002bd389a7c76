"""What a run leaves does not depend on its loggers, and a refused run is in none of them."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from pgpo_lightning import RunSummary, ToyArithmetic
from pgpo_lightning.callbacks.resume_checkpoint import ResumeCheckpoint
from pgpo_lightning.commands.fit import PGPOCommand
from pgpo_lightning.commands.loggers import in_folder
from pgpo_lightning.commands.main import main
from pgpo_lightning.modules import SDPO
from pgpo_lightning.monitoring.curves import layout, read_scalars
from pgpo_lightning.monitoring.run_folder import folder_of
from tests.support.helpers import LIMITS, TOKENIZER, build, config, half_right, tiny_model, trainer
from tests.support.trackers import fit, left

STARTED = []


class Tracker(Logger):
    """A tracker that nobody ships, with the methods of Lightning's WandbLogger."""

    name = version = "own"

    def __init__(self) -> None:
        super().__init__()
        self.metrics, self.tables, self.images, self.params = {}, [], [], {}

    @property
    def experiment(self):
        STARTED.append(self)
        return self

    def log_metrics(self, metrics, step=None):
        self.metrics.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, params):
        self.params |= params

    def log_table(self, key, columns, data, step):
        self.tables.append((key, columns, data, step))

    def log_image(self, key, images, step):
        self.images.append((key, images, step))


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("tensorboard") / "run")


def test_the_files_of_a_run_are_the_same_with_any_logger(tensorboard, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = left(tensorboard)
    assert expected["run.json"]["curves"]["critic/score/mean"][0] == [1, 2]
    assert expected["summary.json"]["base"]["step"] == 0
    assert expected["summary.json"]["multiplier"]["mean"] == 1.25

    assert left(fit(tmp_path / "none", "--config", "loggers/none", "--trainer.log_every_n_steps", "2")) == expected
    assert not list((tmp_path / "none").glob("**/events*"))
    assert "final @2" in capsys.readouterr().out

    assert left(fit(tmp_path / "csv", "--config", "loggers/csv")) == expected
    (table,) = (tmp_path / "csv").glob("csv/version_0/metrics.csv")
    with table.open() as lines:
        rows = list(csv.DictReader(lines))
    logged = {int(row["step"]): float(row["critic/score/mean"]) for row in rows if row["critic/score/mean"]}
    assert logged == pytest.approx(
        {1: 0, 2: 0} | dict(zip(*expected["run.json"]["curves"]["critic/score/mean"], strict=True)), rel=1e-4
    )

    STARTED.clear()
    mine = {"class_path": f"{__name__}.Tracker"}
    both = [{"class_path": "TensorBoardLogger", "init_args": {"save_dir": "", "name": "", "version": ""}}, mine]
    folder = fit(tmp_path / "several", trainer=trainer_settings(tmp_path / "several", logger=both))
    assert left(folder) == expected
    assert read_scalars(folder)["val/avg@2"].keys() == {0, 2}
    own = STARTED[0]
    assert own.metrics[2]["summary/final"] == expected["summary.json"]["final"]["avg@2"]
    assert own.images == [("curves", [str(folder / "stability.png")], 2)]
    ((name, columns, rows, step),) = own.tables
    assert (name, columns[:3], step) == ("rollouts", ["step", "reward", "tokens"], 1)
    texts = [json.loads(line) for line in expected["rollouts/step=000001.jsonl"].splitlines()]
    assert [row[1:] for row in rows] == [list(text.values()) for text in texts]
    assert own.params["run"]["multiplier"] == "ConstantMultiplier"
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"none", "csv", "several"}


def trainer_settings(folder, **more):
    return yaml.safe_load(Path(config(folder)).read_text())["trainer"] | {"max_steps": 2} | more


def test_tensorboard_lists_the_run_beside_its_scores(tensorboard):
    events = EventAccumulator(str(tensorboard), size_guidance={"tensors": 0})
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    facts = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert {name: facts[name].string_value for name in ("method", "multiplier")} == {
        "method": "SDPO",
        "multiplier": "ConstantMultiplier",
    }
    assert {name: facts[name].number_value for name in ("value", "learning_rate", "seed")} == {
        "value": 1.25,
        "learning_rate": 1e-3,
        "seed": 3,
    }
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    compared = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    scalars = read_scalars(tensorboard)
    summary = json.loads((tensorboard / "summary.json").read_text())
    wanted = {
        "summary/best": summary["best"]["avg@2"],
        "summary/final": summary["final"]["avg@2"],
        "summary/dose": 1.25,
    }
    assert {info.name.tag for info in compared} == set(wanted)
    assert {tag: scalars[tag][2] for tag in wanted} == pytest.approx(wanted)

    drawn = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title for category in drawn.category for chart in category.chart}
    assert {"divergence", "multiplier", "rows with a teacher"} <= charts
    assert "groups with a demonstration" not in charts


def test_charts_are_those_of_the_run():
    def titles(**what):
        return {title for charts in layout(**what).values() for title in charts}

    plain = titles(teacher=False, multiplier=False, demonstrations=False)
    assert titles(teacher=True, multiplier=True, demonstrations=True) - plain == {
        "divergence", "objective", "rows with a teacher", "I", "standard error of I", "multiplier", "learning rate",
        "groups with a demonstration",
    }  # fmt: skip
    assert "information" not in layout(teacher=False, multiplier=False, demonstrations=False)


def test_a_refused_run_is_in_no_tracker(tensorboard, tmp_path):
    before = sorted(tensorboard.rglob("*"))
    logger = ["--trainer.logger", f"{__name__}.Tracker"]
    STARTED.clear()
    again = config(tmp_path / "again", steps=2)
    with pytest.raises(FileExistsError, match="holds one"):
        main(["fit", "--config", again, "--trainer.default_root_dir", str(tensorboard), *logger])
    with pytest.raises(ValueError, match="at least one batch of training questions"):  # found while data are set up
        main(["fit", "--config", again, *logger, "--data.batch_size", "14"])
    with pytest.raises(ValueError, match="at least one batch of training questions"):
        main(["fit", "--config", again, "--data.batch_size", "14"])
    assert STARTED == []
    assert not list((tmp_path / "again").glob("events*"))
    assert sorted(tensorboard.rglob("*")) == before


def test_a_logger_without_its_package_is_named_and_mlflow_has_a_store_that_it_takes(monkeypatch, tmp_path):
    mlflow = Namespace(class_path="lightning.pytorch.loggers.MLFlowLogger", init_args=Namespace(run_name=None))
    monkeypatch.setattr("pgpo_lightning.commands.loggers.find_spec", lambda package: None)
    with pytest.raises(
        ValueError, match=r"package mlflow for `trainer.logger` MLFlowLogger, .* Run `pip install mlflow`"
    ):
        in_folder([True, mlflow], tmp_path / "mine")
    monkeypatch.setattr("pgpo_lightning.commands.loggers.find_spec", lambda package: package)
    in_folder(mlflow, tmp_path / "mine")
    assert mlflow.init_args == Namespace(run_name="mine", tracking_uri="sqlite:///mlflow.db")


def test_callbacks_that_ask_for_a_logger_find_one(tmp_path):
    fit(
        tmp_path / "run",
        "--trainer.callbacks+=DeviceStatsMonitor",
        "--trainer.callbacks+=LearningRateMonitor",
        "--trainer.num_sanity_val_steps",
        "0",
    )
    assert "lr-AdamW" in read_scalars(tmp_path / "run")


def test_an_evaluation_leaves_the_log_of_training_alone(tmp_path):
    class Built(PGPOCommand):
        def _run_subcommand(self, subcommand):
            found.append(self.trainer.loggers)

    found = []
    settings = config(tmp_path / "run")
    for name in ("csv", "tensorboard"):
        Built(["validate", "--config", settings, "--config", f"configs/loggers/{name}.yaml"])
    Built(["validate", "--config", settings, "--trainer.logger", f"{__name__}.Tracker"])
    assert found[:2] == [[], []]
    assert [type(logger).__name__ for logger in found[2]] == ["Tracker"]


def test_a_resumed_run_keeps_the_curves_of_before(tmp_path):
    whole = left(fit(tmp_path / "whole", "--config", "configs/loggers/none.yaml"))
    none = ["--config", "configs/loggers/none.yaml"]
    folder = fit(tmp_path / "cut", *none, "--trainer.max_steps", "1")
    (folder / "run.json").unlink()
    fit(folder, *none, "--ckpt_path", "last")
    assert left(folder) == whole


def test_from_python_the_folder_is_that_of_the_log_or_the_default(tmp_path):
    numbered = TensorBoardLogger(tmp_path / "tb", name="x")
    for loggers, expected in (
        (False, tmp_path),
        ([Tracker()], tmp_path),
        ([Tracker(), numbered], tmp_path / "tb" / "x" / "version_0"),
        ([CSVLogger(tmp_path / "csv", name="", version="")], tmp_path / "csv"),
    ):
        t = trainer(tmp_path, logger=loggers)
        assert folder_of(t) == expected
        assert ResumeCheckpoint().folder(t) == expected / "checkpoints"


def test_one_summary_serves_several_runs(tmp_path):
    summary = RunSummary(picture=False)
    module = build(SDPO, tiny_model(), half_right, tokenizer=TOKENIZER, num_generations=4, eval_samples=2, **LIMITS)
    for name, steps in (("one", 2), ("two", 1)):
        data = ToyArithmetic(batch_size=2, limit_train=4, limit_val=4)
        trainer(tmp_path / name, max_steps=steps, callbacks=[summary]).fit(module, datamodule=data)
        module.steps = 0
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["curves"]["critic/score/mean"][0] == [1]
