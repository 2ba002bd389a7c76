"""A stand-in for `pgpo fit`: writes what it writes, as its settings tell it, and takes no time."""

import json
import os
import pathlib
import sys
import time


def main():
    words = sys.argv[1:]
    settings = json.loads(words[words.index("--config", 3) + 1])
    folder = pathlib.Path(words[words.index("--trainer.default_root_dir") + 1])
    with open(settings["calls"], "a") as calls:
        calls.write(f"{folder.parent.name} {'resumed' if 'last' in words else 'new'} {os.environ['OMP_NUM_THREADS']}\n")
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    if (folder / "config.yaml").exists() and "last" not in words:
        sys.exit("the folder holds a run")
    (folder / "config.yaml").write_text(json.dumps(settings))
    if settings.get("checkpoint"):
        (folder / "checkpoints" / "step=000001.ckpt").touch()
    if "last" not in words:
        time.sleep(settings.get("sleep", 0))
    if settings.get("fail"):
        print("first\nsecond")
        sys.exit("error: it broke")
    seed = int(words[words.index("--seed_everything") + 1])
    questions = {}
    if "gain" in settings:
        questions = {
            "0": [0.4, 0.5],
            "1": [0.5 + settings["gain"] + 0.001 * seed * settings["gain"], 0.6 + settings["gain"]],
        }
    record = {
        "study": "base",
        "arm": folder.parent.name,
        "seed": seed,
        "steps": 1,
        "samples": 1,
        "seconds": 60.0,
        "cpu_seconds": 1.0,
    }
    if not settings.get("silent"):
        (folder / "run.json").write_text(json.dumps(record | {"curves": {}, "questions": questions, "rho": []}))


if __name__ == "__main__":
    main()
