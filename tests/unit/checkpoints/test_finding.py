"""Which checkpoint is meant by `last`, `best` and a path, in a folder where others write too."""

import shutil

import pytest
import torch

from pgpo_lightning.checkpoints.finding import MARK, best_checkpoint, newest_checkpoint, resolve
from pgpo_lightning.checkpoints.single_file import DamagedCheckpointError

BEST = "ModelCheckpoint{'monitor': 'val/avg@2', 'mode': 'max'}"


def write(folder, name, step, mark=False, **more):
    content = {
        "pgpo_lightning": {"steps": step},
        "loops": {},
        "callbacks": {},
        "weight": torch.full((99,), float(step)),
    }
    path = folder / name
    torch.save(content | ({MARK: {"run": "a"}} if mark else {}) | more, path)
    return path


def flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((4,), torch.load(path)["weight"][0]).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)


def test_the_newest_has_the_most_steps_whatever_its_name(tmp_path):
    write(tmp_path, "step=4.ckpt", 4)  # of Lightning's ModelCheckpoint
    ten = write(tmp_path, "step=000010.ckpt", 10, mark=True)
    write(tmp_path, "zzz.ckpt", 10)
    torch.save({"state_dict": {}}, tmp_path / "zzzz.ckpt")  # of another program
    assert newest_checkpoint(tmp_path) == ten
    twelve = write(tmp_path, "epoch=1.ckpt", 12)
    assert newest_checkpoint(tmp_path) == twelve


def test_what_has_only_weights_is_tested_and_not_continued(tmp_path):
    weights = write(tmp_path, "weights.ckpt", 9)
    torch.save({"pgpo_lightning": {"steps": 9}, "state_dict": {}}, weights)
    with pytest.raises(FileNotFoundError, match=r"to resume from, but weights\.ckpt has nothing but weights"):
        newest_checkpoint(tmp_path)
    assert newest_checkpoint(tmp_path, resume=False) == weights
    older = write(tmp_path, "step=000004.ckpt", 4)
    assert newest_checkpoint(tmp_path) == older


def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path):
    four, six = write(tmp_path, "step=000004.ckpt", 4, mark=True), write(tmp_path, "step=000006.ckpt", 6, mark=True)
    flip(six)
    with pytest.warns(UserWarning, match=rf"{six} is damaged: the checksum of .* is wrong. Taken is {four} of step 4"):
        assert newest_checkpoint(tmp_path) == four
    six.write_bytes(six.read_bytes()[:-20])
    with pytest.warns(UserWarning, match=rf"{six} is truncated"):
        assert newest_checkpoint(tmp_path) == four
    flip(four)
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: .* There is no other in"):
        newest_checkpoint(tmp_path)


def test_without_any_the_reason_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"to resume from, but there is none: there is none in"):
        newest_checkpoint(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(
        FileNotFoundError, match=r"those in .* are of another program. `--ckpt_path last-or-new` starts anew"
    ):
        newest_checkpoint(tmp_path)


def test_the_best_is_what_the_newest_state_of_a_model_checkpoint_says_also_where_the_folder_moved(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match="Expected `best` to be that of a ModelCheckpoint with a `monitor`"):
        best_checkpoint(folder)
    two, four = write(folder, "step=2.ckpt", 2), write(folder, "step=4.ckpt", 4)
    for step, best in ((4, two), (6, four)):
        state = {"monitor": "val/avg@2", "best_model_path": str(best)}
        write(folder, f"step={step:06d}.ckpt", step, mark=True, callbacks={BEST: state})
    assert resolve("best", folder, resume=False) == str(four)
    moved = tmp_path / "elsewhere"
    shutil.move(folder, moved)
    assert best_checkpoint(moved) == moved / "step=4.ckpt"
    write(moved, "last.ckpt", 7, callbacks={BEST: {"monitor": None, "best_model_path": str(moved / "last.ckpt")}})
    assert best_checkpoint(moved) == moved / "step=4.ckpt"


def test_paths(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    five = write(folder, "step=000005.ckpt", 5, mark=True)
    assert resolve("last", folder, resume=True) == str(five)
    for path in (five, folder, tmp_path / "run"):
        assert resolve(str(path), tmp_path, resume=True) == str(five)
    for wanted in ("hpc", "https://example.org/a.ckpt"):
        assert resolve(wanted, folder, resume=True) == wanted  # Lightning's business
    with pytest.raises(FileNotFoundError, match=r"to be last, best, or the path of a checkpoint or a run, but .*none"):
        resolve(str(tmp_path / "none"), folder, resume=True)
    with pytest.raises(ValueError, match=r"Expected `ckpt_path` without litmodels .*, but got registry:mine"):
        resolve("registry:mine", folder, resume=True)
    five.write_text("")
    with pytest.raises(
        DamagedCheckpointError, match=r"Expected a checkpoint, but .*step=000005.ckpt does not begin like one"
    ):
        resolve(str(five), folder, resume=True)
