"""An adapter on a sharded base: no rank reads a whole model, the base stays, and a run continues to the last bit."""

import pytest
import torch

from pgpo_lightning.checkpoints.sharded import read_shards
from pgpo_lightning.commands.main import main
from pgpo_lightning.models.adapter import is_adapter
from pgpo_lightning.models.loading import load_model
from tests.support.adapters import logits, with_product
from tests.support.helpers import TOKENIZER, random_rows, tiny_model
from tests.support.processes import finish, start_ranks
from tests.support.runs import assert_same

LAST = "step=000002.ckpt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    finish(*start_ranks(["tests.support.sharded_lora_worker", folder], folder / "log", 2), log=folder / "log")
    return folder


def saved(folder, name, file):
    path = folder / name / file
    return read_shards(path) if path.is_dir() else torch.load(path, weights_only=True)


def test_a_continued_run_is_the_run_that_was_not_interrupted(folder):
    expected, before = saved(folder, "shards", LAST), saved(folder, "shards", "step=000001.ckpt")
    assert all(not torch.equal(before["state_dict"][n], w) for n, w in expected["state_dict"].items())
    for name in ("shards-continued", "file", "file-continued"):
        found = saved(folder, name, LAST)
        for part in ("state_dict", "optimizer_states", "ToyArithmetic", "pgpo_lightning", "global_step"):
            assert_same(found[part], expected[part], f"{name}: {part}")


def test_weights_are_shards_from_the_start_and_the_base_stays(folder):
    base = dict(load_model(str(folder / "base")).named_parameters())
    for rank in range(2):
        found = torch.load(folder / f"found.{rank}", weights_only=True)
        assert len(found["whole"]) == 28
        assert all(is_adapter(name) for name in found["whole"])
        assert all(found["teacher"])
        assert len(found["teacher"]) == 28
        assert {name.replace(".base_layer.", ".") for name in found["base"]} == {*base}
        for name, weight in found["base"].items():
            assert torch.equal(weight, base[name.replace(".base_layer.", ".")]), name
        assert len(found["gaps"]) == 2
        assert max(found["gaps"]) < 1e-5


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_exports_have_what_was_trained(folder, tmp_path, who):
    row, prefix = random_rows(1)[0], "model." if who == "student" else "teacher.model."
    state = saved(folder, "shards", LAST)["state_dict"]
    matrices = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    expected = logits(with_product(load_model(str(folder / "base")), matrices), row)
    for name in ("shards", "file"):
        main(["export", str(folder / name / LAST), str(tmp_path / name), "--weights", who])
        torch.testing.assert_close(logits(load_model(str(tmp_path / name)), row), expected, rtol=1e-4, atol=1e-4)
