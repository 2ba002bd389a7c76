"""What a program owes its user when something is wrong: one line or a traceback, folders that are free again, no second run."""

import os
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.commands.main import main, program
from pgpo_lightning.core.errors import UserError, as_user_error, error_report, is_user_error
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.monitoring.run_folder import LOCK, Lock
from tests.support import ROOT
from tests.support.helpers import config
from tests.support.processes import start


def raised(function, *args):
    """The exception, as `program` catches it."""
    with pytest.raises(Exception) as error:  # noqa: PT011
        function(*args)
    return error.value


def test_an_error_is_the_users_by_where_it_was_raised(tmp_path):
    import torch

    def of_torch():
        torch.zeros(2).view(3)

    def not_ours():
        raise ValueError("Expected `lr` to be small.")

    def disk_full():
        raise OSError(28, "No space left on device", "model.ckpt")

    def model():
        with as_user_error("the model `x/y`"):
            raise OSError("x/y is not a local folder\nand more")

    assert not is_user_error(raised(of_torch))
    assert not is_user_error(raised(not_ours))
    assert is_user_error(raised(disk_full))
    assert is_user_error(raised(open, tmp_path / "nowhere"))
    assert isinstance(error := raised(model), UserError)
    assert (
        error_report(error, None).splitlines()[0]
        == "error: Expected the model `x/y` to be usable, but x/y is not a local folder"
    )
    assert is_user_error(raised(main, ["fit", "--config", config(tmp_path / "run"), "--model.divergence.alpha", "1.5"]))


