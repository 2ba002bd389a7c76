"""Studies whose runs are those of a stand-in for `pgpo fit` that takes no time."""

import os
import shutil

import yaml

from pgpo_lightning.commands import ablate
from pgpo_lightning.commands.cluster import Worker
from tests.support import ROOT

PATCHES = {
    "PROGRAM": "fake",
    "IMPORTED": (),
    "POLL": 0.02,
    "expected_settings": lambda runs: {run.name: run.settings for run in runs},
}


def studies_of_the_stand_in(tmp_path, monkeypatch):
    """Return a function that writes a study of arms, and returns what to ablate."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    for name, value in PATCHES.items():
        monkeypatch.setattr(ablate, name, value)
    shutil.copy(ROOT / "tests" / "support" / "fake_fit.py", tmp_path / "fake.py")
    (tmp_path / "base.yaml").touch()

    def written(arms, **more):
        content = {
            "base": str(tmp_path / "base.yaml"),
            "folder": str(tmp_path / "study"),
            "seeds": [0],
            "settings": {"calls": str(tmp_path / "calls")},
            "arms": arms,
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(content | more))
        return str(tmp_path / "study.yaml")

    return written


def calls(tmp_path):
    """Return a line for each run of the stand-in."""
    return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []


class FakeWorker(Worker):
    """A job whose runs are those of the stand-in."""

    def __call__(self):
        for name, value in PATCHES.items():
            setattr(ablate, name, value)
        super().__call__()
