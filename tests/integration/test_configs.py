"""The configurations that come with the package, from a folder in which there is nothing."""

import subprocess
import sys
from importlib.metadata import version

import pytest
import yaml

from pgpo_lightning.commands.configs import resolved, summary
from pgpo_lightning.commands.main import main
from pgpo_lightning.core.shipped_configs import find, names
from pgpo_lightning.studies.spec import read_study
from tests.support import CONFIGS


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_configuration_is_listed_with_a_line_about_it(capsys):
    main(["configs"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names()
    assert {f"{name}.yaml" for name in names()} == {
        path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")
    }
    assert "quickstart" in names()[:5], "those of the top folder come first"
    assert all(len(summary(name)) > 10 for name in names())


def test_a_name_stands_for_its_file_wherever_a_configuration_is_given(capsys, tmp_path):
    quick, sdpo = str(find("quickstart")), str(find("ablations/sdpo"))
    given = ["fit", "--config", "quickstart", "--config=ablations/sdpo.yaml", "-c", "configs/quickstart.yaml"]
    assert resolved(given) == ["fit", "--config", quick, f"--config={sdpo}", "-c", quick]
    untouched = ["fit", "--model", "quickstart", "--config", '{"a": 1}', "--config", "nowhere.yaml", "--x=quickstart"]
    assert resolved(untouched) == untouched
    (tmp_path / "quickstart").write_text("seed_everything: 7\n")
    assert resolved(["--config", "quickstart"]) == ["--config", "quickstart"], "a file of that name comes first"


def test_fit_takes_names(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["fit", "--config", "quickstart", "--config", "ablations/sdpo", "--print_config"])
    assert not leaving.value.code
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["multiplier"] is None
    assert settings["trainer"]["max_steps"] == 40


def test_a_study_finds_its_base_among_them():
    (base,) = read_study(find("studies/toy")).base
    assert base == str(find("quickstart"))


def test_a_copy_is_the_file_and_overwrites_nothing(capsys, tmp_path):
    main(["configs", "copy", "ablations/gradient", "mine"])
    assert capsys.readouterr().out.strip() == "mine/gradient.yaml"
    assert (tmp_path / "mine/gradient.yaml").read_text() == find("ablations/gradient").read_text()
    with pytest.raises(ValueError, match=r"no file mine/gradient.yaml, so that nothing is overwritten"):
        main(["configs", "copy", "ablations/gradient", "mine"])
    with pytest.raises(ValueError, match=r"name of a shipped configuration, but got gradients. `pgpo configs` lists"):
        main(["configs", "copy", "gradients", "mine"])


def test_list_and_version_import_nothing_slow():
    code = (
        "import sys; from pgpo_lightning.commands.main import main; main(['configs']); main(['--version']); "
        "print([name for name in ('torch', 'lightning', 'transformers') if name in sys.modules])"
    )
    lines = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[-2:] == [f"pgpo-lightning {version('pgpo-lightning')}", "[]"]
