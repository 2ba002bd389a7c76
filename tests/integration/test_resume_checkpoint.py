"""ResumeCheckpoint beside others that write into its folder, and with plug-ins that write elsewhere or in the background."""

import re

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from pgpo_lightning.callbacks import ResumeCheckpoint
from pgpo_lightning.callbacks.resume_checkpoint import SUPERSEDED
from pgpo_lightning.checkpoints.checkpoint_io import CheckpointFiles
from pgpo_lightning.commands.main import main
from tests.support.helpers import config, loader, questions, tiny_sdpo
from tests.support.runs import assert_same


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A run of 4 steps with Lightning's own callback in the same folder."""
    folder = tmp_path_factory.mktemp("beside") / "run"
    theirs = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "{step}", "save_top_k": -1, "monitor": "val/avg@2", "mode": "max"},
    }
    path = config(folder, steps=4, checkpoint={"every_n_train_steps": 1, "keep": 1})
    with open(path) as file:
        text = file.read().replace("trainer:\n", f"trainer:\n  callbacks: [{theirs}]\n")
    with open(path, "w") as file:
        file.write(text)
    main(["fit", "--config", path])
    return path, folder


def test_files_of_others_stay_and_can_be_continued_from(beside, capsys):
    path, folder = beside
    checkpoints = folder / "checkpoints"
    # Theirs count optimizer steps, of which one without a signal takes none.
    theirs = {p.name: p.read_bytes() for p in sorted(checkpoints.iterdir()) if p.name != "step=000004.ckpt"}
    assert len(theirs) == 2
    last = max(theirs)
    best = torch.load(checkpoints / last, weights_only=True)["callbacks"]
    (best,) = [state["best_model_path"] for key, state in best.items() if key.startswith("ModelCheckpoint")]
    main(["validate", "--config", path, "--ckpt_path", "best"])
    assert f"validate from {best}" in capsys.readouterr().out
    main(["fit", "--config", path, "--ckpt_path", "last", "--trainer.max_steps", "5"])
    assert "fit from " + str(checkpoints / "step=000004.ckpt") in capsys.readouterr().out
    assert [name for name in names(checkpoints) if name.startswith("step=0")] == ["step=000005.ckpt"]
    whole = torch.load(checkpoints / "step=000005.ckpt", weights_only=True)
    theirs_four = str(checkpoints / last)
    main(["fit", "--config", path, "--ckpt_path", theirs_four, "--trainer.max_steps", "5"])
    again = torch.load(checkpoints / "step=000005.ckpt", weights_only=True)
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(whole[part], again[part], part)
    assert {name: (checkpoints / name).read_bytes() for name in theirs} == theirs


def fit(folder, steps, callbacks, plugins=None, ckpt_path=None):
    module = tiny_sdpo(num_generations=2, eval_samples=1, optimizer=torch.optim.SGD)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        default_root_dir=folder, callbacks=callbacks, plugins=plugins,
    )  # fmt: skip
    trainer.fit(module, loader(questions(), 1), ckpt_path=ckpt_path)
    return trainer


def test_of_its_own_it_keeps_what_was_written_last(tmp_path):
    """A run that is resumed from an earlier step leaves nothing that `last` would take for newer."""
    checkpoints = tmp_path / "checkpoints"
    fit(tmp_path, 4, [ResumeCheckpoint(1, keep=3)])
    assert names(checkpoints) == ["step=000002.ckpt", "step=000003.ckpt", "step=000004.ckpt"]
    foreign = checkpoints / "step=000003-mine.ckpt"
    foreign.write_bytes(
        (checkpoints / "step=000004.ckpt").read_bytes().replace(b"resume_checkpoint", b"another_checkpt__")
    )
    fit(tmp_path, 3, [ResumeCheckpoint(1, keep=1)], ckpt_path=checkpoints / "step=000002.ckpt")
    assert names(checkpoints) == [foreign.name, "step=000003.ckpt"]
    fit(tmp_path, 4, [ResumeCheckpoint(1, keep=None)], ckpt_path=checkpoints / "step=000003.ckpt")
    fit(tmp_path, 4, [ResumeCheckpoint(2, keep=None)], ckpt_path=checkpoints / "step=000003.ckpt")
    assert names(checkpoints) == [foreign.name, "step=000003.ckpt", "step=000004.ckpt"]
    fit(tmp_path, 5, [ResumeCheckpoint(1, keep=None)], ckpt_path=checkpoints / "step=000004.ckpt")
    fit(tmp_path, 4, [ResumeCheckpoint(1, keep=None)], ckpt_path=checkpoints / "step=000003.ckpt")
    assert f"step=000005.ckpt{SUPERSEDED}" in names(checkpoints)
    assert "step=000005.ckpt" not in names(checkpoints)