def test_a_fault_leaves_its_traceback_in_the_folder_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from pgpo_lightning.callbacks import StepSizeMultiplier\n"
        "class Odd(StepSizeMultiplier):\n"
        "    def multiplier(self, statistics, step):\n"
        "        raise ValueError('not enough values to unpack')\n"
    )
    (tmp_path / "configs").mkdir()  # a configuration elsewhere, whose code is in the working folder
    settings = config(tmp_path / "configs" / "run", steps=1, multiplier={"class_path": "mine.Odd"})
    words = [
        "-c",
        "import sys; sys.path.pop(0); from pgpo_lightning.commands.main import program; program()",
        "fit",
        "--config",
        settings,
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    quick = ["--trainer.num_sanity_val_steps", "0"]
    result = subprocess.run(
        [sys.executable, *words, *quick], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    *_, line, where = result.stderr.strip().splitlines()
    assert line == "error: ValueError: not enough values to unpack"
    (file,) = (tmp_path / "configs" / "run").glob("error-*.txt")
    assert where.endswith(str(file))
    text = file.read_text()
    assert "mine.py" in text
    assert "pgpo-lightning " in text
    assert "--config" in text


@pytest.mark.parametrize(
    ("code", "leaves"),
    [
        ("import sys\nsys.exit(0)\n", "sys.exit(0)"),  # as soon as it is imported
        (
            "import sys, lightning\n"
            "class Odd(lightning.Callback):\n"
            "    def on_train_batch_end(self, *_):\n"
            "        sys.exit()\n",
            "sys.exit()",
        ),
    ],
)
def test_code_of_a_user_that_leaves_is_no_success(tmp_path, monkeypatch, capsys, code, leaves):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    module = f"leaver{len(code)}"  # an imported one stays
    (tmp_path / f"{module}.py").write_text(code)
    words = ["pgpo", "fit", "--config", config(tmp_path / "run", steps=1), f"--trainer.callbacks+={module}.Odd"]
    monkeypatch.setattr("sys.argv", [*words, "--trainer.num_sanity_val_steps", "0"])
    with pytest.raises(SystemExit) as end:
        program()
    assert f"error: RuntimeError: {module} ended the program by {leaves}" in end.value.code
    assert ("The traceback: " in end.value.code) == (tmp_path / "run").exists()

    monkeypatch.setattr("sys.argv", ["pgpo", "fit", "--help"])
    with pytest.raises(SystemExit) as end:
        program()
    assert not end.value.code


@contextmanager
def unread():
    """Standard output is a pipe whose reader has ended, until Python ends and writes what is left."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, redirect_stdout(stream):
        yield


@pytest.mark.parametrize(
    "words",
    [
        ["guard", str(ROOT / "docs" / "findings" / "guard.jsonl")],
        ["plan", "--config", str(ROOT / "configs" / "quickstart.yaml")],
        ["guard", "--help"],
        ["--help"],
    ],
)
def test_output_that_nobody_reads_on_is_no_error(words, monkeypatch, tmp_path, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pgpo", *words])
    with unread(), pytest.raises(SystemExit) as end:
        program()
    assert end.value.code == 141
    assert capfd.readouterr().err == ""
    assert not list(tmp_path.iterdir())


def test_a_pipe_that_breaks_elsewhere_or_under_a_run_is_an_error(monkeypatch, tmp_path):
    def breaks(*_):
        error = BrokenPipeError(32, "Broken pipe")
        error.run_folder = folder
        raise error

    monkeypatch.setattr("pgpo_lightning.commands.main.main", breaks)
    folder = tmp_path / "run"
    with unread(), pytest.raises(SystemExit, match=r"(?s)error: BrokenPipeError: .* The traceback: .*/run/error-"):
        program()
    folder = None
    with pytest.raises(SystemExit, match=r"(?s)Traceback.*error: BrokenPipeError"):
        program()


def test_a_second_run_is_kept_out_and_leaves_nothing(tmp_path):
    folder = tmp_path / "run"
    lock = Lock(folder)
    lock.sign()
    process = start(
        ["pgpo", "fit", "--config", config(folder, steps=1), "--ckpt_path", "last-or-new"], tmp_path / "log"
    )
    process.join()
    assert process.exitcode == 2
    assert f"but {folder} is in use by process {os.getpid()} on " in (tmp_path / "log").read_text()
    assert [path.name for path in folder.iterdir()] == [LOCK]
    lock.release()


def test_a_run_that_failed_before_its_first_step_does_not_block_its_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    settings = config(folder, steps=1)
    command = ["fit", "--config", settings, "--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]
    for _ in range(2):
        with pytest.raises(MisconfigurationException, match="512 positions"):
            main([*command, "--model.max_response_length", "500"])
    main(command)
    assert "ended before its first step: started anew" in capsys.readouterr().out
    assert len(list(folder.glob("events.out*"))) == 1
    assert "max_response_length: 24" in (folder / "config.yaml").read_text()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="--ckpt_path last"):
        main(command)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_own_code_is_found_beside_a_configuration_and_above_it(tmp_path, monkeypatch, capsys):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (project / "runs" / "x").mkdir(parents=True)
    (project / "rewards_of_a_project.py").write_text("def check(question, response):\n    return 1.0\n")
    settings = Path(config(project / "runs" / "x" / "config", model={"verifier": "rewards_of_a_project.check"}))
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr("sys.path", [each for each in sys.path if each])
    before = len(sys.path)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(settings), "--print_config"])
    assert not end.value.code
    assert "verifier: rewards_of_a_project.check" in capsys.readouterr().out
    assert str(project) in sys.path[before:], "last, so that it hides nothing"
    assert not {str(settings.parent), str(project / "runs")} & set(sys.path), "no folder without such a module"


def test_a_whole_number_of_val_check_interval_counts_steps_over_epochs(tmp_path):
    folder = tmp_path / "run"  # epochs of 3 steps
    settings = config(folder, steps=4)
    main(["fit", "--config", settings, "--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "4"])
    assert list(read_scalars(folder)["val/avg@2"]) == [0, 4]


def test_one_command_starts_continues_and_ends(tmp_path, capsys):
    folder = tmp_path / "run"
    quick = ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0", "--ckpt_path", "last-or-new"]
    settings = config(folder, steps=2)
    main(["fit", "--config", settings, "--trainer.max_steps", "1", *quick])
    main(["fit", "--config", settings, *quick])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    main(["fit", "--config", settings, *quick])
    assert f"Nothing to do: the run in {folder} has made all of its 2 steps." in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("barebones=true", "`trainer.barebones` to be false"),
        ("accumulate_grad_batches=2", "micro_batch_tokens"),
        ("gradient_clip_val=1.0", "max_grad_norm"),
        ("max_steps=0", "`trainer.max_steps` to leave something to train"),
        ("limit_train_batches=0", "`trainer.limit_train_batches` to leave something"),
        ("min_steps=9", "`trainer.min_steps` to be at most `trainer.max_steps`, 6, but got 9"),
        ("max_time=00:00:00:00", "`trainer.max_time` to be longer"),
        ("callbacks+=LearningRateFinder", "without LearningRateFinder"),
        ("callbacks+=lightning.pytorch.callbacks.BatchSizeFinder", "without BatchSizeFinder"),
        (
            "callbacks+=ResumeCheckpoint",
            "without ResumeCheckpoint, but got one: every run has its own. Set `checkpoint",
        ),
        ("callbacks+=pgpo_lightning.callbacks.RunSummary", "without RunSummary"),
    ],
)
def test_settings_of_the_trainer_that_mean_something_else_here_are_refused(tmp_path, args, message):
    with pytest.raises(ValueError, match=message):
        main(["fit", "--config", config(tmp_path / "run"), f"--trainer.{args}"])
    assert not (tmp_path / "run").exists()
