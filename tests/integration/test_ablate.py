"""`pgpo ablate`: with a stand-in for `pgpo fit` that takes no time, and with real runs, one of them killed."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
import yaml

from pgpo_lightning.checkpoints.finding import MARK
from pgpo_lightning.commands import ablate as command
from pgpo_lightning.commands.main import main
from pgpo_lightning.monitoring.run_record import load_runs
from pgpo_lightning.studies.spec import read_study
from tests.support import ROOT
from tests.support.fake_studies import calls, studies_of_the_stand_in
from tests.support.helpers import config
from tests.support.processes import start


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that writes a study of arms for the stand-in, and returns what to ablate."""
    return studies_of_the_stand_in(tmp_path, monkeypatch)


def test_runs_wait_for_what_they_read_and_finished_ones_are_not_repeated(study, tmp_path, capsys):
    path = study({"control": {"run": "{run:pgpo}"}, "pgpo": {"sleep": 0.1}})
    command.ablate(path)
    assert calls(tmp_path) == ["pgpo new 1", "control new 1"]
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "0/2 runs done, 0 failed, 1 running"
    assert any(re.fullmatch(r"1/2 runs done, 0 failed, 1 running, about \d+ s left", line) for line in out)
    assert out[-2] == "2/2 runs done, 0 failed, 0 running"
    assert f"pgpo report {tmp_path / 'study'}" in out[-1]
    command.ablate(path)
    assert len(calls(tmp_path)) == 2


def test_as_many_processes_as_asked(study, tmp_path):
    path = study({"a": {"sleep": 2}, "b": {"sleep": 2}, "c": {"sleep": 2}, "d": {"sleep": 2}}, processes=2)
    start = time.monotonic()
    command.ablate(path, processes=4)
    assert time.monotonic() - start < 4  # what two at a time would need at least
    assert len(calls(tmp_path)) == 4
    with pytest.raises(ValueError, match="`processes` to be at least 1, but got 0"):
        command.ablate(path, processes=0)


def test_a_broken_run_is_reported_and_does_not_stop_the_rest(study, tmp_path, capsys):
    arms = {"broken": {"fail": True}, "control": {"run": "{run:broken}"}, "silent": {"silent": True}, "fine": {}}
    path = study(arms)
    with pytest.raises(SystemExit) as end:
        command.ablate(path)
    assert end.value.code == 1
    out = capsys.readouterr().out
    log = tmp_path / "study" / "base" / "broken" / "seed=0.log"
    assert (
        f"failed: base/broken/seed=0: exit status 1; {log} ends with\n    first\n    second\n    error: it broke\n"
        in out
    )
    assert "failed: base/silent/seed=0: ended without run.json" in out
    assert "waiting for a failed run: base/control/seed=0\n" in out
    assert (tmp_path / "study" / "base" / "fine" / "seed=0" / "run.json").exists()
    # Mended: what broke is tried again, in a folder that it had begun.
    kept = log.with_suffix("") / "mine.txt"
    kept.touch()
    command.ablate(study(arms | {"broken": {}, "silent": {}}))
    assert calls(tmp_path)[3:] == ["broken new 1", "control new 1", "silent new 1"]
    assert kept.exists()
    assert "it broke" in log.read_text()


def test_a_run_with_a_checkpoint_goes_on_from_it(study, tmp_path, capsys):
    path = study({"a": {"checkpoint": True, "fail": True}})
    for _ in range(2):
        with pytest.raises(SystemExit):
            command.ablate(path)
    assert calls(tmp_path) == ["a new 1", "a resumed 1"]
    with pytest.raises(ValueError, match=r"its `fail` is True instead of False"):
        command.ablate(study({"a": {"checkpoint": True, "fail": False}}))


