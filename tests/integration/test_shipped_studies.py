"""The shipped studies: `pgpo fit` takes the settings of their runs.

Of some two hundred different runs these have every setting, every class and every base at least once.
"""

import pytest

from pgpo_lightning.commands.building import BuildCommand, ParseCommand
from pgpo_lightning.commands.configs import resolved
from pgpo_lightning.core.shipped_configs import find, names
from pgpo_lightning.models.loading import resolve_model
from pgpo_lightning.studies.spec import PlannedRun, leaves, read_study


def parts(run: PlannedRun) -> set[tuple]:
    """What a run has that could be wrong by itself: its keys, its classes and its base files."""
    settings = {(key, value if key.endswith("class_path") else None) for key, value in leaves(run.settings)}
    return settings | {("base", run.base)}


def covering_runs() -> list[PlannedRun]:
    studies = [read_study(find(name)) for name in names() if name.startswith("studies/") and name != "studies/discover"]
    candidates = [(run, parts(run)) for study in studies for run in study.runs() if run.seed == study.seeds[0]]
    chosen, left = [], set().union(*(has for _, has in candidates))
    while left:
        run, has = max(candidates, key=lambda candidate: len(candidate[1] & left))
        chosen.append(run)
        left -= has
    return chosen


@pytest.mark.parametrize("run", covering_runs(), ids=lambda run: f"{run.folder.parts[1]}-{run.condition}-{run.arm}")
def test_its_settings_are_accepted(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".models").mkdir()  # the toy stands for a model that is downloaded: of it the tokenizer alone is read
    (tmp_path / ".models" / "smollm2-135m-instruct").symlink_to(resolve_model("toy"))
    words = resolved(run.arguments())
    if "MatchedRandomGate" in str(run.settings):  # which reads the record of another run when it is built
        ParseCommand(words)
    else:
        BuildCommand(words[1:])
