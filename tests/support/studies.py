"""Records of runs with planted differences."""

from pgpo_lightning.monitoring.run_record import RunRecord
from pgpo_lightning.studies.simulation import World, simulate

SMALL = World(seeds=4, questions=20, samples=4)
ARMS = {"sdpo": 0.0, "pgpo-1.0": 0.1, "constant-1.0": 0.0, "random-1.0": 0.0, "pgpo-2": 0.0, "grpo": -0.1}
DOSES = {"pgpo-1.0": 1.5, "constant-1.0": 1.5, "random-1.0": 1.5, "pgpo-2": 1.2}


def runs(seed=0, study="lr=1", arms=ARMS, world=SMALL, doses=DOSES):
    return simulate(arms, world, seed, study, doses)


def tiny(seed=0, arm="sdpo", scores=((0.5, 0.5), (0.5, 1.0), (0.0, 0.5)), **fields):
    """A run evaluated at steps 0, 10 and 30, with two questions."""
    questions = dict(zip(("0", "10", "30"), map(list, scores), strict=True))
    return RunRecord(**{"study": "s", "arm": arm, "seed": seed, "steps": 30, "samples": 2, "seconds": 1.0, "cpu_seconds": 1.0,
                  "curves": {}, "questions": questions} | fields)  # fmt: skip


def study_of(content, number=0):
    return content["studies"][number]
