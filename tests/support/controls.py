"""Records of runs for controls."""

import math

from pgpo_lightning.monitoring.run_record import RunRecord

RECORD = [1.0 + 0.5 * math.exp(-k / 5) + 0.1 * math.sin(7 * k) ** 2 for k in range(30)]


def record(folder, rho=RECORD, seed=7):
    """The record of a run, as it leaves it; returns the path."""
    path = folder / "run.json"
    RunRecord("study", "pgpo", seed, len(rho), 8, 1.0, 1.0, {}, {}, list(rho)).save(path)
    return str(path)
