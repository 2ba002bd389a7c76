"""The command `pgpo ablate`: makes the runs of a study that are missing, each an ordinary `pgpo fit` in a process of its own.

What has been done is read off the runs' folders and nowhere else, so the command may be killed at any moment and given again. The
output of a run goes to ``seed=<n>.log`` beside its folder. That file is locked (``flock``) by whatever still writes to it: a run
that outlived its ``ablate`` is waited for and not started twice, and several ``ablate`` may share one study. On Linux runs die
with their ``ablate``; elsewhere (macOS) one that is killed with ``kill -9`` leaves them to finish. Windows has no ``flock``.
"""

import ctypes
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import IO

import jsonargparse

from pgpo_lightning.checkpoints.finding import look
from pgpo_lightning.checkpoints.single_file import remove
from pgpo_lightning.commands.study_progress import changed, expected_settings, state
from pgpo_lightning.core.settings import Count, Text, checked
from pgpo_lightning.monitoring.run_folder import clear
from pgpo_lightning.monitoring.run_record import FILE, RunRecord
from pgpo_lightning.studies.spec import PlannedRun, Settings, StudySpec, read_study

PROGRAM = [sys.executable, "-m", "pgpo_lightning.commands.main"]
POLL = 0.2  # seconds
SHOWN = 10  # lines of a log, names of runs


@checked
def ablate(config: Text, dry_run: bool = False, processes: Count | None = None) -> None:
    """Make the runs of a study that are missing.

    Args:
        config: The file of the study, such as `configs/studies/toy.yaml`; its keys are those of
        :class:`pgpo_lightning.studies.spec.StudySpec`.
        dry_run: Print the commands of the missing runs instead, a line each, for a cluster.
        processes: Runs at a time; by default what the study says.

    Raises:
        ValueError: If the study cannot be made, or has runs that were made with other settings.
        SystemExit: If a run broke (1), or the command was stopped.
    """
    study = read_study(config)
    runs = study.runs()
    expected = expected_settings(runs)
    for run in runs:
        if state(run) in ("finished", "started") and (change := changed(run, expected[run.name])):
            raise ValueError(change)
    if dry_run:
        print("\n".join(job_lines(runs)))
    else:
        Launcher(study, runs, expected, processes or study.processes).launch()


def main(args: list[str]) -> None:
    """Run the command line of `pgpo ablate`.

    Args:
        args: Without the program's name.
    """
    parser = jsonargparse.ArgumentParser(prog="pgpo ablate", description="Make the runs of a study that are missing.")
    parser.add_function_arguments(ablate, as_group=False, skip={"dry_run"})
    action = jsonargparse.ActionYesNo(no_prefix="no_")
    parser.add_argument("--dry_run", action=action, nargs="?", help="Print their commands instead, for a cluster.")
    ablate(**parser.parse_args([re.sub("^--dry-run", "--dry_run", word) for word in args]).as_dict())


def job_lines(runs: list[PlannedRun]) -> Iterator[str]:
    """Yield the commands of the runs that are missing, in parts: each part reads nothing but what those before it record."""
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
        yield f"# part {part}: {len(now)} runs" + (", when the parts before have ended" if part > 1 else "")
        for run in now:
            how = state(run)
            if how == "begun":
                yield f"# {run.folder} was begun and has no checkpoint: delete it first, unless it is running"
            yield shlex.join(["pgpo", *run.arguments(*_resume(how))])
        ready |= {run.name for run in now}


@dataclass
class _Child:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    log_start: int
    start: float


