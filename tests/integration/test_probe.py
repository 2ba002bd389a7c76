"""`pgpo probe` on the toy model, and what it refuses."""

import json

import pytest
from jsonargparse import Namespace

from pgpo_lightning.commands.main import main
from pgpo_lightning.commands.probe import _relevant
from tests.support import CONFIGS
from tests.support.helpers import half_right
from tests.support.parrot import QUICKSTART


def test_the_command_on_the_toy(tmp_path, capsys):
    words = ["--config", str(QUICKSTART), "--questions", "5", "--samples", "4", "--data.init_args.batch_size", "5"]
    words += ["--contexts", "[sibling]", "--controls", "[wrong]", "--templates.same", "{prompt}"]
    main(["probe", *words, "--output", str(tmp_path)])
    content = json.loads((tmp_path / "probe.json").read_text())
    rows = {made["name"]: made for made in content["contexts"]}
    assert list(rows) == ["none", "sibling", "same", "wrong"]
    assert content["student"]["score"]["value"] == pytest.approx(0.5, abs=0.35)
    # The shipped model follows a demonstration, whether it is right or wrong.
    assert rows["sibling"]["net"]["value"] > 0.2
    assert rows["wrong"]["net"]["value"] < 0
    assert rows["same"]["settings"]["reprompt_template"] == "{prompt}"
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.json")}
    main(["probe", *words, "--output", str(tmp_path), "--model.init_args.optimizer.init_args.lr", "0.5"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").rglob("*.json")} == files
    with pytest.raises(ValueError, match=r"but `module\.max_response_length` differ"):
        main(["probe", *words, "--output", str(tmp_path), "--model.init_args.max_response_length", "20"])
    capsys.readouterr()


def test_a_verifier_that_is_a_function_is_the_same_one_in_another_process():
    settings = Namespace(verifier=half_right, model_config=Namespace(dtype="float32"))
    assert _relevant(settings)["verifier"] == "tests.support.helpers.half_right"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", str(CONFIGS / "ablations" / "grpo.yaml")], "`model` to be a module with a self-teacher"),
        (["--contexts", "[peer]"], "`contexts` to be among none, feedback"),
        (["--top_p", "1.5"], r"`top_p` to lie in \[0.001, 1\]"),
        (["--ckpt_path", "last"], "no `ckpt_path`"),
        (["--output", str(QUICKSTART)], "`output` to be a folder"),
        (["--calibrate", "nowhere", "--output", str(QUICKSTART)], "`output` to be a folder"),
        (["--calibrate=nowhere"], "record of a finished run, but there is no .*nowhere"),
    ],
)
def test_what_the_command_refuses(tmp_path, words, message):
    command = [] if words[0].startswith("--calibrate") else ["--config", str(QUICKSTART), "--output", str(tmp_path)]
    with pytest.raises((ValueError, FileExistsError), match=message):
        main(["probe", *command, *words])
    assert not list(tmp_path.iterdir())
