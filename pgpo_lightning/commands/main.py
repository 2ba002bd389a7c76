"""The command `pgpo`. Every command is a module of its own, imported only when it is asked for: Lightning alone takes seconds."""

import importlib
import logging
import os
import shlex
import sys
import warnings

from pgpo_lightning.commands.config_files import check_config_files
from pgpo_lightning.distributed.stopping import Stopped

OWN_COMMANDS = ("export", "plan", "probe", "report", "ablate", "guard")
"""Those with a parser of their own; the others are LightningCLI's subcommands."""

HELP = """pgpo COMMAND, and pgpo COMMAND --help

fit        trains as a configuration says
validate   scores a model, or a checkpoint of a run, on the held-out questions
test       the same on the test questions
plan       says what fit will need of a machine, before anything is loaded
probe      measures what each context of the teacher is worth, before training
export     writes a checkpoint for transformers
ablate     runs a study: arms, seeds, conditions
report     compares the arms of a study
guard      measures how well the collapse rules detect collapsed runs
"""


def _quiet() -> None:
    """Silence remarks that a user of this program can do nothing about."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's, not ours
    # Questions are text in memory; more workers would only break the exact resume.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    # Scores are exchanged by the metrics themselves.
    warnings.filterwarnings("ignore", ".*sync_dist=True.*")
    # The teacher stays in evaluation mode on purpose.
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").addFilter(
            lambda record: not any(word in record.getMessage() for word in ("litlogger", "litmodels", "`weights_only`"))
        )


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Without the program's name; by default those of the process.
    """
    _quiet()
    # A user's verifiers and multipliers stand in the working folder, as with `python -m`. Not "": while a configuration in
    # another folder is read, that is the working folder.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    words = sys.argv[1:] if args is None else args
    check_config_files(words)
    if words[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
    elif not words or (not words[0].startswith("-") and f"\n{words[0]} " not in HELP):
        print(f"Expected a command, but got {words[0] if words else 'none'}.\n\n{HELP}", end="", file=sys.stderr)
        sys.exit(2)
    elif words[0] in OWN_COMMANDS:
        importlib.import_module(f"pgpo_lightning.commands.{words[0]}").main(words[1:])
    else:
        importlib.import_module("pgpo_lightning.commands.fit").PGPOCommand(args)


def program() -> None:
    """Run the command line as a program: what a user can mend is one line, all else a traceback in the run's folder."""
    try:
        _to_its_end()
    except KeyboardInterrupt:
        sys.exit(_ended("stopped by SIGINT", 130))
    except Stopped as stop:
        if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0:
            _ended(f"{stop}{_how_to_go_on(stop)}", stop.status)
        sys.exit(stop.status)
    except Exception as error:
        if os.environ.get("PGPO_TRACEBACK"):
            raise
        from pgpo_lightning.core.errors import report

        sys.exit(report(error, getattr(error, "run_folder", None)))


def _to_its_end() -> None:
    try:
        main()
    except SystemExit as leaving:
        from pgpo_lightning.core.errors import raised_by

        origin = raised_by(leaving)
        # Those print a help or a configuration, and end. Anybody else's exit is no success: nothing was finished.
        if leaving.code or origin.split(".")[0] in (
            "argparse",
            "jsonargparse",
            "lightning",
            "pgpo_lightning",
            __name__,
        ):
            raise
        error = RuntimeError(f"{origin} ended the program by sys.exit({'' if leaving.code is None else leaving.code})")
        error.run_folder = getattr(leaving, "run_folder", None)  # type: ignore[attr-defined]
        raise error from leaving


def _ended(text: str, status: int) -> int:
    print(f"\n{text}", file=sys.stderr)
    return status


def _how_to_go_on(stop: Stopped) -> str:
    """Return the command that goes on from where the run was stopped, if it was training."""
    words = sys.argv[1:]
    if not words or words[0] != "fit":
        return ""
    if stop.saved is None:
        return ", before there was anything to save"
    kept, skip = [], False
    for word in words:
        if not skip and not word.startswith("--ckpt_path="):
            skip = word == "--ckpt_path"
            kept += [] if skip else [word]
        else:
            skip = False
    return f". Go on with\n  {shlex.join(['pgpo', *kept, '--ckpt_path', 'last'])}"


if __name__ == "__main__":
    program()
