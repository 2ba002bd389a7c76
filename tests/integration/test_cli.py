"""The command line as a user types it: swapping callbacks, refusing what is wrong before anything is generated."""

import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO

import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import RichProgressBar

import pgpo_lightning.modules
from pgpo_lightning.callbacks import ConstantMultiplier, InformationMultiplier, RandomMultiplier, StepSizeMultiplier
from pgpo_lightning.commands.fit import PGPOCommand
from pgpo_lightning.commands.main import main
from pgpo_lightning.core.errors import VerifierError
from pgpo_lightning.monitoring.curves import read_scalars
from pgpo_lightning.monitoring.summary import before_after, summarise
from tests.support import CONFIGS
from tests.support.commands import program
from tests.support.helpers import config
from tests.support.processes import start

LORA = CONFIGS / "lora.yaml"
FULL = sorted(set(CONFIGS.glob("*.yaml")) - {LORA})
OVERLAYS = (
    [(path, CONFIGS / "sciknoweval.yaml") for path in sorted((CONFIGS / "domains").glob("*.yaml"))]
    + [(path, CONFIGS / "code.yaml") for path in sorted((CONFIGS / "code").glob("*.yaml"))]
    + [
        (path, CONFIGS / "quickstart.yaml")
        for path in [
            *sorted((CONFIGS / "ablations").glob("*.yaml")),
            *sorted((CONFIGS / "loggers").glob("*.yaml")),
            LORA,
        ]
    ]
)