def test_finished_runs_may_give_up_their_checkpoints(study, tmp_path):
    path = study({"a": {"checkpoint": True}})
    command.ablate(path)
    folder = tmp_path / "study" / "base" / "a" / "seed=0" / "checkpoints"
    own, foreign = folder / "step=000001.ckpt", folder / "step=000002.ckpt"
    torch.save({"pgpo_lightning": {"steps": 1}, "state_dict": {}, MARK: {"run": "a"}}, own)
    torch.save({"pgpo_lightning": {"steps": 2}, "state_dict": {}}, foreign)
    command.ablate(study({"a": {"checkpoint": True}}, keep_checkpoints=False))
    assert not own.exists()
    assert foreign.exists()  # of another callback
    assert len(calls(tmp_path)) == 1


def test_a_finished_run_of_other_settings_is_refused_and_named(study, tmp_path, capsys):
    arms = {"pgpo": {"x": 1.0}, "other": {"x": 1.0}, "control": {"run": "{run:pgpo}", "seed": "{seed}"}}
    command.ablate(study(arms, seeds=2))
    for changes, message in [
        ({"pgpo": {"x": 2.0}}, r"pgpo/seed=0.*its `x` is 1\.0 instead of 2\.0"),
        (
            {"control": {"run": "{run:other}", "seed": "{seed}"}},
            "`run` is base/pgpo with the same seed instead of base/other with",
        ),
        ({"control": {"run": "{run:pgpo:next}", "seed": "{seed}"}}, "with the same seed.*with another seed"),
        ({"control": {"run": "{run:pgpo}", "seed": 0}}, r"control/seed=1.*its `seed` is 1 instead of 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            command.ablate(study(arms | changes, seeds=2))
    assert len(calls(tmp_path)) == 6
    # The same study elsewhere, with more seeds, and with what changes no result.
    (tmp_path / "study").rename(tmp_path / "moved")
    command.ablate(study(arms, seeds=3, folder=str(tmp_path / "moved"), conditions={"base": {"summary": {"texts": 1}}}))
    assert len(calls(tmp_path)) == 9
    (tmp_path / "moved" / "base" / "pgpo" / "seed=0" / "config.yaml").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        command.ablate(study(arms, folder=str(tmp_path / "moved")))


def test_a_base_that_is_edited_meanwhile_is_noticed(study, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "expected_settings", lambda runs: {run.name: {"x": 2} for run in runs})
    with pytest.raises(SystemExit):
        command.ablate(study({"a": {"x": 1}}))
    assert "its `x` is 1 instead of 2" in capsys.readouterr().out


@pytest.mark.parametrize("finishes", [False, True])
def test_a_run_that_another_process_still_writes_is_waited_for(study, tmp_path, capsys, finishes):
    path = study({"a": {}, "b": {}, "control": {"run": "{run:a}"}})
    (run, *_) = read_study(path).runs()
    run.log.parent.mkdir(parents=True)

    def release():
        if finishes:
            words = [sys.executable, str(tmp_path / "fake.py"), *run.arguments()]
            subprocess.run(words, env={"OMP_NUM_THREADS": "7"}, check=True)
        fcntl.flock(held, fcntl.LOCK_UN)

    with run.log.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        threading.Timer(1.0, release).start()
        command.ablate(path)
    assert calls(tmp_path) == ["b new 1", "a new 7" if finishes else "a new 1", "control new 1"]
    assert "3/3 runs done" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_ends_the_runs_and_leaves_what_goes_on(study, tmp_path, request, number, code):
    # A shell starts what it puts into the background with SIGINT ignored, and so the tests with it.
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    path = study({"a": {"checkpoint": True, "sleep": 60}})

    def interrupt():  # as soon as there is something to go on from
        while not list((tmp_path / "study").rglob("*.ckpt")):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as end:
        command.ablate(path)
    assert end.value.code == code
    command.ablate(path)
    assert calls(tmp_path) == ["a new 1", "a resumed 1"]


def test_a_dry_run_prints_what_is_missing_in_an_order_that_works(study, tmp_path, capsys):
    path = study({"control": {"run": "{run:pgpo}"}, "pgpo": {}, "sdpo": {}, "last": {"run": "{run:control}"}})
    command.ablate(path, dry_run=True)
    assert calls(tmp_path) == []
    assert not (tmp_path / "study").exists()
    lines = capsys.readouterr().out.splitlines()
    comments = [line for line in lines if line.startswith("#")]
    assert comments == [
        "# part 1: 2 runs",
        "# part 2: 1 runs, after the earlier parts have ended",
        "# part 3: 1 runs, after the earlier parts have ended",
    ]
    script = "\n".join(lines).replace("pgpo fit", f"{sys.executable} {tmp_path}/fake.py fit")
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    subprocess.run(["sh", "-e", "-c", script], check=True, env=environment)  # pasted
    assert calls(tmp_path) == ["pgpo new 2", "sdpo new 2", "control new 2", "last new 2"]
    command.ablate(path, dry_run=True)
    assert capsys.readouterr().out == "# every run is finished\n"


def test_a_dry_run_goes_on_from_what_is_there(study, tmp_path, capsys):
    arms = {"a": {"checkpoint": True}, "b": {}, "c": {"run": "{run:d}"}, "d": {}}
    command.ablate(study(arms))
    capsys.readouterr()
    for arm in "abc":
        (tmp_path / "study" / "base" / arm / "seed=0" / "run.json").unlink()
    command.ablate(study(arms), dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# part 1: 3 runs"
    assert lines[1].endswith("--ckpt_path last")
    assert lines[2].startswith(f"# {tmp_path}/study/base/b/seed=0 has files but no checkpoint")
    assert len(lines) == 6


# ---------------------------------------------------------------------------------------------------------- real runs


def matched(arm):
    return {"multiplier": {"class_path": "MatchedConstantMultiplier", "init_args": {"run": f"{{run:{arm}}}"}}}


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A study of the toy with few steps and questions, and checkpoints at every step."""
    content = {
        "base": config(tmp_path / "base", steps=4, multiplier=None),
        "folder": str(tmp_path / "study"),
        "seeds": [3],
        "conditions": {"low": {"model.init_args.optimizer.init_args.lr": "5e-4"}},  # a text to YAML
        "arms": {
            "pgpo": {"multiplier": {"class_path": "InformationMultiplier", "init_args": {"sensitivity": 8}}},
            "constant": matched("pgpo"),
        },
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return path


@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere runs outlive an `ablate` that is killed")
def test_a_study_that_is_killed_and_started_again_is_the_study_that_was_not(real, tmp_path, capsys):
    words = ["ablate", "--config", str(real), "--processes", "1"]
    process = start(["pgpo", *words], tmp_path / "log")
    study = tmp_path / "study" / "low"
    checkpoints = study / "constant" / "seed=3" / "checkpoints"
    while not (checkpoints.is_dir() and len(list(checkpoints.glob("step=*.ckpt"))) >= 2):
        assert process.exitcode is None, "the study ended before it could be killed"
        time.sleep(0.02)
    process.kill()
    process.join()
    assert_free(study / "constant" / "seed=3.log")
    assert not (study / "constant" / "seed=3" / "run.json").exists()
    finished = study / "pgpo" / "seed=3" / "run.json"
    made = finished.stat().st_mtime_ns

    main(words)
    assert finished.stat().st_mtime_ns == made
    assert "fit from " in (study / "constant" / "seed=3.log").read_text()
    assert "2/2 runs done, 0 failed" in capsys.readouterr().out

    # The same, uninterrupted, from the commands that a dry run prints.
    whole = replace(read_study(real), folder=tmp_path / "whole")
    for run in whole.runs():
        main(run.arguments())
    runs = records(tmp_path / "study")
    assert runs == records(tmp_path / "whole")
    # Arms differ in nothing but the arm: up to the first update they are the same run.
    constant, pgpo = runs
    steps = len(pgpo["rho"])  # those with a signal
    assert steps >= 3
    assert constant["rho"] == pytest.approx([sum(pgpo["rho"]) / steps] * steps)
    assert constant["questions"]["0"] == pgpo["questions"]["0"]
    for tag in ("critic/score/mean", "response_length/mean", "information/mean", "actor/grad_norm"):
        assert constant["curves"][tag][1][0] == pgpo["curves"][tag][1][0]
        assert constant["curves"][tag] != pgpo["curves"][tag]


def assert_free(path):
    """Nobody writes into it, very soon."""
    deadline = time.monotonic() + 5
    with path.open() as file:
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, f"{path} is still written"
                time.sleep(0.01)


def records(folder):
    return [asdict(run) | {"seconds": 0, "cpu_seconds": 0} for run in load_runs([folder])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"a": {"multiplier.sensitivty": 1}}}, r"low/a to be accepted by `pgpo fit`(.|\n)*sensitivty"),
        ({"arms": {"a": {"modle.init_args.alpha": 1}}}, r"low/a to be accepted by `pgpo fit`(.|\n)*modle"),
        ({"settings": {"checkpoint": {"dirpath": "x"}}}, "`settings` not to set `checkpoint.dirpath`"),
        ({"sedes": 3}, "`sedes`"),
    ],
)
def test_settings_that_are_wrong_are_refused_before_anything_starts(real, tmp_path, changes, message):
    real.write_text(yaml.safe_dump(yaml.safe_load(real.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        main(["ablate", "--config", str(real)])
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("flag", [["--dry-run", "--processes", "2"], ["--dry_run", "true"]])
def test_the_flag_for_a_dry_run(real, tmp_path, capsys, flag):
    main(["ablate", "--config", str(real), *flag])
    assert capsys.readouterr().out.startswith("# part 1: 1 runs\npgpo fit --config ")
    assert not (tmp_path / "study").exists()


def test_a_study_ends_at_the_look_that_decides(study, tmp_path, capsys):
    controls = ("constant", "random", "shuffled", "replayed", "inverse")
    arms = {"pgpo": {"gain": 0.3}} | {name: {"gain": 0.0} for name in controls}
    path = study(arms, seeds=6, sequential={"looks": [3, 6], "spending": "pocock"})
    command.ablate(path, dry_run=True)
    out = capsys.readouterr().out
    assert (out.count("pgpo fit"), out.splitlines()[-1]) == (18, "# The next look is at 3 seeds.")
    command.ablate(path, processes=2)
    assert len(calls(tmp_path)) == 18
    out = capsys.readouterr().out
    assert "Decided at the look at 3 seeds (pgpo: yes). 18 runs were not needed.\n" in out
    command.ablate(path)
    assert len(calls(tmp_path)) == 18
    command.ablate(path, dry_run=True)
    assert "pgpo fit" not in capsys.readouterr().out


def test_rules_are_fixed_by_the_first_run(study, tmp_path):
    prediction = {"arm": "a", "against": "b", "condition": "base", "sign": "+", "size": 0.1, "reason": "as before"}
    arms = {"a": {}, "b": {}}
    command.ablate(study(arms, predictions=[prediction | {"sign": "-"}]), dry_run=True)
    path = study(arms, predictions=[prediction])
    command.ablate(path)  # nothing had begun: the rules may still change
    file = tmp_path / "study" / "registration.json"
    before = file.read_text()
    assert '"runs_before": 0' in before
    with pytest.raises(
        ValueError, match=r"Expected `predictions` of the study to be as registered in .*, or choose another"
    ):
        command.ablate(study(arms, predictions=[prediction | {"size": 0.2}]))
    with pytest.raises(ValueError, match="Expected `design` of the study to be as registered"):
        command.ablate(study(arms, predictions=[prediction], design={"margin": 0.1}))
    command.ablate(study(arms, predictions=[prediction], seeds=[0, 1]))  # more seeds are no other rules
    assert file.read_text() == before
