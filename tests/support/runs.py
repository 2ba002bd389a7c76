"""Finished runs, compared bit for bit."""

import torch

from pgpo_lightning.monitoring.curves import read_scalars


def final(folder, steps=6):
    return torch.load(folder / "checkpoints" / f"step={steps:06d}.ckpt", weights_only=True)


def assert_same(a, b, where=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(whole, resumed):
    a, b = final(whole), final(resumed)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "ToyArithmetic", "pgpo_lightning", "global_step"):
        assert_same(a[part], b[part], part)
    curves = [
        {
            tag: points
            for tag, points in read_scalars(folder).items()
            if not tag.startswith(("timing_s", "perf", "summary/"))
        }
        for folder in (whole, resumed)
    ]
    assert "val/avg@2" in curves[0]
    assert sorted(curves[0]["val/avg@2"]) == [0, 2, 4, 6]
    assert sorted(curves[0]["critic/score/mean"]) == [1, 2, 3, 4, 5, 6]
    assert_same(*curves)
    for path in sorted((whole / "validation").iterdir()):
        assert path.read_text() == (resumed / "validation" / path.name).read_text()
