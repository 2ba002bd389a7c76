"""The table of methods names every overlay once, every module, and a command for each."""

import re

from pgpo_lightning.core.shipped_configs import find
from tests.support import CONFIGS, ROOT
from tests.support.helpers import MODULES


def rows():
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    table = page[page.index("| method | source |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_overlay_is_in_the_table_once():
    """That the commands parse is tested with all documented commands."""
    named = []
    for name, source, difference, command in rows():
        assert name, command
        assert source, name
        assert difference, name
        words = re.fullmatch(r"`pgpo fit ((?:--[\w.]+ [\w./-]+ ?)+)`", command)
        assert words, command
        configs = re.findall(r"--config (\S+)", words[1])
        assert configs[0] in ("quickstart", "hapo"), name
        named += [config.removeprefix("ablations/") for config in configs if config.startswith("ablations/")]
    assert sorted(named) == sorted(path.stem for path in (CONFIGS / "ablations").glob("*.yaml"))
    names = [name for name, *_ in rows()]
    assert len(names) == len(set(names))


def test_every_module_is_in_the_table():
    files = {find(config) for *_, command in rows() for config in re.findall(r"--config ([\w./-]+)", command)}
    classes = {name for file in files for name in re.findall(r"^  class_path: (\w+)$", file.read_text(), re.MULTILINE)}
    assert {module.__name__ for module in MODULES} <= classes
