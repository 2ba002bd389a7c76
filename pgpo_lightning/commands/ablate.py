"""The command `pgpo ablate`: make the missing runs of a study, each an ordinary `pgpo fit` in its own process.

On Linux these processes are forked from one that has made the imports, see :mod:`pgpo_lightning.commands.run_server`.

The state of a study is read from the folders of its runs and stored nowhere else. The command can therefore be killed at any
moment and repeated. Before the first run the rules of the study are written to its folder, see
:mod:`pgpo_lightning.studies.registration`. The output of a run goes to ``seed=<n>.log`` beside its folder. Every process that
writes to this file holds a lock on it (``flock``). A run that outlived its ``ablate`` is therefore not started twice, and several
``ablate`` can share one study, also those of a cluster's jobs, see :mod:`pgpo_lightning.commands.cluster`. On Linux runs
end with their ``ablate``. On macOS they continue if ``ablate`` is killed with ``kill -9``. Windows has no ``flock``.
"""

import fcntl
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import IO, Any

import jsonargparse

from pgpo_lightning.checkpoints.finding import look
from pgpo_lightning.checkpoints.single_file import remove
from pgpo_lightning.commands.cluster import FOLDER as JOBS
from pgpo_lightning.commands.cluster import Cluster, Worker, submit
from pgpo_lightning.commands.mistakes import brief
from pgpo_lightning.commands.run_processes import RunProcess, RunServer, SeparateProcesses, Starter
from pgpo_lightning.commands.study_progress import State, changed, expected_settings, state
from pgpo_lightning.core.settings import Count, Text, checked
from pgpo_lightning.core.texts import counted
from pgpo_lightning.monitoring.run_folder import clear
from pgpo_lightning.monitoring.run_record import FILE, RunRecord
from pgpo_lightning.studies.registration import register
from pgpo_lightning.studies.spec import PlannedRun, Settings, StudySpec, read_study
from pgpo_lightning.studies.stopping import Looks

PROGRAM = "pgpo_lightning.commands.main"
IMPORTED = ("pgpo_lightning.commands.fit",)
"""What a run would import."""

POLL = 0.2  # seconds
SHOWN = 10  # lines of a log, or names of runs, in a message


@checked
def ablate(config: Text, dry_run: bool = False, processes: Count | None = None, cluster: Cluster | None = None) -> None:
    """Make the missing runs of a study.

    Args:
        config: File of the study: `base` (configurations), `folder`, `seeds`, `arms`, and as needed `conditions`, `settings`
            and others (docs/studies.md). `pgpo configs copy studies/toy .` copies one to change.
        dry_run: Print the commands of the missing runs, one per line, and run nothing. Writes nothing but the rules of the
            study, if it has any.
        processes: Number of runs at the same time, in each job of a cluster; by default that of the study.
        cluster: Submit jobs that make the runs, and do not wait for them.

    Raises:
        ModuleNotFoundError: If `cluster` is given and submitit is not installed.
        ValueError: If the study is invalid, has runs with other settings, or other rules than were registered.
        SystemExit: If a run failed (1), or the command was interrupted (130) or terminated (143).
    """
    study, runs, expected = _read(config, registered=not dry_run)
    if dry_run:
        looks = Looks(study, runs, _record)
        looks.update({run.name for run in runs if state(run) == "finished"})
        print("\n".join(job_lines([run for run in runs if run.name in looks.admitted])))
        if looks.decision.why:
            print(f"# {looks.decision.why}")
    elif cluster is not None:
        ids = [job.job_id for job in submit(Worker(config, processes), cluster, study.folder)]
        print(f"Submitted {counted(len(ids), 'job')}: {', '.join(ids)}. They write to {study.folder / JOBS}.")
    else:
        Launcher(study, runs, expected, processes or study.processes).launch()


def work(config: str, processes: int | None = None) -> None:
    """Make missing runs of a study as a job of a cluster, beside other jobs.

    It ends when the runs that are left are made by others. The cluster's signals are submitit's.

    Args:
        config: File of the study.
        processes: Number of runs at the same time; by default that of the study.

    Raises:
        ValueError: As :func:`ablate` does.
        SystemExit: If a run failed (1).
    """
    study, runs, expected = _read(config)
    Launcher(study, runs, expected, processes or study.processes, alone=False).launch()


