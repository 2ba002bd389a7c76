"""Help is complete, starts with what a user changes, and does not wait for torch."""

import inspect
import re
import subprocess
import sys

import pytest

from pgpo_lightning import GRPO, SDPO, InformationMultiplier
from pgpo_lightning.commands.building import ParseCommand
from pgpo_lightning.commands.discover import discover
from pgpo_lightning.commands.fit import PGPOCommand
from pgpo_lightning.commands.guard import guard
from pgpo_lightning.commands.help import text
from pgpo_lightning.commands.report import report
from pgpo_lightning.commands.settings_of import settings_of
from pgpo_lightning.commands.source import documented, public_class
from pgpo_lightning.memory_planner.cards import CARDS
from pgpo_lightning.probe.contexts import CONTEXTS, CONTROLS, DEFAULT_CONTROLS
from tests.support import CONFIGS

LIGHT = (
    ["--help"],
    ["--version"],
    ["configs"],
    ["report", "--help"],
    ["guard", "--help"],
    ["discover", "--help"],
    ["fit", "--help"],
    ["plan", "--help"],
    ["probe", "--help"],
    ["export", "--help"],
    ["ablate", "--help"],
)


def shown(help_text, prefix):
    """Names of the settings below a prefix."""
    words = (line.split()[0] for line in help_text.splitlines() if line.startswith(f"  --{prefix}."))
    return {word.removeprefix(f"--{prefix}.") for word in words}


def test_help_imports_neither_torch_nor_transformers():
    code = f"""import sys
from pgpo_lightning.commands.main import main
for words in {LIGHT!r}:
    try:
        main(words)
    except SystemExit as end:
        assert not end.code, words
    print("LOADED", words, {{"torch", "transformers", "lightning"}} & set(sys.modules))"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CONFIGS.parent, capture_output=True, text=True, check=True
    )
    loaded = [line for line in result.stdout.splitlines() if line.startswith("LOADED")]
    assert len(loaded) == len(LIGHT)
    assert all(line.endswith(" set()") for line in loaded), loaded
    commands = {line.split()[0] for line in result.stdout.splitlines() if line and line[0].isalpha()}
    assert commands >= {*PGPOCommand.subcommands(), "plan", "export", "ablate", "report"}


COMMANDS = sorted({words[0] for words in LIGHT if words[1:]} | {*PGPOCommand.subcommands()})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_plain_text_of_settings(command):
    told = text([command, "--help"])
    assert told.startswith(f"pgpo {command} ")
    assert not re.findall(r"``|:\w+:`|Optional\[|Annotated\[", told)
    assert max(map(len, told.splitlines())) <= 120


@pytest.mark.parametrize(("command", "function"), [("report", report), ("guard", guard), ("discover", discover)])
def test_help_of_what_compares_runs_has_every_argument(command, function):
    told = text([command, "--help"])
    for name in inspect.signature(function).parameters:
        assert ("\n  RUNS...\n" if name == "runs" else f"\n  --{name} ") in told


def test_help_lists_what_the_parser_takes():
    told = text(["fit", "--help"])
    parser = ParseCommand(["fit", "--config", str(CONFIGS / "quickstart.yaml")])._subcommand_parsers["fit"]
    options = {word.removeprefix("--") for word in parser._option_string_actions if word.startswith("--")}
    for prefix in ("trainer", "checkpoint", "summary"):
        taken = {option.removeprefix(f"{prefix}.") for option in options if option.startswith(f"{prefix}.")}
        assert shown(told, prefix) == {name for name in taken if not name.endswith((".help", "+"))}
    for prefix, cls in (("model", SDPO), ("multiplier", InformationMultiplier)):
        known = {name for name, setting in settings_of(cls).items() if not setting.computed_from}
        assert known <= shown(told, prefix)
    places = [
        told.index(f"  --{name} ") for name in ("model.num_generations", "multiplier.sensitivity", "trainer.max_steps")
    ]
    assert places == sorted(places)
    assert told.index("\n  --trainer.") > told.index("--summary.picture ")


def test_help_has_texts_kinds_and_defaults():
    entries = {one.name: one for one in documented(public_class("SDPO"))}
    assert entries["num_generations"][1:] == ("int at least 1", "8", "Rollouts per question.")
    assert entries["verifier"].default is None
    assert entries["update.loss_agg_mode"].kind == "seq-mean-token-mean | token-mean"
    assert entries["update.max_grad_norm"].kind == "float in [1e-06, 1000000] | null"
    assert entries["update.num_iterations"].default == "1"
    assert [one.name for one in entries.values() if not one.text] == []


@pytest.mark.parametrize(
    ("words", "has", "lacks"),
    [
        (["--model", "GRPO"], "--model.policy_gradient.clip_ratio_low ", "--model.teacher "),
        (["--multiplier=ConstantMultiplier"], "--multiplier.value ", "--multiplier.sensitivity "),
        (["--data", "ToyArithmetic"], "--data.batch_size ", "--data.train "),
        (["--model", "mine.Own"], "shown by `pgpo fit --model.help mine.Own`", "--model.num_generations "),
    ],
)
def test_help_is_of_the_classes_on_the_command_line(words, has, lacks):
    told = text(["fit", *words, "--help"])
    assert has in told
    assert lacks not in told


def test_the_parsers_own_help_of_a_class_is_there(capsys):
    with pytest.raises(SystemExit) as end:
        PGPOCommand(["fit", "--model.help", "GRPO"])
    assert not end.value.code
    assert "--model.num_generations" in capsys.readouterr().out
    assert "policy_gradient" in settings_of(GRPO)


def test_help_names_every_card_context_and_control():
    assert {name for name in CARDS if f" {name}," not in text(["plan", "--help"])} == set()
    told = text(["probe", "--help"]).replace("\n", " ").replace(" and ", ", ")
    listed = {word.strip(",.;") for word in told.split()}
    assert {*CONTEXTS, *CONTROLS} <= listed
    defaults = re.search(r"by\s+default answer, wrong, other\.", told)
    assert defaults
    assert DEFAULT_CONTROLS == ("answer", "wrong", "other")
