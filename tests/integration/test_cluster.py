"""`pgpo ablate` with jobs of a cluster, for which submitit's local executor stands."""

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from pgpo_lightning.commands import ablate as command
from pgpo_lightning.commands import cluster
from pgpo_lightning.commands.cluster import Cluster
from pgpo_lightning.commands.main import main
from pgpo_lightning.studies.spec import read_study
from tests.support.fake_studies import FakeWorker, calls, studies_of_the_stand_in


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A function that writes a study of arms for the stand-in, and returns what to ablate."""
    return studies_of_the_stand_in(tmp_path, monkeypatch)


def test_a_job_leaves_runs_to_others_instead_of_waiting_for_them(study, tmp_path, capsys):
    path = study({"a": {}, "b": {}, "control": {"run": "{run:a}"}})
    (run, *_) = read_study(path).runs()
    run.log.parent.mkdir(parents=True)
    with run.log.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        command.work(path)
    assert calls(tmp_path) == ["b new 1"]
    assert capsys.readouterr().out.splitlines()[-1] == "Runs that are left to other jobs: 2"
    command.work(path)
    assert calls(tmp_path) == ["b new 1", "a new 1", "control new 1"]


def test_a_preempted_job_goes_on(study, tmp_path, monkeypatch, capsys):
    pytest.importorskip("submitit", reason="submitit is not installed")
    jobs = []

    def submit(worker, *where):
        jobs.extend(cluster.submit(FakeWorker(worker.config, worker.processes), *where))
        return jobs

    monkeypatch.setattr(command, "submit", submit)
    path = study({"a": {"checkpoint": True, "sleep": 60}, "b": {}, "control": {"run": "{run:a}"}})
    main(["ablate", "--config", path, "--cluster.jobs", "1", "--cluster.executor", "local"])
    assert capsys.readouterr().out.startswith(f"Submitted 1 job: {jobs[0].job_id}. ")
    while not list((tmp_path / "study").rglob("*.ckpt")):
        time.sleep(0.05)
    (job,) = jobs
    (task,) = Path(f"/proc/{job.job_id}/task/{job.job_id}/children").read_text().split()
    os.kill(int(task), signal.SIGUSR2)  # as Slurm does before it takes the node away
    job.result()
    assert sorted(calls(tmp_path)) == ["a new 1", "a resumed 1", "b new 1", "control new 1"]


def test_what_a_cluster_does_not_take_is_refused(study, tmp_path, monkeypatch):
    path = study({"a": {}})
    with pytest.raises(ValueError, match=r"submitit to take `cluster`, but .*gpus_a_node"):
        command.ablate(path, cluster=Cluster(1, "local", {"gpus_a_node": 1}))
    monkeypatch.setattr(cluster, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pgpo-lightning\[cluster\]'"):
        command.ablate(path, cluster=Cluster(1))
    assert not calls(tmp_path)
