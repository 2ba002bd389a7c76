"""Makes the runs of a comparison, one after the other, and keeps out of those that another process is making.

The progress of a run is read from its attempts and stored nowhere else. A run that trains is an ordinary `pgpo fit` in this
process, with the one question as its data; it resumes from the checkpoint of the module. Several processes can share a
comparison: each locks the run that it makes (``flock``).
"""

import fcntl
import json
import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from pgpo_lightning.commands.building import BuildCommand
from pgpo_lightning.commands.discovery_settings import (
    batch_size,
    register,
    run_settings,
    settings_of_methods,
    words,
)
from pgpo_lightning.commands.fit import OR_NEW, PGPOCommand
from pgpo_lightning.core.identity import question_sha256
from pgpo_lightning.core.seeding import derive_seed
from pgpo_lightning.core.types import Question
from pgpo_lightning.discovery import attempts as files
from pgpo_lightning.discovery import pass_rates
from pgpo_lightning.discovery.attempts import AttemptsFile
from pgpo_lightning.discovery.base_runs import BaseRuns
from pgpo_lightning.discovery.methods import Method
from pgpo_lightning.discovery.one_question import chosen
from pgpo_lightning.discovery.outcomes import Outcome, outcome
from pgpo_lightning.discovery.spec import DiscoverySpec
from pgpo_lightning.monitoring.run_record import FILE as RECORD

LOCK = "made.lock"
"""Is locked while a process makes the run."""


@dataclass(frozen=True)
class DiscoveryRun:
    """One run of a comparison.

    Attributes:
        method: Its method.
        question: What is asked.
        seed: Seed of the comparison. That of the run is a function of it and of the question, and is the same for all methods.
        folder: Of the run.
        size: Attempts per batch.
    """

    method: Method
    question: Question
    seed: int
    folder: Path
    size: int

    @property
    def name(self) -> str:
        """Its name within the comparison."""
        return f"{self.method.name}, question {self.question.index}, seed {self.seed}"

    @property
    def run_seed(self) -> int:
        """The seed of every random choice of the run."""
        return derive_seed("discover", self.seed, question_sha256(self.question)) % 2**32

    @property
    def file(self) -> AttemptsFile:
        """Its attempts."""
        return AttemptsFile(self.folder, self.size)

    def outcome(self, spec: DiscoverySpec) -> Outcome:
        """Return what became of it so far."""
        return outcome(self.method.name, self.question.index, self.seed, self.file.read(), spec.budget, spec.stop)


class _Fit(PGPOCommand):
    """`pgpo fit` with other arguments than the program has."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the given arguments. Lightning would warn that `sys.argv` has others."""
        self.config = parser.parse_args(args)


class Comparison:
    """The runs of a comparison.

    Args:
        spec: The comparison.

    Raises:
        ValueError: If settings are invalid, or there are no such questions.
    """

    def __init__(self, spec: DiscoverySpec) -> None:
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()  # of loading weights
        self.spec = spec
        self.settings = settings_of_methods(spec)
        self._command = BuildCommand(words(spec))

    def runs(self, measure: bool = True) -> list[DiscoveryRun]:
        """Return every run: all methods on all questions with the first seed, then with the next.

        Args:
            measure: Measure the base model's success rates that are missing; else they must be there.
        """
        spec, questions = self.spec, self._questions(measure)
        return [
            DiscoveryRun(
                method,
                question,
                seed,
                spec.folder / "runs" / name / f"question={question.index}" / f"seed={seed}",
                batch_size(method, self.settings[name]),
            )
            for seed in spec.seeds
            for question in questions
            for name, method in spec.methods.items()
        ]

    def register(self, spec: DiscoverySpec) -> None:
        """Write settings and predictions before the first run; see :func:`register`.

        Args:
            spec: The comparison as its file says, whose predictions count.
        """
        register(spec, self.settings)

    def make(self, run: DiscoveryRun) -> Outcome:
        """Make the attempts of a run that are missing, unless another process is making them.

        Returns:
            What became of the run so far.
        """
        run.folder.mkdir(parents=True, exist_ok=True)
        with (run.folder / LOCK).open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return run.outcome(self.spec)
            if not run.outcome(self.spec).complete:
                (self._train if run.method.trains else self._sample)(run)
        return run.outcome(self.spec)

    def _sample(self, run: DiscoveryRun) -> None:
        spec, module = self.spec, self._command.model
        with self._command.model_ready():
            base = BaseRuns(module, module.num_generations, spec.conversation_tokens)
            base.run(run.method.kind, run.question, run.run_seed, run.file, spec.budget, spec.stop)

    def _train(self, run: DiscoveryRun) -> None:
        if (run.folder / RECORD).exists():  # it ended with a smaller budget; the same draws lead to where it was
            for path in run.folder.iterdir():
                if path.name not in (files.FILE, LOCK):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        method = run.method
        settings = run_settings(
            self.spec, method, self.settings[method.name], run.question.index, run.run_seed, run.folder
        )
        for name in ("lightning.pytorch", "lightning.fabric"):  # which would say of every run that there is no GPU
            logging.getLogger(name).setLevel(logging.WARNING)
        _Fit(["fit", "--config", json.dumps(settings), "--ckpt_path", OR_NEW])
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)

    def _questions(self, measure: bool) -> list[Question]:
        wanted, data = self.spec.questions, self._command.datamodule
        if wanted.indices is not None:
            return chosen(data, wanted.split, list(wanted.indices))
        asked = chosen(data, wanted.split)[: wanted.among]
        folder = self.spec.folder
        rates = pass_rates.read(folder)
        if measure:
            with self._command.model_ready():
                rates = pass_rates.measure(self._command.model, asked, wanted.samples, folder)
        return chosen(data, wanted.split, [row.index for row in pass_rates.qualified(rates, wanted)])
