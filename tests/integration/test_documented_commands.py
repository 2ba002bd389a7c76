"""Every command in the pages and in the headers of configurations has arguments that the program takes."""

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from pgpo_lightning.commands.main import main
from tests.support import CONFIGS, ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    CONFIGS / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
OPTION = re.compile(r"--(config|model|data|trainer|multiplier|checkpoint|seed_everything)\b")
OVERLAY = re.compile(r"^pgpo fit --config quickstart --config ablations/[\w-]+$")
YOUR_CODE = re.compile(r"\bmy_(module|loggers)\.")
YOURS = {"my.yaml", "mine.yaml"}  # a reader's own configuration, for which the quickstart's stands here


def commands(text: str) -> set[str]:
    """Return the `pgpo` commands of a text, each as one line without comment."""
    text = re.sub(r"\\\n#?\s*", "", text)
    for name, value in re.findall(r'^(\w+)="(pgpo [^"]*)"$', text, flags=re.MULTILINE):
        text = text.replace(f'{name}="{value}"', "").replace(f"${name}", value)
    return {match.strip() for match in re.findall(r"\bpgpo (?:fit|validate|test|plan|probe)\b[^\n`&|]*", text)}


def shared_arguments(command: str) -> list[str]:
    """Return the arguments of a command that `pgpo fit` takes too."""
    words, kept = shlex.split(command, comments=True)[2:], []
    for i, word in enumerate(words):
        if not OPTION.match(word):
            continue
        value = [] if "=" in word else words[i + 1 : i + 2]
        if value and Path(value[0]).name in YOURS:
            value = ["configs/quickstart.yaml"]
        kept += [word, *value]
    return kept if "--config" in kept else ["--config", "configs/quickstart.yaml", *kept]


def documented() -> list[tuple[str, ...]]:
    """Return the different lists of arguments of all pages and configurations."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        inline = re.findall(r"`(--(?:model|data|trainer|checkpoint)[\w.]+ [^`]+)`", text)
        found |= set().union(*map(commands, blocks)) | {f"pgpo fit {options}" for options in inline}
        # A shipped overlay over its base is parsed in test_cli.py.
        found |= {line for line in re.findall(r"`(pgpo fit --config [^`]+)`", text) if not OVERLAY.search(line)}
    for path in CONFIGS.rglob("*.yaml"):
        header = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        found |= commands(header)
    own = {tuple(shared_arguments(command)) for command in found if not YOUR_CODE.search(command)}
    return sorted(own)


@pytest.mark.parametrize("arguments", documented(), ids=" ".join)
def test_documented_arguments_are_taken(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end, redirect_stdout(StringIO()):
        main(["fit", *arguments, "--print_config"])
    assert end.value.code == 0