def _read(config: str, registered: bool = True) -> tuple[StudySpec, list[PlannedRun], dict[str, Settings]]:
    """Return a study, its runs and their settings, which finished and started runs have. Write its rules."""
    study = read_study(config)
    runs = study.runs()
    expected = expected_settings(runs)
    for run in runs:
        if state(run) in ("finished", "started") and (change := changed(run, expected[run.name])):
            raise ValueError(change)
    if study.has_rules or registered:
        register(study, begun=sum(state(run) != "new" for run in runs))
    return study, runs, expected


def main(args: list[str]) -> None:
    """Run the command line of `pgpo ablate`.

    Args:
        args: Without the program's name.
    """
    parser = jsonargparse.ArgumentParser(prog="pgpo ablate", description="Make the missing runs of a study.")
    parser.add_function_arguments(ablate, as_group=False, skip={"dry_run"})
    action = jsonargparse.ActionYesNo(no_prefix="no_")
    parser.add_argument(
        "--dry_run", action=action, nargs="?", help="Print the commands and run nothing; for a cluster."
    )
    brief(parser, ["ablate", *args])
    instantiate: Any = getattr(parser, "instantiate", None) or parser.instantiate_classes  # the name before 4.49
    ablate(**vars(instantiate(parser.parse_args([re.sub("^--dry-run", "--dry_run", word) for word in args]))))


def job_lines(runs: list[PlannedRun]) -> Iterator[str]:
    """Yield the commands of the missing runs in parts. The runs of a part depend only on records of earlier parts."""
    missing = {run.name: run for run in runs if state(run) != "finished"}
    if not missing:
        yield "# every run is finished"
    ready: set[str] = set()
    part = 0
    while len(ready) < len(missing):
        now = [
            run for name, run in missing.items() if name not in ready and ready.issuperset(missing.keys() & run.needs)
        ]
        part += 1
        yield f"# part {part}: {len(now)} runs" + (", after the earlier parts have ended" if part > 1 else "")
        for run in now:
            progress = state(run)
            if progress == "begun":
                yield f"# {run.folder} has files but no checkpoint: delete it first, unless the run is in progress"
            yield shlex.join(["pgpo", *run.arguments(*_resume(progress))])
        ready |= {run.name for run in now}


@dataclass
class _Child:
    run: PlannedRun
    process: RunProcess
    log_start: int
    start: float


