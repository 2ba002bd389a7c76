"""The logger class for Trackio that the page on loggers shows, with the real package and a local store.

Run by `make test-loggers`.
"""

import json
import re
import subprocess
import sys

import pytest

from tests.support import ROOT
from tests.support.trackers import fit


def test_the_class_of_the_page_logs_curves_and_settings(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "loggers.md").read_text(encoding="utf-8")
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "TrackioLogger" in block)
    (tmp_path / "my_loggers.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    words = ("--trainer.logger.project", "pgpo", "--trainer.logger.run", "mine")
    folder = fit(tmp_path / "mine", "--trainer.logger", "my_loggers.TrackioLogger", *words)

    def told(code):
        command = [sys.executable, "-c", f"import json, trackio; {code}"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    arguments = ["get", "metric", "--metric", "critic/score/mean", "--project", "pgpo", "--run", "mine", "--json"]
    curve = told(f"import sys; from trackio.cli import main; sys.argv[1:] = {arguments}; main()")["values"]
    steps, values = json.loads((folder / "run.json").read_text())["curves"]["critic/score/mean"]
    assert [point["step"] for point in curve] == steps
    assert [point["value"] for point in curve] == pytest.approx(values)  # the record is rounded
    assert told("print(json.dumps(trackio.Api().runs('pgpo')[0].config))")["run"]["method"] == "SDPO"
