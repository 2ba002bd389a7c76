"""The one seed of a run."""

from lightning.fabric.utilities.exceptions import MisconfigurationException

from pgpo_lightning.core.seeding import global_seed, has_global_seed
from pgpo_lightning.distributed.collectives import gather


class RunSeed:
    """The seed of every random choice of a run: the module's own, else Lightning's as it was when a Trainer started.

    Args:
        given: The module's own; null for Lightning's.
    """

    def __init__(self, given: int | None) -> None:
        self.given = given
        self._decided: int | None = None

    @property
    def value(self) -> int:
        """The seed."""
        own = self.given if self._decided is None else self._decided
        return global_seed() if own is None else own

    def decide(self) -> None:
        """Take Lightning's seed for good, if the module has none of its own.

        Raises:
            MisconfigurationException: If ranks have different seeds.
        """
        self._decided = None
        seeds = gather(self.value)
        if len(set(seeds)) > 1:
            raise MisconfigurationException(
                f"Expected every rank to have the same seed, but got {', '.join(map(str, seeds))}. Call "
                "`lightning.seed_everything` in every process, or set `seed`."
            )
        self._decided = seeds[0]

    def take_over(self, saved: int | None) -> None:
        """Go on with the seed of a checkpoint.

        Args:
            saved: Seed in the checkpoint; null if its version did not save one.

        Raises:
            MisconfigurationException: If this run was given another one.
        """
        if saved is None or saved == self.value:
            return
        if self.given is not None or has_global_seed():
            raise MisconfigurationException(
                f"Expected the seed of the checkpoint, {saved}, but got {self.value}: the run would not be the one that was "
                f"interrupted. Set `seed_everything` to {saved}, or start a new run from the checkpoint's weights."
            )
        self._decided = saved
