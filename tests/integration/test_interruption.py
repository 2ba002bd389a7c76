"""A run that is asked to end, at any moment, saves the last whole step and resumes as if it had not been interrupted."""

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from pgpo_lightning.commands.main import main
from pgpo_lightning.distributed.stopping import AGAIN, SIGNALS, Stopped
from tests.support.helpers import config
from tests.support.interruptions import checkpoints, sampling
from tests.support.processes import start
from tests.support.runs import assert_same, assert_same_run, final


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(["fit", "--config", config(folder)])
    return folder


def seldom(path, every=100):
    """The same configuration with checkpoints so seldom that none is due."""
    settings = yaml.safe_load(Path(path).read_text())
    settings["checkpoint"]["every_n_train_steps"] = every
    Path(path).write_text(yaml.safe_dump(settings))
    return path


def asking(hook, step):
    return ["--trainer.callbacks+=parts.Ask", f"--trainer.callbacks.hook={hook}", f"--trainer.callbacks.step={step}"]


# The evaluation before the first step is the first time that something is sampled, those of steps 2 and 4 the fourth and seventh.
@pytest.mark.parametrize(
    ("moment", "saved"),
    [
        (sampling(6), 3),  # of step 4, the first of an epoch
        (sampling(8), 4),  # of step 5, behind an evaluation
        (sampling(4), 2),
        (sampling(7), 4),
        (asking("on_before_optimizer_step", 1), 2),
        (asking("on_validation_start", 4), 4),
        (asking("on_train_epoch_end", 3), 3),
    ],
    ids=[
        "sampling",
        "sampling-behind-evaluation",
        "evaluation",
        "evaluation-4",
        "update",
        "evaluation-start",
        "epoch-end",
    ],
)
@pytest.mark.usefixtures("parts")
def test_the_last_whole_step_is_saved_and_continued(whole, tmp_path, moment, saved):
    folder = tmp_path / "run"
    settings = seldom(config(folder))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stop:
        main(["fit", "--config", settings, *moment])
    assert stop.value.status == 143
    assert signal.getsignal(signal.SIGTERM) == before
    assert checkpoints(folder) == [saved]
    assert stop.value.saved == folder / "checkpoints" / f"step={saved:06d}.ckpt"
    assert (folder / "summary.json").exists()
    assert not (folder / "run.json").exists()
    main(["fit", "--config", settings, "--ckpt_path", "last-or-new"])
    assert_same_run(whole, folder)
    assert (folder / "run.json").exists()


@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.usefixtures("parts")
def test_slurm_is_asked_to_requeue_a_job_that_goes_on_by_itself(whole, tmp_path, monkeypatch, continues):
    asked = tmp_path / "asked"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(scontrol.parent), os.environ["PATH"]]))
    job = {"NTASKS": "1", "JOB_ID": "42", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    folder = tmp_path / "run"
    settings = seldom(config(folder))
    command = ["fit", "--config", settings, *(["--ckpt_path", "last-or-new"] if continues else [])]
    with pytest.raises(Stopped) as stop:
        main([*command, *asking("on_before_optimizer_step", 1), f"--trainer.callbacks.number={int(signal.SIGUSR1)}"])
    assert stop.value.number == signal.SIGUSR1
    assert checkpoints(folder) == [2]
    assert (asked.read_text() if asked.exists() else "") == ("requeue 42\n" if continues else "")
    if continues:  # what SLURM starts again is the same command
        main(command)
        assert_same_run(whole, folder)


@pytest.mark.usefixtures("parts")
def test_a_checkpoint_that_is_being_written_is_finished(whole, tmp_path):
    folder = tmp_path / "run"
    settings = config(folder)
    with pytest.raises(Stopped):
        main(["fit", "--config", settings, *asking("on_save_checkpoint", 3)])
    assert checkpoints(folder) == [1, 2, 3]
    assert not list((folder / "checkpoints").glob("*.partial"))
    assert_same(final(whole, 3)["state_dict"], final(folder, 3)["state_dict"])


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    "moment", [sampling(1), asking("on_fit_start", 0), sampling(2)], ids=["evaluation", "start", "step"]
)
def test_before_the_first_whole_step_there_is_nothing_to_save_and_the_folder_is_free(tmp_path, moment, capsys):
    folder = tmp_path / "run"
    settings = config(folder, steps=1)
    with pytest.raises(Stopped) as stop:
        main(["fit", "--config", settings, *moment])
    assert stop.value.saved is None
    assert not (folder / "checkpoints").exists()
    main(["fit", "--config", settings, "--trainer.limit_val_batches", "0"])
    assert "ended before its first step: started anew" in capsys.readouterr().out
    assert checkpoints(folder) == [1]
    assert len(list(folder.glob("events.out*"))) == 1


@pytest.mark.usefixtures("parts")
def test_the_last_evaluation_is_finished(tmp_path):
    folder = tmp_path / "run"
    main(["fit", "--config", config(folder, steps=2), *asking("on_validation_start", 2)])
    assert (folder / "run.json").exists()
    assert SIGNALS.asked == signal.SIGTERM


def wait_for(process, condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None, "the run ended before it could be asked to"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_program_says_how_to_go_on_and_a_second_signal_ends_it_at_once(tmp_path, monkeypatch):
    folder, log = tmp_path / "run", tmp_path / "log"
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "def check(question, response):\n"
        "    if pathlib.Path('slow').exists():\n"
        "        pathlib.Path('judging').touch()\n"
        "        time.sleep(60)\n"
        "    time.sleep(0.02)\n"
        "    return float(len(response) % 2)\n"
    )
    settings = config(folder, steps=50, model={"verifier": "slow.check"})
    words = [
        "pgpo",
        "fit",
        "--config",
        settings,
        "--trainer.num_sanity_val_steps",
        "0",
        "--trainer.val_check_interval",
        "50",
    ]
    monkeypatch.chdir(tmp_path)
    process = start(words, log)
    wait_for(process, lambda: checkpoints(folder))
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    told = log.read_text()
    assert f"stopped by SIGTERM; {folder}/checkpoints/step=00000" in told
    assert told.strip().endswith("--trainer.val_check_interval 50 --ckpt_path last")
    assert "Traceback" not in told

    last = checkpoints(folder)[-1]
    process = start([*words, "--ckpt_path", "last-or-new"], log)
    wait_for(process, lambda: checkpoints(folder)[-1] > last)
    (tmp_path / "slow").touch()
    wait_for(process, (tmp_path / "judging").exists)  # which takes a minute
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)  # the same request: a terminal tells the process, and so does what started it
    wait_for(process, lambda: "once more ends it now" in log.read_text())
    time.sleep(AGAIN + 0.1)
    assert process.exitcode is None
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
