"""Commands that take the arguments of `pgpo fit`, build its module and data, and do something else with them."""

import warnings
from typing import Any

from pgpo_lightning.commands.fit import PGPOCommand


class BuildCommand(PGPOCommand):
    """Parses what `pgpo fit` parses, and builds the module and the data alone: neither opens weights or files.

    Args:
        args: As for ``pgpo fit``, with what a subclass adds.
    """

    def __init__(self, args: list[str]) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
            super().__init__(["fit", *args])

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only `fit` has the whole configuration."""
        return {"fit": PGPOCommand.subcommands()["fit"]}

    def _set_seed(self) -> None:
        """Leave global generators alone: nothing is drawn from them."""
        self.seed = self.checked_seed()

    def adapt(self, model: Any) -> None:
        """Change the settings of the module, a namespace with `class_path` and `init_args`, before it is built."""

    def instantiate_classes(self) -> None:
        """Build the module, whose constructor checks the settings, and the data."""
        self.adapt(self._get(self.config, "model"))
        self.config[self.subcommand].multiplier = None  # it may want to read a run that is not there yet
        with warnings.catch_warnings():
            # Its new name is not in all versions that are allowed.
            warnings.filterwarnings("ignore", "(?s).*instantiate_classes.*deprecated")
            self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        if self.model.run_seed.given is None:
            self.model.run_seed.given = self.seed

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""
