"""Commands that parse the arguments of `pgpo fit`, and run something else or nothing."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L

from pgpo_lightning.commands.fit import PGPOCommand
from pgpo_lightning.models.loading import fp32_by_default
from pgpo_lightning.training.start_up import check_combination


class ParseCommand(PGPOCommand):
    """Parses what `pgpo fit` parses, and neither builds nor runs anything.

    Args:
        args: Of the program, ``fit`` included.
        exit_on_error: End the program with a message if the arguments are wrong.

    Raises:
        jsonargparse.ArgumentError: If the arguments are wrong, unless `exit_on_error` is set.
    """

    def __init__(self, args: list[str], exit_on_error: bool = True) -> None:
        self._exit_on_error = exit_on_error
        super().__init__(args)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer `fit` alone, which has the whole configuration."""
        return {"fit": PGPOCommand.subcommands()["fit"]}

    def init_parser(self, **kwargs: Any) -> Any:
        """Choose what happens when arguments are wrong."""
        return super().init_parser(exit_on_error=self._exit_on_error, **kwargs)

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the given arguments. Lightning would warn that `sys.argv` has others."""
        self.config = parser.parse_args(args)

    def _set_seed(self) -> None:
        """Leave the global generators alone: nothing is drawn from them."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""


class BuildCommand(ParseCommand):
    """Parses what `pgpo fit` parses, and builds the module and the data alone: neither opens weights or files.

    Args:
        args: As for ``pgpo fit``, with what a subclass adds.
    """

    def __init__(self, args: list[str]) -> None:
        self._fabric: L.Fabric | None = None
        super().__init__(["fit", *args])

    def _set_seed(self) -> None:
        """Keep the seed, and leave the global generators alone."""
        self.seed = self.checked_seed()

    def adapt(self, model: Any) -> None:
        """Change the settings of the module, a namespace with `class_path` and `init_args`, before it is built."""

    def instantiate_classes(self) -> None:
        """Build the module, whose constructor checks the settings, and the data."""
        self.adapt(self._get(self.config, "model"))
        self.config[self.subcommand].multiplier = None  # it may refer to a run that does not exist yet
        with warnings.catch_warnings():
            # Its new name is not in all versions that are allowed.
            warnings.filterwarnings("ignore", "(?s).*instantiate_classes.*deprecated")
            self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule = self._get(self.config_init, "data")
        self.model = self._get(self.config_init, "model")
        if self.model.run_seed.given is None:
            self.model.run_seed.given = self.seed

    @contextmanager
    def model_ready(self) -> Iterator[None]:
        """Load the model once, without a teacher, on one device; context in which it can be sampled as in training."""
        if self._fabric is None:
            trainer = self.config[self.subcommand].trainer
            precision: Any = trainer.precision or "32-true"
            fabric = L.Fabric(accelerator=trainer.accelerator, devices=1, precision=precision)
            check_combination(self.model.engine, None, sharded=False)
            self.model.training_run = False
            self.model.configure_model()
            fabric.setup_module(self.model)  # moves it to its device and precision
            self._fabric = fabric
        with self._fabric.autocast(), fp32_by_default():
            yield
