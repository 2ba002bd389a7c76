"""Saves the last complete step when a signal ends a run, so that the run resumes from there bit for bit."""

import os
import shutil
import signal
import subprocess
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from pgpo_lightning.callbacks.resume_checkpoint import ResumeCheckpoint, validates_next
from pgpo_lightning.core.settings import checked
from pgpo_lightning.distributed.stopping import SIGNALS, Stopped
from pgpo_lightning.modules.on_policy import OnPolicyModule


@checked
class Interruption(Checkpoint):  # Lightning calls checkpoints after all other callbacks
    """Saves the last complete step on SIGINT, SIGTERM or SIGHUP, through :class:`ResumeCheckpoint`.

    Sampling and evaluation are aborted, an update is finished first. A second signal of the same kind ends the process at once.
    An aborted evaluation is repeated when the run resumes; the one after the last step is not aborted. Under SLURM's requeue
    (``SLURMEnvironment.requeue_signal``, by default SIGUSR1) the job is also requeued. ``Trainer.fit`` raises
    :class:`pgpo_lightning.distributed.stopping.Stopped`.

    Args:
        continues: Whether the same command resumes from the newest checkpoint when it is started again. If not, SLURM's job is
            not requeued.
    """

    def __init__(self, continues: bool = True) -> None:
        self.continues = continues
        self._whole: dict[str, Any] = {}  # entries of a checkpoint of the last complete step that sampling changes
        self._evaluate = False  # before the next step
        self._ending = False
        self._requeue: int | None = None

    def setup(self, trainer: L.Trainer, pl_module: OnPolicyModule, stage: str) -> None:
        """Replace Lightning's signal handlers, which end without saving and broadcast from within a handler.

        Raises:
            MisconfigurationException: If there is no :class:`ResumeCheckpoint` to save through.
        """
        if stage == "fit" and not any(isinstance(callback, ResumeCheckpoint) for callback in trainer.callbacks):
            raise MisconfigurationException(
                "Expected a ResumeCheckpoint beside Interruption, but there is none. Add one."
            )
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = int(environment.requeue_signal or signal.SIGUSR1)
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]  # Lightning has no setting
        launcher = trainer.strategy.launcher
        SIGNALS.listen(() if self._requeue is None else (self._requeue,), None if launcher is None else launcher.kill)
        self._whole, self._ending = {}, False

    def state_dict(self) -> dict[str, Any]:
        """Return whether an evaluation was aborted; nothing if not."""
        return {"evaluate": True} if self._evaluate else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember an evaluation that has to be repeated."""
        self._evaluate = bool(state_dict.get("evaluate"))

    def on_fit_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Abort only sampling and evaluation from here on."""
        SIGNALS.mode = "sections"

    def on_train_start(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Repeat the evaluation that was aborted."""
        if self._evaluate:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: OnPolicyModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember the position after a complete step."""
        self._remember(trainer, pl_module)
        self._evaluate = validates_next(trainer)
        if self._evaluate and _is_last(trainer):
            SIGNALS.mode = "never"

    def on_validation_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Remember that no evaluation is due."""
        if not trainer.sanity_checking:
            self._evaluate = False
            if self._whole:  # else this process has not completed a step
                self._remember(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        """Ignore signals: the run ends anyway."""
        SIGNALS.mode = "never"

    def teardown(self, trainer: L.Trainer, pl_module: OnPolicyModule, stage: str) -> None:
        """Restore the signal handlers."""
        SIGNALS.release()

    def on_exception(self, trainer: L.Trainer, pl_module: OnPolicyModule, exception: BaseException) -> None:
        """Save the last complete step, and requeue the job if the signal asked for it."""
        if not isinstance(exception, Stopped):
            return
        if processes := getattr(trainer.strategy.launcher, "procs", None):
            processes.clear()  # Lightning would kill this process when the first of them has ended
        if trainer.state.fn != "fit":
            return
        checkpoint = next(callback for callback in trainer.callbacks if isinstance(callback, ResumeCheckpoint))
        if self._whole:
            self._ending = True
            pl_module.actor.verifier_errors = self._whole.pop("verifier_errors")
            checkpoint._save(trainer, pl_module)
        exception.saved = checkpoint.newest or trainer.ckpt_path
        if exception.number == self._requeue and trainer.is_global_zero:
            self._ask_slurm()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: OnPolicyModule, checkpoint: dict[str, Any]) -> None:
        """Replace the position within the next step by that after the last complete one."""
        if self._ending:
            checkpoint.update(self._whole)

    def _remember(self, trainer: L.Trainer, pl_module: OnPolicyModule) -> None:
        data = trainer.datamodule
        self._whole = {
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "loops": trainer._checkpoint_connector._get_loops_state_dict(),
            "verifier_errors": pl_module.actor.verifier_errors,
        }
        if data is not None and (state := data.state_dict()):
            self._whole[type(data).__qualname__] = state

    def _ask_slurm(self) -> None:
        if not self.continues:
            rank_zero_info(
                "The job is not requeued: without `--ckpt_path last-or-new` it would not resume from its checkpoint."
            )
            return
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
        program = shutil.which("scontrol")
        code = None if program is None else subprocess.run([program, "requeue", job], check=False).returncode  # noqa: S603
        rank_zero_info(
            f"SLURM's job {job} is requeued." if code == 0 else f"SLURM's job {job} could not be requeued ({code})."
        )


def _is_last(trainer: L.Trainer) -> bool:
    loop = trainer.fit_loop
    steps = trainer.max_steps not in (None, -1) and trainer.global_step >= trainer.max_steps
    epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return steps or trainer.should_stop or (epochs and loop.epoch_loop._num_ready_batches_reached())
