"""The same short run with different loggers, and what it leaves in its folder."""

import json

from pgpo_lightning.commands.main import main
from tests.support.helpers import config

FILES = (
    "summary.json",
    "run.json",
    "stability.png",
    "config.yaml",
    "rollouts/step=000001.jsonl",
    "validation/step=000002.jsonl",
)
CLOCKS = {"seconds", "cpu_seconds", "study", "arm"}


def fit(folder, *words, **changes):
    """Train two steps in this folder, with a picture, and return the folder."""
    constant = {"class_path": "ConstantMultiplier", "init_args": {"value": 1.25}}
    main(["fit", "--config", config(folder, steps=2, summary={}, multiplier=constant, **changes), *words])
    return folder


def left(folder):
    """What a run has left, without what differs between equal runs: the time it took and its name."""
    assert [name for name in FILES if not (folder / name).is_file()] == []
    assert (folder / "stability.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step=000001.ckpt", "step=000002.ckpt"]
    read = {name: json.loads((folder / name).read_text()) for name in ("summary.json", "run.json")}
    texts = {name: (folder / name).read_text() for name in FILES if name.endswith(".jsonl")}
    return {name: {k: v for k, v in found.items() if k not in CLOCKS} for name, found in read.items()} | texts
