"""The command `pgpo`. Every command is a module that is imported only when it is used, because Lightning alone takes seconds."""

import importlib
import os
import shlex
import sys
from importlib.metadata import version

from pgpo_lightning.commands.config_files import check_config_files, find_own_code
from pgpo_lightning.commands.configs import resolved
from pgpo_lightning.commands.quiet import quiet
from pgpo_lightning.distributed.stopping import Stopped

OWN_COMMANDS = ("configs", "export", "plan", "probe", "report", "ablate", "guard", "discover")
"""Commands with a parser of their own; the others are LightningCLI's subcommands."""

HELP = """pgpo COMMAND, pgpo COMMAND --help, and pgpo --version

fit        train a model as a configuration says
validate   score a model, or a checkpoint of a run, on the held-out questions
test       score a model, or a checkpoint of a run, on the test questions
predict    answer the prompts of a file, with a model or a checkpoint of a run
plan       predict memory and compute of fit, without loading anything
probe      estimate how much each teacher context helps, before training
export     write a checkpoint as a model folder for transformers
ablate     run a study: arms x seeds x conditions
report     compare the arms of a study
discover   attempt single questions many times, by methods that learn meanwhile and others
guard      measure how well the collapse rules detect collapsed runs
configs    list the configurations that come with the package, and copy one
"""


def main(args: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Without the program's name; by default those of the process.
    """
    quiet()
    # Verifiers and multipliers of the user are imported from the working folder, as with `python -m`. Not "": jsonargparse
    # changes the working folder while it reads a configuration in another one.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    words = resolved(sys.argv[1:] if args is None else args)
    check_config_files(words)
    find_own_code(words)
    if args is None:
        sys.argv[1:] = words  # where LightningCLI reads them
    if words[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
    elif words[:1] == ["--version"]:
        print(f"pgpo-lightning {version('pgpo-lightning')}")
    elif not words or (not words[0].startswith("-") and f"\n{words[0]} " not in HELP):
        print(f"Expected a command, but got {words[0] if words else 'none'}.\n\n{HELP}", end="", file=sys.stderr)
        sys.exit(2)
    elif wants_help(words):
        importlib.import_module("pgpo_lightning.commands.help").show(words)
    elif words[0] in OWN_COMMANDS:
        importlib.import_module(f"pgpo_lightning.commands.{words[0]}").main(words[1:])
    else:
        importlib.import_module("pgpo_lightning.commands.fit").PGPOCommand(None if args is None else words)


def wants_help(words: list[str]) -> bool:
    """Return whether the command line asks for the help of a command that has settings.

    It is read from the sources, because importing most of them takes seconds.
    """
    return words[0] != "configs" and bool({"-h", "--help"} & set(words[1:]))


def program() -> None:
    """Run the command line as a program.

    User errors are printed as a short message, with exit status 2. Others leave a traceback in the run's folder, with status 1.
    """
    try:
        _to_its_end()
    except KeyboardInterrupt:
        sys.exit(_ended("stopped by SIGINT", 130))
    except Stopped as stop:
        if int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0:
            _ended(f"{stop}{_how_to_resume(stop)}", stop.status)
        sys.exit(stop.status)
    except Exception as error:
        if _reader_is_gone(error):
            sys.exit(141)  # as a shell reports a program that SIGPIPE has ended
        if os.environ.get("PGPO_TRACEBACK"):
            raise
        from pgpo_lightning.core.errors import USER_ERROR, error_report, is_user_error

        text = error_report(error, getattr(error, "run_folder", None))
        if is_user_error(error):
            print(text, file=sys.stderr)
            sys.exit(USER_ERROR)
        sys.exit(text)


def _to_its_end() -> None:
    try:
        main()
        sys.stdout.flush()
    except SystemExit as leaving:
        from pgpo_lightning.core.errors import raised_by

        origin = raised_by(leaving)
        # These print a help or a configuration, and exit. An exit of other code is an error, because nothing was finished.
        if leaving.code or origin.split(".")[0] in (
            "argparse",
            "jsonargparse",
            "lightning",
            "pgpo_lightning",
            __name__,
        ):
            sys.stdout.flush()
            raise
        error = RuntimeError(f"{origin} ended the program by sys.exit({'' if leaving.code is None else leaving.code})")
        error.run_folder = getattr(leaving, "run_folder", None)  # type: ignore[attr-defined]
        raise error from leaving


def _reader_is_gone(error: Exception) -> bool:
    """Return whether an error only means that what reads the output, such as ``head``, has ended; a run is an error then too."""
    if not isinstance(error, BrokenPipeError) or getattr(error, "run_folder", None) is not None:
        return False
    try:
        print(flush=True)  # the error may be that of another pipe
    except BrokenPipeError:
        # Python writes what is left once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _ended(text: str, status: int) -> int:
    print(f"\n{text}", file=sys.stderr)
    return status


def _how_to_resume(stop: Stopped) -> str:
    """Return the command that resumes the run, if it was training."""
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
