"""The commands fit, validate and test: LightningCLI over the modules, the data and the callbacks of this package."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

import pgpo_lightning.callbacks
import pgpo_lightning.data
import pgpo_lightning.modules
import pgpo_lightning.vllm_engine  # noqa: F401  (short class names in configs need their classes imported)
from pgpo_lightning.callbacks import ResumeCheckpoint, StepSizeMultiplier, Watch
from pgpo_lightning.data import QuestionData
from pgpo_lightning.finding import PATTERN, resolve
from pgpo_lightning.held_out import told
from pgpo_lightning.lab.configurations import RESUMED, configurations, without_checkpoint
from pgpo_lightning.modules import OnPolicyModule


class _SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration beside the log; a second run may not write into the folder of a first.

    A resumed run leaves ``config.yaml`` as it is. If its own configuration differs from the last one, it writes
    ``config.resumed-at-step=N.yaml`` once its settings have been accepted.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.log_dir and not trainer.fast_dev_run:
            taken = trainer.strategy.broadcast((Path(trainer.log_dir) / self.config_filename).exists())
            if taken and not self.config.get("ckpt_path"):
                resumable = any((Path(trainer.log_dir) / "checkpoints").glob(PATTERN))
                way = "Continue it with `--ckpt_path last`" if resumable else "It has no checkpoint: delete the folder"
                raise FileExistsError(
                    f"Expected a folder without a run, but {trainer.log_dir} holds one. {way}, or choose another "
                    "`--trainer.default_root_dir`."
                )
            self.overwrite = True
            if not taken:
                super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what a resumed run has differently."""
        if trainer.is_global_zero and trainer.ckpt_path and trainer.log_dir and not self.already_saved:
            now = self.parser.dump(self.config, skip_none=False)
            if without_checkpoint(now) != without_checkpoint(
                configurations(Path(trainer.log_dir))[-1].read_text("utf-8")
            ):
                path = Path(trainer.log_dir) / RESUMED.format(step=pl_module.steps)
                path.write_text(now, encoding="utf-8")


class PGPOCommand(LightningCLI):
    """LightningCLI with the multiplier, the checkpoints and the watch as arguments of their own."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            model_class=OnPolicyModule,
            datamodule_class=QuestionData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={"log_every_n_steps": 1, "num_sanity_val_steps": -1},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer what the modules have."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a user swaps to the command line."""
        parser.add_lightning_class_args(StepSizeMultiplier, "multiplier", subclass_mode=True, required=False)
        parser.add_lightning_class_args(ResumeCheckpoint, "checkpoint")
        parser.add_lightning_class_args(Watch, "watch")

    def _set_seed(self) -> None:
        """Seed everything; module, data and multiplier take this seed unless they were given one of their own."""
        self.checked_seed()
        super()._set_seed()

    def checked_seed(self) -> int:
        """Return `seed_everything`.

        Raises:
            ValueError: If it is no number.
        """
        seed = self._get(self.config, "seed_everything")
        if isinstance(seed, bool):
            raise ValueError(f"Expected `seed_everything` to be a number, but got {seed}.")
        return seed

    def _parse_ckpt_path(self) -> None:
        """Leave settings alone: Lightning would let those in a checkpoint override configuration and flags."""

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Log training to TensorBoard in the run's own folder, and drop an absent multiplier."""
        config = self._get(self.config_init, "trainer")
        folder = config.get("default_root_dir") or "runs/unnamed"
        if config.get("logger") is None:
            # One evaluation is no curve, and in the run's folder it would be part of the run's log.
            fits = self.subcommand == "fit"
            kwargs["logger"] = TensorBoardLogger(save_dir=folder, name="", version="") if fits else False
        trainer = super().instantiate_trainer(default_root_dir=folder, **kwargs)
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not None]
        endless = trainer.max_epochs == -1 or (trainer.max_epochs is None and trainer.max_steps != -1)
        if isinstance(bar := trainer.progress_bar_callback, RichProgressBar) and endless:
            bar._get_train_description = "Epoch {:<4}".format  # Lightning would write "Epoch 0/-2"
        return trainer

    def before_fit(self) -> None:
        """Find the checkpoint that ``--ckpt_path`` means."""
        config = self.config_init[self.subcommand]
        if wanted := config.get("ckpt_path"):
            checkpoint = next(c for c in self.trainer.callbacks if isinstance(c, ResumeCheckpoint))
            found = resolve(str(wanted), checkpoint.folder(self.trainer), resume=self.subcommand == "fit")
            config["ckpt_path"] = found
            if found != str(wanted):
                print(f"{self.subcommand} from {found}")

    def before_validate(self) -> None:
        """Find the checkpoint, and say whose score it will be without one."""
        self.before_fit()
        if not self.config_init[self.subcommand].get("ckpt_path"):
            model = self.model.given_model if isinstance(self.model.given_model, str) else "the model"
            print(f"{self.subcommand} of {model} as it is, before any training: no `--ckpt_path` was given")

    before_test = before_validate

    def after_validate(self) -> None:
        """Print the scores with their standard errors, and where the answers are."""
        if self.trainer.is_global_zero and self.model.held_out is not None:
            print(f"\n{told(self.model.held_out, self.model.eval_samples)}\nanswers: {self.model.held_out.path}")

    after_test = after_validate
