"""The configurations of a run: the first one, and those of its resumes."""

import re
from pathlib import Path
from typing import Any

import yaml

CONFIG = "config.yaml"
RESUMED = "config.resumed-at-step={step}.yaml"


def configurations(folder: Path) -> list[Path]:
    """Return the files with a run's configurations, in the order of their use."""
    later = [
        (int(match[1]), path)
        for path in folder.glob(RESUMED.format(step="*"))
        if (match := re.search(r"=(\d+)", path.name))
    ]
    return [folder / CONFIG, *(path for _, path in sorted(later))]


def without_checkpoint(text: str) -> Any:
    """Return a configuration without its `ckpt_path`; ``None`` if it cannot be read."""
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return {name: value for name, value in config.items() if name != "ckpt_path"} if isinstance(config, dict) else None