class Launcher:
    """Runs the missing runs, several processes at the same time.

    Args:
        study: The study.
        runs: Its runs.
        expected: Their settings from :func:`pgpo_lightning.commands.study_progress.expected_settings`.
        processes: Number of runs at the same time.
        alone: Wait for runs that other processes make, and end when terminated.
    """

    def __init__(
        self,
        study: StudySpec,
        runs: list[PlannedRun],
        expected: dict[str, Settings],
        processes: int,
        alone: bool = True,
    ) -> None:
        self.alone = alone
        self.study = study
        self.runs = runs
        self.expected = expected
        self.processes = processes
        self.waiting = list(runs)
        self.running: list[_Child] = []
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # name to reason
        self.elsewhere: set[str] = set()  # made by another process
        self.seconds: list[float] = []  # of the runs that ended since the start
        self.looks = Looks(study, runs, _record)
        self._shown = ""
        self._starter = starter()

    def launch(self) -> None:
        """Make the runs.

        Raises:
            SystemExit: If a run failed (1), or this process was interrupted (130) or terminated (143).
        """
        for run in list(self.waiting):
            if state(run) == "finished":
                self._finish(run)
        recorded = [RunRecord.load(run.folder).seconds for run in self.runs if run.name in self.done]
        terminate = signal.signal(signal.SIGTERM, _terminate) if self.alone else None
        try:
            while self._advance():
                self._show(recorded)
                time.sleep(POLL)
        except KeyboardInterrupt:
            print("\nStopped. Repeat the command to continue.")
            raise SystemExit(130) from None
        finally:
            self._stop()
            self._starter.close()
            if self.alone:
                signal.signal(signal.SIGTERM, terminate)
        self._show(recorded)
        self._conclude()

    def _advance(self) -> bool:
        """Handle runs that ended and start those that are ready. Return whether any run is in progress or ready."""
        for child in list(self.running):
            if (code := child.process.poll()) is not None:
                self.running.remove(child)
                self._end(child, code)
        self.elsewhere.clear()
        self.looks.update(self.done)
        for run in self._ready():
            if len(self.running) == self.processes:
                break
            self._start(run)
        ready = [run for run in self._ready() if self.alone or run.name not in self.elsewhere]
        return bool(self.running or ready)

    def _ready(self) -> list[PlannedRun]:
        admitted = [run for run in self.waiting if run.name in self.looks.admitted]
        return [run for run in admitted if self.done.issuperset(run.needs)]

    def _start(self, run: PlannedRun) -> None:
        if state(run) == "finished":  # made by another process
            self._finish(run)
            return
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            if not _locked(log):
                self.elsewhere.add(run.name)
                return
            progress = state(run)  # read again under the lock, because the run may have ended meanwhile
            if progress == "finished":
                self._finish(run)
                return
            if progress == "started" and (change := changed(run, self.expected[run.name])):
                self._fail(run, change)
                return
            if progress == "begun":
                clear(run.folder)
            start = log.tell()
            process = self._starter.start(run.arguments(*_resume(progress)), log)
            self.waiting.remove(run)
            self.running.append(_Child(run, process, start, time.monotonic()))

    def _end(self, child: _Child, code: int) -> None:
        run = child.run
        if code == 0 and state(run) == "finished":
            if change := changed(run, self.expected[run.name]):
                self._fail(run, change)  # a base config was changed meanwhile
            else:
                self._finish(run)
                self.seconds.append(time.monotonic() - child.start)
            return
        status = f"exit status {code}" if code > 0 else f"killed by signal {-code}"
        reason = status if code else f"ended without {FILE}"
        with run.log.open("rb") as log:
            log.seek(child.log_start)
            text = log.read().decode(errors="replace")
        last = [line for line in text.splitlines() if line.strip()][-SHOWN:]
        self._fail(run, "\n".join([f"{reason}; {run.log} ends with", *(f"    {line}" for line in last)]))

    def _finish(self, run: PlannedRun) -> None:
        if run in self.waiting:
            self.waiting.remove(run)
        self.done.add(run.name)
        if not self.study.keep_checkpoints:
            checkpoints, _ = look(run.folder / "checkpoints")
            for checkpoint in checkpoints:
                if checkpoint.mark is not None:
                    remove(checkpoint.path)

    def _fail(self, run: PlannedRun, reason: str) -> None:
        if run in self.waiting:
            self.waiting.remove(run)
        self.failed[run.name] = reason

    def _stop(self) -> None:
        # A run can be killed at any moment and resumed.
        for child in self.running:
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):  # a process that has only just started leads no group yet
                os.kill(child.process.pid, signal.SIGKILL)
            child.process.wait()

    def _show(self, recorded: list[float]) -> None:
        """Print one line: in place in a terminal, otherwise whenever a run has ended."""
        counts = f"{len(self.done)}/{len(self.runs)} runs done, {len(self.failed)} failed"
        line = f"{counts}, {len(self.running)} running"
        if self.elsewhere:
            line += f", {len(self.elsewhere)} running in another process"
        if (durations := self.seconds or recorded) and self.running:
            now = time.monotonic()
            spent = sum(min(now - child.start, fmean(durations)) for child in self.running)
            left = (len(self.waiting) + len(self.running)) * fmean(durations) - spent
            line += f", about {duration(left / self.processes)} left"
        terminal = sys.stdout.isatty()
        if (shown := line if terminal else counts) != self._shown:
            in_place = terminal and (self.running or self.elsewhere)
            print(f"\r{line}\x1b[K" if terminal else line, end="" if in_place else "\n", flush=True)
        self._shown = shown

    def _conclude(self) -> None:
        if self.looks.decision.stop:
            print(f"{self.looks.decision.why} {len(self.waiting)} runs were not needed.")
        if not self.failed:
            if self.elsewhere:
                print(f"Runs that are left to other jobs: {len(self.waiting)}")
            else:
                print(f"All runs are in {self.study.folder}. Compare them with `pgpo report {self.study.folder}`.")
            return
        for name, reason in self.failed.items():
            print(f"\nfailed: {name}: {reason}")
        if self.waiting and not self.looks.decision.stop:
            names = [run.name for run in self.waiting]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            print(f"\nwaiting for a failed run: {', '.join(names[:SHOWN])}{more}")
        print("\nRepeat the command to try the failed runs again.")
        raise SystemExit(1)


def duration(seconds: float) -> str:
    """Return a duration as text.

    Example:
        >>> duration(42), duration(130), duration(5400)
        ('42 s', '2 min', '1 h 30 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def starter() -> Starter:
    """Return what starts the runs on this system."""
    return RunServer(PROGRAM, IMPORTED) if sys.platform == "linux" else SeparateProcesses(PROGRAM)


def _record(run: PlannedRun) -> RunRecord:
    return RunRecord.load(run.folder)


def _resume(progress: State) -> list[str]:
    return ["--ckpt_path", "last"] if progress == "started" else []


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _terminate(*_: object) -> None:
    raise SystemExit(143)
