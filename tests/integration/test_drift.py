"""A run of DRIFT: resumed across its stages, with a multiplier and a replayed success."""

import torch

from pgpo_lightning.commands.main import main
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.helpers import config
from tests.support.runs import assert_same_run, final

SETTINGS = {
    "difficulty": {"warmup_steps": 1, "hard": 0.1},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
    "num_generations": 2,
}
PGPO = {"class_path": "InformationMultiplier", "init_args": {"sensitivity": 5.0, "rho_min": None, "rho_max": 5.0}}


def curves(folder):
    return {tag: list(points.values()) for tag, points in read_scalars(folder).items()}


def test_a_resumed_run_is_the_whole_one(tmp_path):
    """The cut lies in the second stage; what is replayed after it was found before it (3 batches are an epoch)."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(["fit", "--config", config(whole, module="DRIFT", model=SETTINGS, multiplier=PGPO)])
    main(["fit", "--config", config(cut, steps=3, module="DRIFT", model=SETTINGS, multiplier=PGPO)])
    main(["fit", "--config", config(cut, module="DRIFT", model=SETTINGS, multiplier=PGPO), "--ckpt_path", "last"])
    assert_same_run(whole, cut)
    found = curves(whole)
    assert found["drift/warming_up"] == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert found["drift/replaced_groups"][:3] == [0.0, 0.0, 0.0]
    assert max(found["drift/replaced_groups"]) > 0
    assert len(set(found["lr/multiplier"])) > 3
    state = final(whole)["pgpo_lightning"]["objective"]
    assert all(isinstance(visits, int) for _, visits in state["rates"]["seen"].values())
    assert any(visits == 2 for _, visits in state["rates"]["seen"].values())
    assert all(ids.dtype == torch.int32 for kept in state["buffer"]["kept"].values() for ids, _ in kept)
