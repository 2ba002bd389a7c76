"""A run of CEPO: resumed, with a multiplier."""

import math

from pgpo_lightning.commands.main import main
from pgpo_lightning.monitoring.curves import read_scalars
from tests.support.helpers import config
from tests.support.runs import assert_same_run

SETTINGS = {
    "evidence": {"mixing_steps": 4},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-4}},
}
PGPO = {"class_path": "InformationMultiplier", "init_args": {"sensitivity": 5.0, "rho_min": None, "rho_max": 5.0}}


def curves(folder):
    return {tag: list(points.values()) for tag, points in read_scalars(folder).items()}


def test_a_resumed_run_is_the_whole_one_and_the_multiplier_reads_its_teacher(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(["fit", "--config", config(whole, module="CEPO", model=SETTINGS, multiplier=PGPO)])
    main(["fit", "--config", config(cut, steps=2, module="CEPO", model=SETTINGS, multiplier=PGPO)])
    main(["fit", "--config", config(cut, module="CEPO", model=SETTINGS, multiplier=PGPO), "--ckpt_path", "last"])
    assert_same_run(whole, cut)
    found = curves(whole)
    assert found["critic/advantages/mixing"] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    contrasted = found["self_distillation/contrasted_fraction"]
    assert min(contrasted[:4]) > 0
    assert contrasted[4:] == [0.0, 0.0]
    assert len(set(found["lr/multiplier"])) == 6  # also where the evidence has no weight any more
    assert all(math.isfinite(value) for value in found["information/mean"])
