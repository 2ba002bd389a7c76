"""The help of all commands but `configs`.

That of fit has the settings of the module and the multiplier first, and Lightning's Trainer last. All is read from
the sources, so that it imports neither torch, transformers nor Lightning. `--model.help NAME` is the parser's own help of a
class, also of one outside this package.
"""

import sys
import textwrap
from collections.abc import Iterator

from pgpo_lightning import _HOMES
from pgpo_lightning.commands.source import Documented, Source, documented, find, public_class

WIDTH = 120
MODULES = [name for name in _HOMES["modules"].split() if name != "OnPolicyModule"]
DATA = [name for name in _HOMES["data"].split() if name != "QuestionData"]
MULTIPLIERS = [
    name for name in _HOMES["callbacks"].split() if name.endswith("Multiplier") and name != "StepSizeMultiplier"
]

TRAINER_DEFAULTS = {"log_every_n_steps": 1, "num_sanity_val_steps": -1}
"""Where our defaults are not Lightning's."""

GENERAL = (
    (
        "-c, --config NAME_OR_FILE",
        "A configuration; several are read in this order. `pgpo configs` lists the shipped ones.",
    ),
    ("--print_config", "Print the whole configuration and exit; `--print_config=comments` with the texts below."),
    ("--seed_everything int = 0", "Seed of every random choice of the run."),
    (
        "--ckpt_path last | last-or-new | FILE",
        "Where to go on from; `last-or-new` starts a run if there is no checkpoint.",
    ),
)


def text(words: list[str]) -> str:
    """Return the help of a command.

    Args:
        words: The command line, whose `--model`, `--multiplier` and `--data` choose the classes that are shown.
    """
    own = {"plan": _plan, "probe": _probe, "export": _export, "ablate": _ablate, "discover": _discover}
    lines = (own | {"report": _report, "guard": _guard}).get(words[0])
    return "\n".join(_lines(words) if lines is None else lines()) + "\n"


def show(words: list[str]) -> None:
    """Print the help of a command, and end the program.

    Args:
        words: See :func:`text`.

    Raises:
        SystemExit: With status 0.
    """
    print(text(words), end="")
    sys.exit(0)


def _lines(words: list[str]) -> Iterator[str]:
    yield f"pgpo {words[0]} --config NAME_OR_FILE [--SETTING VALUE ...], for example"
    yield "  pgpo fit --config quickstart --trainer.max_steps 10 --trainer.default_root_dir runs/mine"
    yield ""
    for option, what in GENERAL:
        yield from _entry(option, what)
    yield from _part(words, "model", "SDPO", MODULES)
    yield from _part(words, "multiplier", "InformationMultiplier", [*MULTIPLIERS, "null"])
    yield from _part(words, "data", "FileQuestions", DATA)
    yield from _section("The checkpoints of a run", "checkpoint", _class("ResumeCheckpoint"))
    yield from _section("The summary of a run", "summary", _class("RunSummary"))
    trainer = find("Trainer", "lightning.pytorch.trainer.trainer")
    if trainer is not None:
        yield from _section("Lightning's Trainer", "trainer", trainer, TRAINER_DEFAULTS)


def _plan() -> Iterator[str]:
    yield "pgpo plan predicts memory and seconds of a run. It takes the arguments of `pgpo fit`,"
    yield "see `pgpo fit --help`, and these:"
    yield from _options("PlanOptions", "plan")
    yield from _section("What seconds are calculated from", "assume", _source("Assumptions", "memory_planner.cards"))


def _probe() -> Iterator[str]:
    yield "pgpo probe estimates, before training, how much each teacher context helps. It takes the arguments of `pgpo fit`,"
    yield "see `pgpo fit --help`, and these:"
    yield from _options("ProbeOptions", "probe")
    yield "\npgpo probe --calibrate RUNS... fits the line from gaps before training to gains of finished runs:"
    yield from _options("calibrate", "probe", "runs")


def _export() -> Iterator[str]:
    yield "pgpo export CHECKPOINT OUTPUT [--SETTING VALUE ...]"
    yield "writes a trained model as a folder for AutoModelForCausalLM.from_pretrained.\n"
    for one in documented(_source("export", "commands.export")):
        yield from _entry(one.name.upper(), one.text) if one.default is None else _setting("", one)


def _ablate() -> Iterator[str]:
    yield "pgpo ablate --config FILE [--SETTING VALUE ...]"
    yield "makes the missing runs of a study: arms x seeds x conditions.\n"
    yield from _options("ablate", "ablate", "cluster")
    yield from _section("Jobs of a cluster", "cluster", _source("Cluster", "commands.cluster"))


def _discover() -> Iterator[str]:
    yield "pgpo discover --config FILE [--SETTING VALUE ...]"
    yield "makes the missing runs of a comparison of methods on single questions, and reports when each"
    yield "found its first success.\n"
    yield from _options("discover", "discover")


def _report() -> Iterator[str]:
    yield "pgpo report RUNS... [--SETTING VALUE ...]"
    yield "compares the arms of one or more studies: does information help beyond its dose?\n"
    yield from _of_runs("report")


def _guard() -> Iterator[str]:
    yield "pgpo guard RUNS... [--SETTING VALUE ...]"
    yield "measures how well the collapse rules separate collapsed runs from healthy ones.\n"
    yield from _of_runs("guard")


def _of_runs(command: str) -> Iterator[str]:
    for one in documented(_source(command, f"commands.{command}")):
        yield from _entry("RUNS...", one.text) if one.name == "runs" else _setting("", one)


def _options(name: str, command: str, *skip: str) -> Iterator[str]:
    for one in documented(_source(name, f"commands.{command}"), skip):
        yield from _setting("", one)


def _part(words: list[str], part: str, default: str, others: list[str]) -> Iterator[str]:
    given = [after for word, after in zip(words, [*words[1:], ""], strict=False) if word == f"--{part}"]
    given += [word.partition("=")[2] for word in words if word.startswith(f"--{part}=")]
    name = given[-1] if given else default
    found = public_class(name)
    if found is None:
        yield from ("", f"--{part} {name}: its settings are shown by `pgpo fit --{part}.help {name}`.")
        return
    yield from (
        "",
        *_wrapped(f"--{part} {name}, or {', '.join(one for one in others if one != name)}, or a class of your own", ""),
    )
    yield from _wrapped(f"`pgpo fit --{part}.help CLASS` shows the settings of a class, also of your own.", "")
    for one in documented(found):
        yield from _setting(part, one)


def _section(title: str, prefix: str, cls: Source, ours: dict[str, int] | None = None) -> Iterator[str]:
    yield from ("", title)
    for one in documented(cls):
        yield from _setting(prefix, one._replace(default=str(ours[one.name])) if ours and one.name in ours else one)


def _setting(prefix: str, one: Documented) -> Iterator[str]:
    default = " (required)" if one.default is None else f" = {one.default}" if one.default else ""
    yield from _entry(f"--{prefix}{'.' if prefix else ''}{one.name} {one.kind}{default}", one.text)


def _entry(option: str, what: str) -> Iterator[str]:
    yield from _wrapped(option, "  ")
    yield from _wrapped(what, " " * 8)


def _wrapped(line: str, indent: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _class(name: str) -> Source:
    return _found(public_class(name), name)


def _source(name: str, module: str) -> Source:
    return _found(find(name, f"pgpo_lightning.{module}"), name)


def _found(source: Source | None, name: str) -> Source:
    if source is None:
        raise LookupError(f"Expected a class or a function of this package, but got {name}.")
    return source
