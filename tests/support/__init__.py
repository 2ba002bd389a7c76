"""What the tests share: tiny models, fixed questions, processes, workers. `ROOT` and `CONFIGS` are the repository's folders."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
