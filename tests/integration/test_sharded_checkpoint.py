"""A folder of shards is the single file that it could have been; nothing in it is run."""

import importlib
import pickle
import shutil
import sys

import pytest
import torch
from torch.distributed.checkpoint import save

from pgpo_lightning.checkpoints.sharded import CHECKSUM, INDEX, REST, check_shards, finish_shards, read_shards
from pgpo_lightning.checkpoints.single_file import DamagedCheckpointError
from pgpo_lightning.commands.main import main
from tests.support.helpers import config
from tests.support.runs import assert_same, final


def cut_up(checkpoint, folder):
    """Write what FSDP2 writes, from a single file."""
    saved = torch.load(checkpoint, weights_only=True)
    state = saved.pop("state_dict")
    (optimizer,) = saved.pop("optimizer_states")
    names = [name for name in state if name.startswith("model.") and name != "model.lm_head.weight"]  # a tied head
    groups = [group | {"params": [names[i] for i in group["params"]]} for group in optimizer["param_groups"]]
    moments = {names[i]: moment for i, moment in optimizer["state"].items()}
    save({"state_dict": state, "optimizer_0": {"state": moments, "param_groups": groups}}, checkpoint_id=folder)
    torch.save(saved, folder / REST)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    main(["fit", "--config", config(folder, steps=2)])
    with pytest.warns(UserWarning, match="single process"):
        cut_up(folder / "checkpoints" / "step=000002.ckpt", folder.parent / "shards")
    return folder


@pytest.fixture
def shards(run, tmp_path):
    return shutil.copytree(run.parent / "shards", tmp_path / "shards")


def test_it_is_read_to_the_last_bit(run, shards):
    assert_same(read_shards(shards), final(run, 2))
    teacher = read_shards(shards, lambda name: name.startswith("state_dict.teacher."))
    assert {name.split(".")[0] for name in teacher["state_dict"]} == {"teacher"}


def test_one_process_continues_from_it_and_exports_it(run, shards, tmp_path):
    from safetensors.torch import load_file

    main(["export", str(shards), str(tmp_path / "a"), "--weights", "teacher"])
    main(["export", str(run), str(tmp_path / "b"), "--weights", "teacher"])
    assert_same(*(load_file(tmp_path / x / "model.safetensors") for x in "ab"))
    for source, name in ((shards, "c"), (run / "checkpoints" / "step=000002.ckpt", "d")):
        main(["fit", "--config", config(tmp_path / name, steps=4), "--ckpt_path", str(source)])
    ours, theirs = final(tmp_path / "c", 4), final(tmp_path / "d", 4)
    assert_same(ours["state_dict"], theirs["state_dict"])
    assert_same(ours["optimizer_states"], theirs["optimizer_states"])
    assert ours["optimizer_states"][0]["state"][0]["step"] > 2


def test_a_folder_that_is_not_whole_is_refused(shards, tmp_path):
    part = next(shards.glob("*.distcp"))
    part.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"Expected 1 shards in .*, but {part.name} is missing"):
        read_shards(shards)
    (shards / REST).unlink()
    with pytest.raises(ValueError, match=rf"Expected a checkpoint's file, .* but .* has no `{REST}`"):
        main(["export", str(shards), str(tmp_path / "out")])


class Evil:
    def __reduce__(self):
        return print, ("code of a stranger",)


def test_an_index_that_names_code_is_not_read(shards, capsys):
    (shards / INDEX).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"Expected nothing but shapes .* but it names builtins.print"):
        read_shards(shards)
    assert "stranger" not in capsys.readouterr().out


def test_state_whose_types_belong_to_a_package_needs_the_package(tmp_path, monkeypatch):
    """torch reads torchao's quantised state only where torchao has been imported, which `pgpo export` has no reason to do."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").touch()
    code = "import torch\nclass State: pass\ntorch.serialization.add_safe_globals([State])\n"
    (tmp_path / "torchao" / "optim.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "a.ckpt"
    torch.save({"state": importlib.import_module("torchao.optim").State()}, path)
    for forget in (lambda: None, lambda: (tmp_path / "torchao" / "optim.py").unlink()):
        for name in ("torchao", "torchao.optim"):
            del sys.modules[name]
        torch.serialization.clear_safe_globals()
        forget()
        if (tmp_path / "torchao" / "optim.py").exists():
            with pytest.raises(ValueError, match="Expected a checkpoint of this program"):  # so it was read
                main(["export", str(path), str(tmp_path / "out")])
        else:
            importlib.invalidate_caches()
            shutil.rmtree(tmp_path / "torchao" / "__pycache__", ignore_errors=True)
            with pytest.raises(ValueError, match="Expected torchao to be installed"):
                main(["export", str(path), str(tmp_path / "out")])


def flip(path, text=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if text is None else content.index(text)] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_any_part_is_found(shards):
    finish_shards(shards)
    check_shards(shards)
    for path in sorted(shards.iterdir()):
        good = path.read_bytes()
        flip(path)
        with pytest.raises(DamagedCheckpointError, match=str(path if path.name != CHECKSUM else shards / INDEX)):
            check_shards(shards)
        path.write_bytes(good)
    check_shards(shards)
    (shards / CHECKSUM).unlink()
    check_shards(shards)  # written by another callback, or an older version


def test_shards_are_cut_short_or_hold_code(run, shards, tmp_path, capfd):
    write_shards({"state_dict": {"a": torch.ones(2)}, "optimizer_0": Evil()}, tmp_path / "evil")
    with pytest.raises(ValueError, match=r"nothing but tensors .*distcp, but it names builtins.print"):
        read_shards(tmp_path / "evil")
    assert "stranger" not in capfd.readouterr().out
    (part,) = shards.glob("*.distcp")
    part.write_bytes(part.read_bytes()[:-300])
    with pytest.raises(DamagedCheckpointError, match=rf"{part} (is truncated|does not begin)"):
        main(["export", str(shards), str(tmp_path / "out")])
    with pytest.raises(DamagedCheckpointError, match=rf"{part} (is truncated|does not begin)"):
        main(["fit", "--config", config(tmp_path / "c", steps=3), "--ckpt_path", str(shards)])


def write_shards(content, folder):
    with pytest.warns(UserWarning, match="single process"):
        save(content, checkpoint_id=folder)
    torch.save({"pgpo_lightning": {"steps": 1}}, folder / REST)
