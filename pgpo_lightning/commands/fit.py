"""The commands fit, validate, test and predict: LightningCLI for the modules, the data and the callbacks of this package."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from transformers.utils import logging as transformers_logging

import pgpo_lightning.callbacks
import pgpo_lightning.data
import pgpo_lightning.modules
import pgpo_lightning.rollout.vllm_engine  # noqa: F401  (short class names in configs need their classes imported)
from pgpo_lightning.callbacks import (
    AnswerWriter,
    Interruption,
    ProgressPrinter,
    ResumeCheckpoint,
    RunSummary,
    StabilityMonitor,
    StepSizeMultiplier,
)
from pgpo_lightning.checkpoints.finding import resolve
from pgpo_lightning.commands.help import TRAINER_DEFAULTS
from pgpo_lightning.commands.loggers import LateLoggers, in_folder, without_logs_of_training
from pgpo_lightning.commands.mistakes import brief
from pgpo_lightning.commands.trainer_settings import check_trainer
from pgpo_lightning.core.texts import counted
from pgpo_lightning.data import QuestionData
from pgpo_lightning.distributed.stopping import SIGNALS
from pgpo_lightning.modules import OnPolicyModule
from pgpo_lightning.monitoring.configurations import CONFIG, RESUMED, configurations, without_checkpoint
from pgpo_lightning.monitoring.run_folder import Lock, clear, finished_steps, folder_of, has_steps, state
from pgpo_lightning.training.held_out import summary_line

OR_NEW = "last-or-new"
"""Value of `--ckpt_path`: resume from the newest checkpoint if there is one, else start a new run."""


class _SaveConfig(SaveConfigCallback):
    """Writes the resolved configuration into the folder of the run, which :meth:`PGPOCommand.open_folder` has checked.

    A resumed run leaves ``config.yaml`` as it is. If its own configuration differs from the last one, it writes
    ``config.resumed-at-step=N.yaml`` once its settings have been accepted.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:
            taken = trainer.strategy.broadcast((folder_of(trainer) / self.config_filename).exists())
            self.overwrite = True
            if not taken:
                super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the configuration of a resumed run, if it differs."""
        folder = folder_of(trainer)  # a collective operation of all ranks
        if trainer.is_global_zero and trainer.ckpt_path and not (self.already_saved or trainer.fast_dev_run):
            now = self.parser.dump(self.config, skip_none=False)
            if without_checkpoint(now) != without_checkpoint(configurations(folder)[-1].read_text("utf-8")):
                path = folder / RESUMED.format(step=pl_module.steps)
                path.write_text(now, encoding="utf-8")


class PGPOCommand(LightningCLI):
    """LightningCLI with the arguments `multiplier`, `checkpoint` and `summary`."""

    def __init__(self, args: list[str] | None = None) -> None:
        self._words = sys.argv[1:] if args is None else args
        super().__init__(
            model_class=OnPolicyModule,
            datamodule_class=QuestionData,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults=dict(TRAINER_DEFAULTS),
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that reports a mistake in a few lines."""
        return brief(super().init_parser(**kwargs), self._words, self._parser_of_command)

    def _parser_of_command(self) -> LightningArgumentParser | None:
        named = [word for word in self._words if word in getattr(self, "_subcommand_parsers", {})]
        return self._subcommand_parsers[named[0]] if named else None

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer what the modules have."""
        offered = LightningCLI.subcommands()
        return offered | {"predict": offered["predict"] | {"return_predictions"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks that a user configures to the command line."""
        parser.add_lightning_class_args(StepSizeMultiplier, "multiplier", subclass_mode=True, required=False)
        parser.add_lightning_class_args(ResumeCheckpoint, "checkpoint")
        parser.add_lightning_class_args(RunSummary, "summary")

    def _set_seed(self) -> None:
        """Seed everything; module, data and multiplier use this seed unless they have their own."""
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
        """Keep the settings: Lightning would let those in a checkpoint override configuration and flags."""

    def before_instantiate_classes(self) -> None:
        """Let loggers write into the folder of the run; `config.yaml` keeps what was given, for use in another folder."""
        self._given = self.config
        self.config = self.config.clone()
        in_folder(self._get(self.config, "trainer.logger"), self._folder(self._get(self.config, "trainer")))

    @staticmethod
    def _folder(config: Any) -> Path:
        return Path(config.get("default_root_dir") or "runs/unnamed")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Log training to TensorBoard in the folder of the run, and remove an absent multiplier."""
        self.config = self._given
        config = self._get(self.config_init, "trainer")
        if self.subcommand == "fit":
            check_trainer(config)
        every = config.get("val_check_interval")
        if isinstance(every, int) and not isinstance(every, bool) and config.get("check_val_every_n_epoch") == 1:
            kwargs["check_val_every_n_epoch"] = None  # a whole number is of batches, whatever the length of an epoch
        folder, fits = self._folder(config), self.subcommand == "fit"
        if config.get("logger") is None:
            kwargs["logger"] = TensorBoardLogger(save_dir=folder, name="", version="") if fits else False
        elif not fits:
            kwargs["logger"] = without_logs_of_training(config["logger"], folder)
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()  # of loading weights
        callbacks = config.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        shown = config.get("enable_progress_bar") is not False and not config.get("barebones")
        if shown and not sys.stdout.isatty() and not any(isinstance(each, ProgressBar) for each in callbacks):
            kwargs["callbacks"] = [*callbacks, ProgressPrinter()]
        trainer = super().instantiate_trainer(default_root_dir=str(folder), **kwargs)
        trainer.run_folder = folder  # see `folder_of`
        callbacks = [callback for callback in trainer.callbacks if callback is not None]
        if not any(isinstance(callback, Interruption) for callback in callbacks):
            callbacks.append(Interruption(continues=self.config[self.subcommand].get("ckpt_path") == OR_NEW))
        if self.subcommand == "fit" and not any(isinstance(callback, StabilityMonitor) for callback in callbacks):
            callbacks.insert(0, StabilityMonitor())  # before checkpoints, which save what it has seen
        if self.subcommand == "predict":
            callbacks.append(AnswerWriter())
        if fits:
            late = LateLoggers(str(folder))
            late.hold(trainer)
            callbacks.insert(0, late)  # before callbacks that ask for a logger
        trainer.callbacks = callbacks
        endless = trainer.max_epochs == -1 or (trainer.max_epochs is None and trainer.max_steps != -1)
        if isinstance(bar := trainer.progress_bar_callback, RichProgressBar) and endless:
            bar._get_train_description = "Epoch {:<4}".format  # type: ignore[method-assign]  # not "Epoch 0/-2"
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the command, in a folder that no other run writes to."""
        folder, lock = None, None
        SIGNALS.listen()
        try:
            if subcommand == "fit" and not self.trainer.fast_dev_run:
                folder = folder_of(self.trainer)
                if self.trainer.is_global_zero:
                    lock = Lock(folder)
                try:
                    goes_on = self.open_folder(folder)
                except Exception:
                    if lock is not None:
                        lock.release(refused=True)
                    folder = None
                    raise
                if not goes_on:
                    return
                if lock is not None:
                    lock.sign()
            super()._run_subcommand(subcommand)
        except (Exception, SystemExit) as error:
            error.run_folder = folder  # type: ignore[union-attr]  # `main` writes the traceback there
            raise
        finally:
            SIGNALS.release()
            if lock is not None:
                lock.release()

    def open_folder(self, folder: Path) -> bool:
        """Decide where to start from, and remove the files of a run without a checkpoint.

        Args:
            folder: Of the run.

        Returns:
            Whether there are steps to train.

        Raises:
            FileExistsError: If the folder contains a run, and `--ckpt_path` does not say how to continue it.
            FileNotFoundError: If there is no checkpoint to resume from.
        """
        config = self.config_init[self.subcommand]
        given = config.get("ckpt_path")
        checkpoints = next(c for c in self.trainer.callbacks if isinstance(c, ResumeCheckpoint)).folder(self.trainer)
        progress = state(folder, checkpoints)
        begun = (
            progress == "begun" and (folder / CONFIG).exists()
        )  # without it the files may be those of another program
        steps_exist = begun and has_steps(folder)
        if progress == "finished" and given == OR_NEW:
            steps, limit = finished_steps(folder), self.trainer.max_steps
            if limit == -1 or steps >= limit:
                made = "its only step" if steps == 1 else f"all of its {steps} steps"
                print(f"Nothing to do: the run in {folder} has made {made}.")
                return False
        if given == OR_NEW:
            config["ckpt_path"] = given = "last" if progress in ("started", "finished") else None
            restart = begun
        else:
            restart = begun and not steps_exist and given is None
        if given is None and not restart and (begun or progress in ("started", "finished")):
            way = "Continue it with `--ckpt_path last`"
            if begun:
                way = f"It has no checkpoint yet: start it anew with `--ckpt_path {OR_NEW}`"
            raise FileExistsError(
                f"Expected a folder without a run, but {folder} holds one. {way}, or choose another `--trainer.default_root_dir`."
            )
        if restart and self.trainer.is_global_zero:
            print(
                f"The run in {folder} ended before {'a checkpoint' if steps_exist else 'its first step'}: started anew."
            )
            clear(folder)
        return True

    def before_fit(self) -> None:
        """Find the checkpoint that ``--ckpt_path`` means, and print what `max_steps` counts where a batch has several steps."""
        each, limit = self.model.update.steps_per_batch, self.trainer.max_steps
        if self.subcommand == "fit" and each > 1 and limit > 0:
            batches = counted(-(-limit // each), "batch", "batches")
            print(
                f"trainer.max_steps counts optimizer steps: {limit} are {batches}, because `update` makes {each} of each."
            )
        config = self.config_init[self.subcommand]
        if wanted := config.get("ckpt_path"):
            checkpoint = next(c for c in self.trainer.callbacks if isinstance(c, ResumeCheckpoint))
            found = resolve(str(wanted), checkpoint.folder(self.trainer), resume=self.subcommand == "fit")
            config["ckpt_path"] = found
            # Lightning sets it when it restores weights, which is after the checks of `setup`.
            self.trainer._checkpoint_connector._ckpt_path = found
            if found != str(wanted):
                print(f"{self.subcommand} from {found}")

    def before_validate(self) -> None:
        """Find the checkpoint, or print that the untrained model is scored."""
        if self.config_init[self.subcommand].get("ckpt_path") == OR_NEW:
            raise ValueError(
                f"Expected `--ckpt_path last` or a file for {self.subcommand}, but got {OR_NEW}, which is for fit."
            )
        self.before_fit()
        if not self.config_init[self.subcommand].get("ckpt_path"):
            model = self.model.student.given if isinstance(self.model.student.given, str) else "the model"
            print(f"{self.subcommand} of {model} as it is, before any training: no `--ckpt_path` was given")

    before_test = before_predict = before_validate

    def after_validate(self) -> None:
        """Print the scores with their standard errors, and the file of the answers."""
        evaluator = self.model.evaluator
        if self.trainer.is_global_zero and evaluator.held_out is not None:
            print(f"\n{summary_line(evaluator.held_out, evaluator.config.samples)}\nanswers: {evaluator.held_out.path}")

    after_test = after_validate

    def after_predict(self) -> None:
        """Print the file of the answers."""
        writer = next(callback for callback in self.trainer.callbacks if isinstance(callback, AnswerWriter))
        if self.trainer.is_global_zero and writer.path is not None:
            print(f"answers: {writer.path}")
