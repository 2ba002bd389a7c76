"""Resumed training sees the same questions in the same order."""

from pathlib import Path

import lightning as L
import pytest
import torch

from tests.support.orders import Numbers

# --- the same with Lightning ---


class Recorder(L.LightningModule):
    """Writes down the questions of every step, and saves a checkpoint inside the hook of one step."""

    def __init__(self, save_at: int = 0, path: Path | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.save_at, self.path = save_at, path
        self.seen, self.tested, self.validated = [], [], []

    def training_step(self, batch, batch_idx):
        self.seen.append([question.index for question in batch])
        self.manual_backward(self.weight * 1.0)
        self.optimizers().step()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.validated.append(self.global_step)

    def test_step(self, batch, batch_idx):
        self.tested += [question.index for question in batch]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**kwargs) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    length = {"max_steps": 7, "max_epochs": -1}
    return L.Trainer(accelerator="cpu", enable_checkpointing=False, **(quiet | length | kwargs))


def fit(recorder: Recorder, ckpt_path: Path | None = None, validation: int = 2, **kwargs) -> Recorder:
    trainer(**kwargs).fit(recorder, Numbers(train=7, validation=validation, batch_size=2, seed=3), ckpt_path=ckpt_path)
    return recorder


@pytest.mark.parametrize(
    "length",
    [{}, {"max_steps": -1, "max_epochs": 3}, {"limit_train_batches": 2}],
    ids=["steps", "epochs", "short epochs"],
)
@pytest.mark.parametrize("validation", [0, 2])
def test_resumed_training_sees_the_same_questions(tmp_path, length, validation):
    whole = fit(Recorder(), validation=validation, **length).seen
    assert len(whole) == (9 if "max_epochs" in length else 7)
    assert len({index for batch in whole[:3] for index in batch}) == 6  # 3 batches make an epoch
    for cut in range(1, 7):
        path = tmp_path / f"{cut}.ckpt"
        stopped = fit(Recorder(cut, path), validation=validation, **(length | {"max_steps": cut}))
        resumed = fit(Recorder(), path, validation=validation, **length)
        assert stopped.seen + resumed.seen == whole, f"cut after step {cut}"


def test_resuming_inside_an_epoch_is_no_reason_for_a_warning(tmp_path, recwarn):
    fit(Recorder(2, tmp_path / "2.ckpt"))
    fit(Recorder(), tmp_path / "2.ckpt")
    assert not [warning for warning in recwarn if "not resumable" in str(warning.message)]


def test_lightning_skips_the_validation_of_a_step_that_saved_before_it(tmp_path):
    # Not what one would wish; the test tells when Lightning changes it.
    assert fit(Recorder(3, tmp_path / "3.ckpt")).validated == [3, 6]
    assert fit(Recorder(), tmp_path / "3.ckpt").validated == [6]


def test_new_trainer_starts_from_the_first_question():
    data, first, second = Numbers(train=7, batch_size=2), Recorder(), Recorder()
    trainer(max_steps=2).fit(first, data)
    trainer(max_steps=2).fit(second, data)
    assert first.seen == second.seen


def test_same_trainer_goes_on_where_it_was():
    whole = fit(Recorder(), validation=0).seen
    data, recorder, once = Numbers(train=7, batch_size=2, seed=3), Recorder(), trainer(max_steps=3)
    once.fit(recorder, data)
    once.fit_loop.epoch_loop.max_steps = 7
    once.fit(recorder, data)
    assert recorder.seen == whole


def test_checkpoint_can_be_tested_on_other_data(tmp_path):
    fit(Recorder(2, tmp_path / "2.ckpt"))
    recorder, data = Recorder(), Numbers(train=100, test=5, seed=9)
    trainer(max_steps=1).fit(recorder, data)
    trainer().test(recorder, data, ckpt_path=tmp_path / "2.ckpt", verbose=False)
    assert recorder.tested == [0, 1, 2, 3, 4]
    assert data.state_dict()["consumed"] == 32


def test_checkpoint_of_other_data_is_refused(tmp_path):
    fit(Recorder(2, tmp_path / "2.ckpt"))
    with pytest.raises(ValueError, match="Expected 3 as data seed as in the checkpoint, but got 4"):
        trainer().fit(Recorder(), Numbers(train=7, batch_size=2, seed=4), ckpt_path=tmp_path / "2.ckpt")