class Launcher:
    """Runs what is missing, a few processes at a time.

    Args:
        study: The study.
        runs: Its runs.
        expected: Their settings, see :func:`pgpo_lightning.commands.study_progress.expected_settings`.
        processes: Runs at a time.
    """

    def __init__(self, study: StudySpec, runs: list[PlannedRun], expected: dict[str, Settings], processes: int) -> None:
        self.study = study
        self.runs = runs
        self.expected = expected
        self.processes = processes
        self.waiting = list(runs)
        self.running: list[_Child] = []
        self.done: set[str] = set()
        self.broken: dict[str, str] = {}  # name to reason
        self.elsewhere: set[str] = set()  # another process makes them
        self.seconds: list[float] = []  # of runs that ended since the start
        self._shown = ""

    def launch(self) -> None:
        """Make the runs.

        Raises:
            SystemExit: If a run broke (1), or this process was interrupted (130) or terminated (143).
        """
        for run in list(self.waiting):
            if state(run) == "finished":
                self._finish(run)
        recorded = [RunRecord.load(run.folder).seconds for run in self.runs if run.name in self.done]
        terminate = signal.signal(signal.SIGTERM, _terminate)
        try:
            while self._advance():
                self._show(recorded)
                time.sleep(POLL)
        except KeyboardInterrupt:
            print("\nStopped. The same command goes on from here.")
            raise SystemExit(130) from None
        finally:
            self._stop()
            signal.signal(signal.SIGTERM, terminate)
        self._show(recorded)
        self._conclude()

    def _advance(self) -> bool:
        """Take note of what ended and start what can be; return whether anything is left to wait for."""
        for child in list(self.running):
            if child.process.poll() is not None:
                self.running.remove(child)
                self._end(child)
        self.elsewhere.clear()
        for run in self._ready():
            if len(self.running) == self.processes:
                break
            self._start(run)
        return bool(self.running or self._ready())

    def _ready(self) -> list[PlannedRun]:
        return [run for run in self.waiting if self.done.issuperset(run.needs)]

    def _start(self, run: PlannedRun) -> None:
        if state(run) == "finished":  # by another process
            self._finish(run)
            return
        run.log.parent.mkdir(parents=True, exist_ok=True)
        with run.log.open("ab") as log:
            if not _locked(log):
                self.elsewhere.add(run.name)
                return
            how = state(run)  # once more: it may have ended just now
            if how == "finished":
                self._finish(run)
                return
            if how == "started" and (change := changed(run, self.expected[run.name])):
                self._break(run, change)
                return
            if how == "begun":
                clear(run.folder)
            start = log.tell()
            process = subprocess.Popen(  # noqa: S603  (our own program)
                [*PROGRAM, *run.arguments(*_resume(how))],
                stdin=subprocess.DEVNULL,
                stdout=log,  # the lock is the child's, and its children's, from here on
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,  # so that Ctrl-C is ours, and all of its processes can be ended
                preexec_fn=_die_with(os.getpid()),
            )
            self.waiting.remove(run)
            self.running.append(_Child(run, process, start, time.monotonic()))

    def _end(self, child: _Child) -> None:
        run, code = child.run, child.process.returncode
        if code == 0 and state(run) == "finished":
            if change := changed(run, self.expected[run.name]):
                self._break(run, change)  # a base config was edited meanwhile
            else:
                self._finish(run)
                self.seconds.append(time.monotonic() - child.start)
            return
        how = f"exit status {code}" if code > 0 else f"killed by signal {-code}"
        ended = how if code else f"ended without {FILE}"
        with run.log.open("rb") as log:
            log.seek(child.log_start)
            text = log.read().decode(errors="replace")
        last = [line for line in text.splitlines() if line.strip()][-SHOWN:]
        self._break(run, "\n".join([f"{ended}; {run.log} ends with", *(f"    {line}" for line in last)]))

    def _finish(self, run: PlannedRun) -> None:
        if run in self.waiting:
            self.waiting.remove(run)
        self.done.add(run.name)
        if not self.study.keep_checkpoints:
            found, _ = look(run.folder / "checkpoints")
            for checkpoint in found:
                if checkpoint.mark is not None:
                    remove(checkpoint.path)

    def _break(self, run: PlannedRun, reason: str) -> None:
        if run in self.waiting:
            self.waiting.remove(run)
        self.broken[run.name] = reason

    def _stop(self) -> None:
        # There is no need to ask: a run may be killed at any moment.
        for child in self.running:
            with suppress(ProcessLookupError):
                os.killpg(child.process.pid, signal.SIGKILL)
            child.process.wait()

    def _show(self, recorded: list[float]) -> None:
        """Print one line: over itself in a terminal, else whenever a run has ended."""
        counts = f"{len(self.done)}/{len(self.runs)} runs done, {len(self.broken)} broken"
        line = f"{counts}, {len(self.running)} running"
        if self.elsewhere:
            line += f", {len(self.elsewhere)} run by another process"
        if (each := self.seconds or recorded) and self.running:
            now = time.monotonic()
            spent = sum(min(now - child.start, fmean(each)) for child in self.running)
            left = (len(self.waiting) + len(self.running)) * fmean(each) - spent
            line += f", about {duration(left / self.processes)} left"
        terminal = sys.stdout.isatty()
        if (shown := line if terminal else counts) != self._shown:
            over = terminal and (self.running or self.elsewhere)
            print(f"\r{line}\x1b[K" if terminal else line, end="" if over else "\n", flush=True)
        self._shown = shown

    def _conclude(self) -> None:
        if not self.broken:
            print(f"Every run is in {self.study.folder}. `pgpo report {self.study.folder}` compares them.")
            return
        for name, reason in self.broken.items():
            print(f"\nbroken: {name}: {reason}")
        if self.waiting:
            names = [run.name for run in self.waiting]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            print(f"\nwaiting for a broken run: {', '.join(names[:SHOWN])}{more}")
        print("\nThe same command tries again what broke.")
        raise SystemExit(1)


def duration(seconds: float) -> str:
    """Return a number of seconds as a person says it.

    Example:
        >>> duration(42), duration(130), duration(5400)
        ('42 s', '2 min', '1 h 30 min')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _resume(how: str) -> list[str]:
    return ["--ckpt_path", "last"] if how == "started" else []


def _locked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _terminate(*_: object) -> None:
    raise SystemExit(143)


def _die_with(parent: int) -> Callable[[], None] | None:
    """Return what a new process does so that it is killed when its parent ends, however that ends."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def arrange() -> None:
        # It follows the thread that started the process: the launcher has only its main thread.
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return arrange
