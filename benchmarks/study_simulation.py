"""Coverage of a report's intervals, and how often its answer is wrong, on simulated studies with a known difference.

Run: ``python -m benchmarks.study_simulation --world.seeds 10 --difference 0.02``, with the sizes of a planned study.
"""

import jsonargparse

from pgpo_lightning.studies.simulation import World, measure


def main(world: World, difference: float = 0.0, repeats: int = 500, margin: float = 0.02, seed: int = 0) -> None:
    """Simulate studies with a known difference, and print coverage and answers of the report.

    Args:
        world: Parameters of the runs.
        difference: True gain of the information arm beyond its dose.
        repeats: Number of studies.
        margin: The smallest difference of interest.
        seed: Of the first study.
    """
    for name, value in measure(difference, world, repeats, margin, seed).items():
        print(f"{name:18}" + ("-" if value is None else f"{value:.4g}"))


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
