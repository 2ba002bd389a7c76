"""What a user installs is what stands in the repository."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import torch
from packaging.requirements import Requirement

from pgpo_lightning.models.loading import load_model
from tests.support import ROOT


def test_the_wheel_holds_every_file_and_no_global_callbacks(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, timeout=250)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "pgpo_lightning"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files += [*(ROOT / "callbacks").glob("*.py"), *(ROOT / "configs").rglob("*.yaml")]
    expected = set()
    for path in files:
        inside = path.relative_to(ROOT)
        if inside.parts[0] in ("callbacks", "configs"):
            inside = Path("pgpo_lightning") / inside
        expected.add(inside.as_posix())
    assert {"pgpo_lightning/callbacks/step_size.py", "pgpo_lightning/assets/toy/model.safetensors"} <= expected
    assert names == expected


def test_the_top_level_folder_is_no_package_of_its_own():
    """Imported twice, every class would exist twice, and jsonargparse would not know its own subclasses."""
    result = subprocess.run([sys.executable, "-c", "import callbacks"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "Import `pgpo_lightning.callbacks`, not `callbacks`" in result.stderr


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return {
        name: [Requirement(line) for line in lines] for name, lines in (extras | {"": project["dependencies"]}).items()
    }


def test_the_versions_that_were_tested_are_among_those_that_are_allowed():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {name.lower(): version for name, version in (line.split("==") for line in lines)}
    for extra in ("", "peft", "dev", "docs", "notebooks"):
        for requirement in requirements()[extra]:
            assert requirement.specifier.contains(tested[requirement.name]), requirement


def test_versions_that_do_not_go_together_are_not_allowed():
    allowed = {each.name: each.specifier for each in requirements()[""] + requirements()["peft"]}
    assert not allowed["transformers"].contains("5.24.0")  # wants peft 0.22
    assert not allowed["torch"].contains("2.9.1")


def test_a_plain_install_loads_a_model_where_lightning_does():
    """On a GPU Lightning calls `configure_model` inside `with torch.device(...)`, where transformers wants accelerate."""
    assert "accelerate" in {each.name for each in requirements()[""]}
    with torch.device("cpu"):
        assert {parameter.device.type for parameter in load_model("toy").parameters()} == {"cpu"}