@cache
def parsed(*args):
    """What the program would run, without running it."""
    with pytest.raises(SystemExit) as end, redirect_stdout(StringIO()) as out:
        main(["fit", *args, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(out.getvalue())


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_every_config_parses_and_says_how_to_run_it(path):
    settings = parsed("--config", str(path))
    assert settings["model"]["class_path"].removeprefix("pgpo_lightning.") in pgpo_lightning.modules.__all__
    header = path.read_text().split("\nseed_everything")[0]
    assert f"pgpo fit --config configs/{path.name}" in header


@pytest.mark.parametrize(("overlay", "base"), OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_changes_only_what_it_names(overlay, base):
    before = parsed("--config", str(base))
    after = parsed("--config", str(base), "--config", str(overlay))
    named = yaml.safe_load(overlay.read_text())
    changed = {key for key in before if before[key] != after[key]}
    assert changed
    assert changed <= set(named)
    assert overlay.read_text().startswith("# vs ")


def test_an_adapter_leaves_the_rate_of_its_base_alone():
    """A rate that suits the toy would be ten to a hundred times too high elsewhere."""
    for base, rate in (("sciknoweval", 1e-5), ("quickstart", 1e-4)):
        settings = parsed("--config", str(CONFIGS / f"{base}.yaml"), "--config", str(LORA))["model"]["init_args"]
        assert settings["lora"]["r"] == 8
        assert settings["optimizer"]["init_args"]["lr"] == rate
    *_, command = [line for line in LORA.read_text().splitlines() if line.startswith("# Command: pgpo fit ")]
    args = command.removeprefix("# Command: pgpo fit ").replace("configs/", f"{CONFIGS}/").split()
    optimizer = parsed(*args)["model"]["init_args"]["optimizer"]["init_args"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (1e-3, 0.01)


def built(tmp_path, *args):
    """The callbacks: everything is built, nothing is run."""
    callbacks = []

    class Building(PGPOCommand):
        def _run_subcommand(self, subcommand):
            callbacks.extend(self.trainer.callbacks)

    Building(["fit", "--config", config(tmp_path / "run"), *args])
    return callbacks


def multiplier_of(tmp_path, *args):
    return next((c for c in built(tmp_path, *args) if isinstance(c, StepSizeMultiplier)), None)


def test_callbacks_are_swapped_by_one_argument(tmp_path):
    assert isinstance(multiplier_of(tmp_path), RandomMultiplier)
    constant = multiplier_of(tmp_path, "--multiplier", "ConstantMultiplier", "--multiplier.value", "1.1")
    assert isinstance(constant, ConstantMultiplier)
    assert constant.value == 1.1
    information = multiplier_of(tmp_path, "--multiplier", "InformationMultiplier", "--multiplier.alpha", "0.5")
    assert isinstance(information, InformationMultiplier)
    assert information.sensitivity == 0.5
    assert multiplier_of(tmp_path, "--multiplier", "null") is None


def test_a_multiplier_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from pgpo_lightning.callbacks import StepSizeMultiplier\n"
        "class Halving(StepSizeMultiplier):\n"
        "    def __init__(self, base: float = 0.5) -> None:\n"
        "        super().__init__()\n"
        "        self.base = base\n"
        "    def multiplier(self, statistics, step):\n"
        "        return self.base**step\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = multiplier_of(tmp_path, "--multiplier", "mine.Halving", "--multiplier.base", "0.25")
    assert mine.multiplier(None, 2) == 0.0625


def test_the_progress_bar_of_a_run_that_counts_steps_has_no_number_of_epochs(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    (bar,) = [c for c in built(tmp_path, "--trainer.enable_progress_bar", "true") if isinstance(c, RichProgressBar)]
    assert bar._get_train_description(0) == "Epoch 0   "


def test_redirected_output_has_a_line_per_step_and_no_progress_bar(tmp_path, capsys):
    settings = config(tmp_path / "run", steps=3, summary={"picture": False})
    main(["fit", "--config", settings, "--trainer.enable_progress_bar", "true"])
    out = capsys.readouterr().out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f━]", out)
    scalars = read_scalars(tmp_path / "run")
    lines = re.findall(r"^step (\d+), reward (\S+), I (\S+)(?:, rho (\S+))?, \d+\.\d s$", out, re.MULTILINE)
    assert [int(step) for step, *_ in lines] == [1, 2, 3]
    for step, *values in lines:
        for tag, value in zip(("critic/score/mean", "information/mean", "lr/multiplier"), values, strict=True):
            logged = scalars[tag].get(int(step), 0.0)  # a step without a teacher has neither information nor rho
            assert float(value or 0) == pytest.approx(logged, abs=6e-4)
    assert sum(step in scalars["information/mean"] for step in (1, 2, 3)) >= 2
    scores = re.findall(r"^step (\d+), held-out avg@2 (\S+) ± (\S+), pass", out, re.MULTILINE)
    assert [int(step) for step, *_ in scores] == [0, 2]
    for step, score, error in scores:
        assert float(score) == pytest.approx(scalars["val/avg@2"][int(step)], abs=6e-4)
        assert float(error) == pytest.approx(scalars["val_standard_error/avg@2"][int(step)], abs=6e-4)


QUICK = ["--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0"]


def run(tmp_path, *args, **changes):
    changes.setdefault("multiplier", None)
    settings = config(tmp_path / "run", steps=2, **changes)
    main(
        ["fit", "--config", settings, "--trainer.num_sanity_val_steps", "0", "--trainer.limit_val_batches", "0", *args]
    )
    return read_scalars(tmp_path / "run")


def test_a_python_function_with_feedback_as_verifier(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(
        "def judge(question, response):\n    return 0.0, f'The final answer {len(response)} is wrong.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    scalars = run(tmp_path, *QUICK, model={"verifier": "judge.judge"})
    assert scalars["self_distillation/feedback_used_fraction"] == {1: 1.0, 2: 1.0}
    assert scalars["self_distillation/reprompt_sample_fraction"] == {1: 1.0, 2: 1.0}
    assert scalars["critic/score/mean"] == {1: 0.0, 2: 0.0}


@pytest.mark.parametrize(
    ("args", "kind", "message"),
    [
        (["--model.divergence_alfa", "0.5"], SystemExit, "divergence_alfa"),
        (["--model.divergence.alpha", "1.5"], ValueError, r"`divergence.alpha` to lie in \[0, 1\], but got 1.5"),
        (
            ["--model.divergence.distillation_add_tail", "true"],
            ValueError,
            "`divergence.distillation_topk` with `divergence.distillation_add_tail`",
        ),
        (
            ["--multiplier", "InformationMultiplier", "--multiplier.rho_max", "0.5"],
            ValueError,
            r"`rho_max` to lie in \[1, ",
        ),
        (
            ["--multiplier", "InformationMultiplier", "--multiplier.sensitivity", "-1"],
            ValueError,
            "`sensitivity` to be at",
        ),
        (["--data.batch_size", "14"], ValueError, "at least one batch of training questions, 14"),
        (["--model.max_prompt_length", "5"], ValueError, "one train question, but had to drop 13 of 13"),
        (["--model.max_response_length", "500"], MisconfigurationException, "fit into the model's 512 positions"),
        (
            ["--model.update.updates_per_batch", "3"],
            MisconfigurationException,
            "`update.updates_per_batch` to divide the batch of 4 questions",
        ),
        (["--model.model", "no/such/folder"], ValueError, "no/such/folder"),
        (["--seed_everything", "true"], ValueError, "`seed_everything` to be a number, but got True"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings_stop_before_anything_is_generated(tmp_path, capsys, monkeypatch, args, kind, message):
    def never(*_, **__):
        raise AssertionError("something was generated")

    monkeypatch.setattr("pgpo_lightning.rollout.transformers_engine.TransformersEngine.generate", never)
    with pytest.raises(kind, match="^2$" if kind is SystemExit else message) as error:
        run(tmp_path, *args)
    assert error.type is kind
    assert kind is not SystemExit or re.search(message, capsys.readouterr().err)


def test_a_verifier_that_fails_names_the_question(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        "import math\n"
        "def nan(question, response):\n    return math.nan\n"
        "def raises(question, response):\n    raise KeyError('no key')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        VerifierError, match=r"verifier nan to return a finite number.* but got nan on question \d+ of .*"
    ):
        run(tmp_path, model={"verifier": "broken.nan"})
    (tmp_path / "b").mkdir()
    with pytest.warns(
        UserWarning, match=r"reward is 0 where the verifier fails, .* The first time: .* question \d+ of .*no key"
    ):
        scalars = run(tmp_path / "b", *QUICK, model={"verifier": "broken.raises", "on_verifier_error": "zero"})
    assert scalars["rollout/verifier_errors"] == {1: 16.0, 2: 32.0}
    assert scalars["critic/score/mean"] == {1: 0.0, 2: 0.0}


def test_a_run_ends_with_summary_picture_and_answers(tmp_path, capsys):
    folder = tmp_path / "run"
    constant = {"class_path": "ConstantMultiplier", "init_args": {"value": 1.25}}
    main(["fit", "--config", config(folder, steps=2, multiplier=constant, summary={"picture": True})])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["multiplier"] == {"mean": 1.25, "std": 0.0}
    scalars = read_scalars(folder)
    for name, step in (("base", 0), ("final", 2)):
        assert summary[name]["step"] == step
        for metric in ("avg@2", "pass@2", "maj@2", "length", "cut_off"):
            assert summary[name][metric] == pytest.approx(scalars[f"val/{metric}"][step])
        answers = [
            json.loads(line) for line in (folder / "validation" / f"step={step:06d}.jsonl").read_text().splitlines()
        ]
        assert len(answers) == 8
        assert sum(answer["avg"] for answer in answers) / 8 == pytest.approx(summary[name]["avg@2"], abs=1e-6)
        assert all(len(answer["responses"]) == 2 for answer in answers)
    assert (folder / "stability.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert scalars["lr/effective"][1] == pytest.approx(1.25e-3)
    assert scalars["lr/base"][1] == pytest.approx(1e-3)
    out = capsys.readouterr().out
    assert "held-out" in out
    assert f"{summary['final']['avg@2']:.3f}" in out


def test_a_run_says_when_it_was_last_evaluated():
    scalars = {"val/avg@2": {0: 0.5, 10: 0.75, 20: 0.625}}
    scalars["val_standard_error/avg@2"] = {0: 0.125, 10: 0.0625}
    whole, cut = (summarise(scalars, steps, 9.0, 2) for steps in (20, 25))
    assert whole["final"] == whole["last"] == {"step": 20, "avg@2": 0.625, "standard_error": {}}
    assert whole["best"] == {"step": 10, "avg@2": 0.75, "standard_error": {"avg@2": 0.0625}, "of": 3}
    head, row, note, _ = before_after(whole).splitlines()
    assert re.split(r"  +", head) == ["held-out", "base @0", "best of 3 @10", "final @20"]
    assert re.split(r"  +", row.strip()) == ["avg@2", "0.500 ± 0.125", "0.750 ± 0.062", "0.625"]
    assert note == "± standard error, clustered by question; the best of several is biased upwards"
    assert cut["final"] is None
    assert cut["last"] == whole["last"]
    assert "last @20" in before_after(cut)
    assert "final" not in before_after(cut)
    assert "no evaluation after step 20: see `trainer.val_check_interval`" in before_after(cut)
    assert before_after(summarise({}, 25, 9.0, 2)) == "25 steps, no evaluation"
    assert before_after(summarise({}, 1, 9.0, 2)) == "1 step, no evaluation"


def test_a_score_of_the_untrained_model_is_called_so(tmp_path, capsys):
    main(["validate", "--config", config(tmp_path / "run"), "--trainer.limit_val_batches", "1"])
    assert "validate of toy as it is, before any training: no `--ckpt_path` was given\n" in capsys.readouterr().out


def test_a_module_in_the_working_folder_is_found_and_errors_are_one_line(tmp_path):
    (tmp_path / "rewards.py").write_text("def check(question, response):\n    return float('nan')\n")
    settings = config(tmp_path / "run", steps=1, model={"verifier": "rewards.check"})
    result = program(tmp_path, "fit", "--config", settings)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-2:]
    assert last[0].startswith("error: ")
    assert "verifier check" in last[0]
    assert "nan" in last[0]
    assert "Traceback" not in result.stderr


def test_a_setting_out_of_range_is_told_in_one_line(tmp_path):
    settings = config(tmp_path / "run", steps=1)
    process = start(["pgpo", "fit", "--config", settings, "--model.divergence.alpha", "1.5"], tmp_path / "log")
    process.join()
    assert process.exitcode == 2
    told = (tmp_path / "log").read_text().strip().splitlines()
    assert told[-2] == "error: Expected `divergence.alpha` to lie in [0, 1], but got 1.5."


@pytest.mark.parametrize(("words", "got"), [([], "none"), (["train"], "train"), (["fi"], "fi")])
def test_without_a_known_command_all_of_them_are_listed(words, got, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert f"Expected a command, but got {got}." in told
    assert "\nprobe " in told


def test_no_usage_reports_are_sent():
    # Whatever of the package is imported, this comes first.
    code = "import pgpo_lightning, huggingface_hub.constants as c; print(c.HF_HUB_DISABLE_TELEMETRY)"
    environment = {
        k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "DO_NOT_TRACK")
    }
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CONFIGS.parent, env=environment, capture_output=True, text=True
    )
    assert result.stdout.strip() == "True"


def test_no_text_has_a_gap_left_to_fill():
    texts = [path for path in CONFIGS.parent.rglob("*.md") if ".venv" not in path.parts]
    assert len(texts) >= 3
    assert not [path for path in texts if "@" * 2 in path.read_text()]


def test_a_setting_that_stands_in_a_group_now_says_where(tmp_path, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["fit", "--config", config(tmp_path), "--model.teacher_update_rate", "0.1"])
    assert refused.value.code == 2
    said = capsys.readouterr().err
    assert "Expected `model.teacher.update_rate`, where `teacher_update_rate` stands now. Write it there." in said