def test_a_step_after_which_nothing_is_evaluated_is_saved_at_once(tmp_path):
    """Lightning would evaluate after the fourth step, the end of an epoch, if there were held-out questions."""
    seen = []

    class Seen(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(names(tmp_path)[-1:])

    fit(tmp_path, 5, [ResumeCheckpoint(every_n_train_steps=2, dirpath=str(tmp_path)), Seen()])
    assert seen == [[], [], ["step=000002.ckpt"], ["step=000002.ckpt"], ["step=000004.ckpt"]]


def test_another_runs_file_of_the_same_name_is_not_overwritten(tmp_path):
    first = fit(tmp_path, 1, [ResumeCheckpoint(1, dirpath=str(tmp_path / "shared"))])
    path = tmp_path / "shared" / "step=000001.ckpt"
    before = path.read_bytes()
    fit(tmp_path, 1, [ResumeCheckpoint(1, dirpath=str(tmp_path / "shared"))])
    assert names(path.parent) == ["step=000001-1.ckpt", path.name]
    assert path.read_bytes() == before
    assert isinstance(first.strategy.checkpoint_io, CheckpointFiles)


def test_a_plug_in_that_writes_in_the_background_wraps_this_projects_files(tmp_path):
    plugin = AsyncCheckpointIO()
    trainer = fit(tmp_path, 4, [ResumeCheckpoint(1, keep=1)], [plugin])
    assert trainer.strategy.checkpoint_io is plugin
    assert isinstance(plugin.checkpoint_io, CheckpointFiles)
    found = names(tmp_path / "checkpoints")
    assert found[-1] == "step=000004.ckpt"
    assert len(found) <= 2
    assert_same(
        torch.load(tmp_path / "checkpoints" / "step=000004.ckpt", weights_only=True)["state_dict"],
        dict(trainer.lightning_module.state_dict()),
    )


class Elsewhere(TorchCheckpointIO):
    """Keeps checkpoints in a dictionary, as one may in a store of objects."""

    def __init__(self):
        self.kept = {}

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        self.kept[str(path)] = checkpoint
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def load_checkpoint(self, path, map_location=None, **kwargs):
        return self.kept[str(path)]

    def remove_checkpoint(self, path):
        del self.kept[str(path)]
        path.unlink()


def test_a_plug_in_of_the_users_own_writes_reads_and_removes(tmp_path):
    plugin = Elsewhere()
    trainer = fit(tmp_path, 3, [ResumeCheckpoint(1, keep=2)], [plugin])
    assert trainer.strategy.checkpoint_io is plugin
    assert [int(re.search(r"(\d+).ckpt", path)[1]) for path in plugin.kept] == [2, 3]
    assert fit(tmp_path, 4, [ResumeCheckpoint(1)], [plugin], list(plugin.kept)[1]).lightning_module.steps == 4


def test_lightning_is_told_of_the_best_of_a_model_checkpoint(tmp_path):
    trainer = fit(
        tmp_path, 2, [ResumeCheckpoint(1), ModelCheckpoint(tmp_path / "theirs", save_top_k=-1, every_n_train_steps=1)]
    )
    trainer.checkpoint_callback.setup(trainer, trainer.lightning_module, "test")
    assert trainer.checkpoint_callback.best_model_path == trainer.checkpoint_callbacks[1].best_model_path != ""
    alone = fit(tmp_path / "alone", 1, [ResumeCheckpoint(1)])
    with pytest.raises(ValueError, match="`ModelCheckpoint` is not configured to save the best model"):
        alone.validate(alone.lightning_module, loader(questions()), ckpt_path="best")
