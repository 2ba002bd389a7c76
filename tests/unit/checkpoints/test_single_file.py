"""A checkpoint's file is whole or not there, and nothing in it is used before all of it was checked."""

import os
import resource
import tracemalloc
import zipfile

import pytest
import torch

from pgpo_lightning.checkpoints.checkpoint_io import CheckpointFiles
from pgpo_lightning.checkpoints.single_file import (
    CheckpointNotSavedError,
    DamagedCheckpointError,
    _whole,
    claimed,
    peek,
    read_file,
    write_checkpoint,
)
from pgpo_lightning.core.files import PARTIAL

SMALL = {"pgpo_lightning": {"steps": 3}, "state_dict": {"weight": torch.arange(40.0)}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "step=000003.ckpt"
    write_checkpoint(SMALL, path)
    return path


def same(content):
    return content["pgpo_lightning"] == {"steps": 3} and torch.equal(
        content["state_dict"]["weight"], torch.arange(40.0)
    )


def test_it_is_written_without_a_copy_in_memory_or_in_the_folder_of_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "not there"))
    monkeypatch.setattr("tempfile.tempdir", None)
    content = {"a": torch.ones(4_000_000)}  # 16 MB
    tracemalloc.start()
    write_checkpoint(content, tmp_path / "a.ckpt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
    assert torch.equal(read_file(tmp_path / "a.ckpt")["a"], content["a"])
    assert os.listdir(tmp_path) == ["a.ckpt"]


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(path):
    good, missed = path.read_bytes(), 0
    data = good.index(torch.arange(40.0).numpy().tobytes())
    for place in range(len(good)):
        _whole.clear()  # the clock of the file system is too coarse for a thousand files a second
        path.write_bytes(good[:place] + bytes([good[place] ^ 16]) + good[place + 1 :])
        try:
            content = read_file(path)
        except DamagedCheckpointError:
            continue
        assert same(content), place
        assert not data <= place < data + 160
        missed += 1
    assert missed < len(good) / 2  # padding between records, and fields that nobody reads


@pytest.mark.parametrize("reader", [read_file, peek, lambda path: CheckpointFiles().load_checkpoint(path)])
def test_what_is_cut_short_is_one_line_with_its_name(path, reader):
    good = path.read_bytes()
    for length in (0, 1, 3, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(
            DamagedCheckpointError,
            match=r"Expected a .*checkpoint, but .*step=000003.ckpt (is truncated|does not begin)",
        ) as caught:
            reader(path)
        assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return os.system, ("echo code of a stranger",)


@pytest.mark.parametrize("reader", [read_file, peek, lambda path: CheckpointFiles().load_checkpoint(path)])
def test_code_is_refused_by_name_and_nobody_is_told_how_to_run_it(path, reader, capfd):
    torch.save({"state_dict": {}, "pgpo_lightning": Evil()}, path)
    with pytest.raises(
        ValueError, match=rf"nothing but tensors and plain data in {path}, but it names posix.system"
    ) as caught:
        reader(path)
    assert "weights_only" not in str(caught.value)
    assert "stranger" not in capfd.readouterr().out


def test_what_is_no_checkpoint_is_one_line(path):
    def refused(pattern):
        with pytest.raises(DamagedCheckpointError, match=pattern) as caught:
            read_file(path)
        assert "weights_only" not in str(caught.value)
        assert "\n" not in str(caught.value)

    path.write_text("model: toy\n")
    refused("does not begin like one")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "text")
    refused("holds something else|cannot be read")
    torch.save([1, 2], path)
    refused("holds a list")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    refused("holds something else")


@pytest.fixture
def little_room():
    """Files of this process may have 20,000 bytes, and what is beyond is refused by the system as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_no_checkpoint_and_says_how_much_is_missing(path, little_room):
    before = path.read_bytes()
    for target in (path, path.with_name("step=000004.ckpt")):
        with pytest.raises(CheckpointNotSavedError) as caught:
            write_checkpoint({"a": torch.ones(20_000)}, target)
        size = int(str(caught.value).split(" bytes into ")[0].split()[-1].replace(",", ""))
        assert 80_000 < size < 83_000
        assert f"bytes into {path.parent}, but got: File too large" in str(caught.value)
        assert caught.value.errno == 27
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_a_killed_process_left_goes_with_the_next_checkpoint_and_what_is_being_written_stays(path):
    left, live = path.with_name(f"a.ckpt{PARTIAL}"), path.with_name(f"b.ckpt{PARTIAL}")
    shards, other = path.with_name(f"c.ckpt{PARTIAL}"), path.with_name(f"d{PARTIAL}")
    shards.mkdir()
    (shards / "part").write_text("half")
    for file in (left, live, other):
        file.write_text("half")
    with live.open("a") as file, claimed(file.fileno()):
        write_checkpoint(SMALL, path)
    assert sorted(os.listdir(path.parent)) == [live.name, other.name, path.name]


def test_state_that_could_not_be_read_again_is_told_when_it_is_written(path):
    with pytest.warns(UserWarning, match=r"step=000003.ckpt cannot be loaded again, because .* keeps posix.system"):
        write_checkpoint({"callbacks": {"mine": Evil()}}, path)
