"""What `pgpo export` writes beside the weights, which checkpoint it takes, and what it sends to the Hub: nothing unless asked."""

import json
import re
from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from safetensors.torch import load_file

from pgpo_lightning.commands.main import main
from tests.support.helpers import config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "mine"
    multiplier = {"class_path": "InformationMultiplier", "init_args": {"sensitivity": 2.0}}
    best = [
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.monitor=val/avg@2",
        "--trainer.callbacks.mode=min",
    ]
    main(
        ["fit", "--config", config(folder, steps=2, multiplier=multiplier), *best, "--trainer.val_check_interval", "1"]
    )
    return folder


@pytest.fixture
def hub(monkeypatch):
    """The Hub, as far as an upload needs it; it notes what it is told."""
    told = SimpleNamespace(calls=[], refusal=None)

    class Api:
        def whoami(self):
            if isinstance(told.refusal, LocalTokenNotFoundError):
                raise told.refusal

        def create_repo(self, repo_id, *, private, exist_ok):
            if told.refusal:
                raise told.refusal
            told.calls.append(("create", repo_id, private, exist_ok))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            told.calls.append(("upload", repo_id, folder_path, commit_message))

    monkeypatch.setattr("pgpo_lightning.commands.hub.HfApi", Api)
    return told


def test_the_card_says_what_the_model_is(run, hub, tmp_path):
    main(["export", str(run), str(tmp_path / "out")])
    assert hub.calls == []
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert metadata["tags"] == ["pgpo-lightning", "sdpo", "pgpo"]
    assert "base_model" not in metadata, "the toy is on no hub"
    facts = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", card, re.MULTILINE))
    assert facts["base model"] == "toy"
    assert facts["data"] == "ToyArithmetic"
    assert facts["method"] == "SDPO"
    assert facts["multiplier"].startswith("InformationMultiplier (sensitivity 2.0, ")
    record = json.loads((run / "run.json").read_text())
    assert facts["dose (mean rho)"] == f"{sum(record['rho']) / 2:.4f} over 2 optimizer steps"
    assert facts["seed"] == "3"
    assert facts["learning rate"] == "0.001"
    summary = json.loads((run / "summary.json").read_text())
    for title, name in (
        ("before training", "base"),
        ("best of 3 evaluations", "best"),
        ("final, these weights", "final"),
    ):
        score, error = summary[name]["avg@2"], summary[name]["standard_error"]["avg@2"]
        assert f"| {title} | {summary[name]['step']} | {score:.3f} ± {error:.3f} |" in card
    assert "2 samples per question, 8 questions" in card
    assert {"torch", "transformers", "pgpo-lightning"} <= facts.keys()
    assert "2606.03620" in card
    assert "2601.20802" in card
    given = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert given["multiplier"]["init_args"]["sensitivity"] == 2.0
    assert str(tmp_path.parent) not in card


def test_a_hub_id_becomes_the_base_model(run):
    from pgpo_lightning.checkpoints.single_file import read_file
    from pgpo_lightning.commands.model_card import model_card

    path = run / "checkpoints" / "step=000001.ckpt"
    saved = read_file(path, mmap=True)
    saved["pgpo_lightning"]["settings"]["model"]["model"] = "Qwen/Qwen3-0.6B"
    saved["pgpo_lightning"]["settings"]["data"]["dataset"] = "owner/questions"
    card = model_card(saved, path, "student", adapter=True)
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["base_model"], metadata["datasets"]) == ("Qwen/Qwen3-0.6B", ["owner/questions"])
    assert metadata["library_name"] == "peft"
    assert "final, these weights | 1 |" in card
    assert "end of the run | 2 |" in card
    saved["callbacks"], saved["pgpo_lightning"]["settings"] = {}, None
    bare = model_card(saved, path.parent.parent / "elsewhere" / "checkpoints" / path.name, "student", adapter=False)
    assert "The run was not evaluated." in bare
    assert "not recorded" in bare


def test_the_best_checkpoint_by_name(run, tmp_path):
    record = json.loads((run / "run.json").read_text())
    steps, scores = record["curves"]["val/avg@2"]
    worst = min((score, step) for step, score in zip(steps, scores, strict=True) if step)[1]  # `mode` is min
    main(["export", str(run), str(tmp_path / "best"), "--which", "best"])
    (file,) = run.glob(f"checkpoints/epoch=*step={worst:.0f}.ckpt")
    main(["export", str(file), str(tmp_path / "file")])
    best, same = (load_file(tmp_path / name / "model.safetensors") for name in ("best", "file"))
    assert all((best[name] == same[name]).all() for name in best)
    with pytest.raises(ValueError, match="no `which` with one checkpoint"):
        main(["export", str(file), str(tmp_path / "x"), "--which", "best"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no checkpoint"):
        main(["export", str(tmp_path / "empty"), str(tmp_path / "x")])


def test_push_uploads_the_folder(run, hub, tmp_path, capsys):
    out = str(tmp_path / "out")
    main(["export", str(run), out, "--push", "owner/name", "--private", "true"])
    upload = ("upload", "owner/name", out, "Upload out from pgpo-lightning")
    assert hub.calls == [("create", "owner/name", True, True), upload]
    assert f"{out} -> https://huggingface.co/owner/name" in capsys.readouterr().out


def test_what_cannot_be_pushed_is_told_before_anything_is_written(run, hub, tmp_path):
    out = tmp_path / "out"
    for name in ("name", "a/b/c", "owner/na me"):
        with pytest.raises(ValueError, match="Expected `push` to be owner/name"):
            main(["export", str(run), str(out), "--push", name])
    with pytest.raises(ValueError, match="no `private` without `push`"):
        main(["export", str(run), str(out), "--private", "true"])
    hub.refusal = LocalTokenNotFoundError("Token is required, but no token found.")
    with pytest.raises(ValueError, match=r"but Token is required, but no token found\. Log in by `hf auth login`"):
        main(["export", str(run), str(out), "--push", "owner/name"])
    assert not out.exists()
    response = SimpleNamespace(headers={}, request=None)
    hub.refusal = HfHubHTTPError("403 Forbidden: not yours.", response=response)
    with pytest.raises(ValueError, match="Expected the Hub to take owner/name, but 403 Forbidden: not yours"):
        main(["export", str(run), str(out), "--push", "owner/name"])
    assert hub.calls == []
